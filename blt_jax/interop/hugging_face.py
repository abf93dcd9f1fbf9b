"""Hugging Face folders (config.json and safetensors) in and out, without torch or transformers.

    model, params = load_pretrained(path)                         # Llama, or BLT
    entropy_model, its_params = load_pretrained(path, part="entropy_model")
    save_pretrained(model, params, path)

Attributes and tables of weights: hugging_face_llama.py, hugging_face_blt.py.
"""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules
from blt_jax.interop.foreign_config import read_json
from blt_jax.interop.hugging_face_blt import (
    blt_table,
    entropy_model_table,
    read_blt,
    read_entropy_model,
    read_patcher,
    write_blt,
)
from blt_jax.interop.hugging_face_llama import llama_table, read_llama, write_llama
from blt_jax.interop.tensor_files import TensorFiles, check_names, write_tensors
from blt_jax.interop.weights import Weight, foreign_reader, foreign_shapes, read_params
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.models.blt_config import BLTConfig
from blt_jax.models.blt_patching import PatcherConfig
from blt_jax.models.llama3 import Llama3Config

ENTROPY_MODEL = "entropy_model"
MODEL_TYPES = ("llama", "blt")


def load_pretrained(
    path: str | pathlib.Path,
    *,
    part: str | None = None,
    window: int | None = None,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a local Hugging Face folder with a Llama or a BLT.

    part: "entropy_model" reads the patcher of a BLT. window: attention window of a BLT whose config
    leaves it null (0: none). dtype: of the parameters; None keeps that of the files. With a mesh
    the params are sharded by `sharding`. Raises ValueError naming every unknown attribute and every
    missing, unexpected or misshapen tensor, FileNotFoundError for missing files.
    """
    path = pathlib.Path(path)
    attributes = _attributes(path)
    parts = _parts(attributes, window)
    if part not in parts:
        named = [name for name in parts if name]
        raise ValueError(f"{path}: part={part!r}: this model has the parts {named} besides None")
    config, table = parts[part]
    model = config.build(sharding)
    with TensorFiles(path) as files:
        tied = isinstance(config, Llama3Config) and config.tied_embeddings
        if tied and "lm_head.weight" in files.shapes:
            raise ValueError(
                f"{path}: config.json ties the embeddings, yet the files hold lm_head.weight: drop "
                "one of them"
            )
        names = [name for c, t in parts.values() for name in foreign_shapes(t, c.build())]
        check_names(names, files.shapes, path)
        params = read_params(files, table, model, mesh=mesh, dtype=_dtype(dtype))
    return model, params


def load_patcher(path: str | pathlib.Path) -> PatcherConfig:
    """The patching rule, with its threshold, of a local Hugging Face folder with a BLT."""
    return read_patcher(_attributes(pathlib.Path(path), allowed=("blt",)))


def has_entropy_model(path: str | pathlib.Path) -> bool:
    """Whether a local Hugging Face folder holds a BLT together with its patcher."""
    attributes = _attributes(pathlib.Path(path))
    return attributes["model_type"] == "blt" and attributes.get("patch_in_forward", True)


def _attributes(path: pathlib.Path, allowed: tuple[str, ...] = MODEL_TYPES) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder (nothing is downloaded here)")
    attributes = read_json(path / "config.json")
    kind = attributes.get("model_type") if isinstance(attributes, dict) else None
    if kind not in allowed:
        raise ValueError(f"{path}/config.json: model_type={kind!r}: allowed are {list(allowed)}")
    return attributes


def _parts(
    attributes: dict[str, Any], window: int | None
) -> dict[str | None, tuple[ModelConfig, list[Weight]]]:
    """Config and table of the model itself, at None, and of its parts."""
    if attributes["model_type"] == "llama":
        if window is not None:
            raise ValueError(f"window={window}: only for BLT, a LlamaConfig has no window")
        config = read_llama(attributes)
        return {None: (config, llama_table(config))}
    config = read_blt(attributes, window)
    parts = {None: (config, blt_table(config))}
    entropy_model = read_entropy_model(attributes, window)
    if entropy_model is not None:
        parts[ENTROPY_MODEL] = (entropy_model, entropy_model_table(entropy_model))
    return parts


def save_pretrained(
    model: Model,
    params: dict[str, Any],
    path: str | pathlib.Path,
    *,
    entropy_model: tuple[Model, dict[str, Any]] | None = None,
    patcher: PatcherConfig | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = ml_dtypes.bfloat16,
) -> None:
    """Writes config.json and safetensors that transformers loads, one shard in memory at a time.

    entropy_model (with its params) and patcher: for a BLT that is to patch by itself. Raises
    ValueError for a model or option that transformers cannot express, FileExistsError for a folder
    that already holds weights.
    """
    config = model.config
    pieces = [(model, params)]
    if isinstance(config, Llama3Config):
        if entropy_model is not None or patcher is not None:
            raise ValueError("entropy_model and patcher: only for BLT")
        attributes, tables = write_llama(config), [llama_table(config)]
    elif isinstance(config, BLTConfig):
        entropy_config = None
        tables = [blt_table(config)]
        if entropy_model is not None:
            entropy_config = entropy_model[0].config
            pieces.append(entropy_model)
            tables.append(entropy_model_table(entropy_config))
        attributes = write_blt(config, entropy_config, patcher)
    else:
        raise ValueError(f"{type(config).__name__}: only Llama3Config and BLTConfig can be written")
    shapes, readers = {}, {}
    for (part, part_params), table in zip(pieces, tables, strict=True):
        part_shapes = foreign_shapes(table, part)
        shapes |= part_shapes
        readers |= dict.fromkeys(part_shapes, foreign_reader(table, part_params))
    path, dtype = pathlib.Path(path), np.dtype(dtype)
    write_tensors(path, shapes, lambda name: readers[name](name), dtype, max_shard_bytes)
    attributes["torch_dtype"] = dtype.name
    (path / "config.json").write_text(json.dumps(attributes, indent=2, sort_keys=True) + "\n")


def _dtype(dtype: Any) -> np.dtype | None:
    return None if dtype is None else np.dtype(dtype)
