"""Our own folders of models, converted or trained.

model.json           the model's config
params/              its parameters, written by orbax (of a run: checkpoints/)
entropy_model/       the same again, for a BLT that patches by itself
patcher.json         its patching rule
ngram_tables.npz     its exact n-gram tables, where it has them in place of hashes
"""

import json
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules, param_shapes, param_shardings
from blt_jax.interop.foreign_config import read_json
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.models.blt_ngrams import NgramTables
from blt_jax.models.blt_patching import PatcherConfig
from blt_jax.train.config_json import (
    MODEL_FILE,
    config_from_json,
    config_to_json,
    write_model_config,
)

ENTROPY_MODEL = "entropy_model"
PATCHER_FILE = "patcher.json"
NGRAM_FILE = "ngram_tables.npz"


def save_model(
    path: str | pathlib.Path,
    model: Model,
    params: dict[str, Any],
    *,
    entropy_model: tuple[Model, dict[str, Any]] | None = None,
    patcher: PatcherConfig | None = None,
) -> None:
    """Writes the folder. Raises FileExistsError if a model is already there."""
    import orbax.checkpoint as ocp

    path = pathlib.Path(path).absolute()
    if (path / MODEL_FILE).exists():
        raise FileExistsError(f"{path} already holds a model")
    path.mkdir(parents=True, exist_ok=True)
    if entropy_model is not None:
        save_model(path / ENTROPY_MODEL, *entropy_model)
    if patcher is not None:
        save_patcher(path, patcher)
    if getattr(model, "ngram_tables", None) is not None:
        save_ngram_tables(path, model.ngram_tables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params, force=True)
    # Last, so that a folder with a config is complete.
    write_model_config(path, model.config)


def load_model(
    path: str | pathlib.Path,
    *,
    part: str | None = None,
    averaged: bool = False,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a folder of `save_model` or of a run (its newest checkpoint).

    part: "entropy_model" for that of a BLT. averaged: the averaged parameters of a run. With a mesh
    the params are sharded by `sharding`. Raises FileNotFoundError for what is missing, ValueError
    for what is damaged.
    """
    path = pathlib.Path(path).absolute()
    if part not in (None, ENTROPY_MODEL):
        raise ValueError(f"part={part!r}: allowed are None and {ENTROPY_MODEL!r}")
    path = path / part if part else path
    file = path / MODEL_FILE
    config = config_from_json(read_json(file), ModelConfig, file)
    if (path / NGRAM_FILE).exists():
        model = config.build(sharding, ngram_tables=load_ngram_tables(path))
    else:
        model = config.build(sharding)
    if (path / "checkpoints").is_dir() and not (path / "params").is_dir():
        from blt_jax.train.checkpoint import load_params

        return model, load_params(path, _abstract(model, mesh, {}), averaged=averaged)
    if averaged:
        raise ValueError(f"averaged=True: {path} is no run, it holds one set of parameters")
    return model, _read_params(path / "params", model, mesh)


def save_patcher(path: str | pathlib.Path, patcher: PatcherConfig) -> None:
    """Writes the patching rule into a folder of a model or of a BLT run."""
    text = json.dumps(config_to_json(patcher), indent=2)
    (pathlib.Path(path) / PATCHER_FILE).write_text(text + "\n")


def save_ngram_tables(path: str | pathlib.Path, tables: NgramTables) -> None:
    """Writes exact n-gram tables into a folder of a model or of a BLT run."""
    arrays = {f"keys_{size}": keys for size, keys in tables.keys.items()}
    arrays |= {f"ids_{size}": ids for size, ids in tables.ids.items()}
    np.savez(pathlib.Path(path) / NGRAM_FILE, **arrays)


def load_ngram_tables(path: str | pathlib.Path) -> NgramTables:
    """The exact n-gram tables that `save_ngram_tables` wrote."""
    with np.load(pathlib.Path(path) / NGRAM_FILE) as arrays:
        parts = [name.removeprefix("keys_") for name in arrays if name.startswith("keys_")]
        keys = {int(size): arrays[f"keys_{size}"] for size in parts}
        return NgramTables(keys, {int(size): arrays[f"ids_{size}"] for size in parts})


def load_patcher(path: str | pathlib.Path) -> PatcherConfig:
    """The patching rule of a folder of `save_model` or of a BLT run."""
    file = pathlib.Path(path) / PATCHER_FILE
    return config_from_json(read_json(file), PatcherConfig, file)


def _read_params(path: pathlib.Path, model: Model, mesh: Mesh | None) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata
        if stored is None:
            raise ValueError(f"{path} is damaged: its list of arrays cannot be read")
        types = flax.traverse_util.flatten_dict(dict(stored.tree))
        try:
            return checkpointer.restore(path, _abstract(model, mesh, types))
        except Exception as error:  # orbax and tensorstore raise many types
            raise ValueError(f"{path} is damaged: {error}") from error


def _abstract(model: Model, mesh: Mesh | None, types: dict[tuple, Any]) -> dict[str, Any]:
    """Shapes of the model with the types of the file, which orbax would cast silently."""
    flat = flax.traverse_util.flatten_dict(param_shapes(model))
    shardings = dict.fromkeys(flat, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    if mesh is not None:
        shardings = flax.traverse_util.flatten_dict(param_shardings(model, mesh))
    return flax.traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape, types.get(path, leaf).dtype, sharding=shardings[path]
            )
            for path, leaf in flat.items()
        }
    )
