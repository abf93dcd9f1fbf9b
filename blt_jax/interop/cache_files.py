"""The cache of a generation as a safetensors file, to go on with it later or elsewhere."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blt_jax.decoding.decoder import Decoder
from blt_jax.interop.tensor_files import import_safetensors
from blt_jax.train.config_json import config_to_json


def save_cache(path: str | pathlib.Path, decoder: Decoder, cache: Any) -> None:
    """Writes the cache of a Decoder of one model with the model's config, but not the parameters.

    Raises FileExistsError if the file is there, TypeError for a decoder of several models.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is already there")
    metadata = {
        "config": json.dumps(_config(decoder)),
        "structure": _structure(cache),
        "rows": str(cache.lengths.shape[0]),
    }
    leaves = {name: np.asarray(leaf, order="C") for name, leaf in _leaves(cache).items()}
    import_safetensors().numpy.save_file(leaves, path, metadata=metadata)


def load_cache(path: str | pathlib.Path, decoder: Decoder) -> Any:
    """The cache that `save_cache` wrote, for a decoder with the same parameters.

    Raises ValueError if the file is no such cache, naming the fields of the config, the policy or
    the arrays that are others than this decoder's, as they are for another capacity.
    """
    path, own = pathlib.Path(path), _config(decoder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, rows = json.loads(metadata["config"]), int(metadata["rows"])
        structure = metadata["structure"]
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no saved cache: {error!r}") from error
    names = sorted(own.keys() | config.keys())
    other = {n: config.get(n) for n in names if config.get(n) != own.get(n)}
    if other:
        raise ValueError(
            f"{path} is the cache of another model, with {other}: this decoder has "
            f"{ {name: own.get(name) for name in other} }"
        )
    prompts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))
    cache = jax.eval_shape(decoder.prefill, *prompts)[1]
    needed, found = (
        {name: (x.shape, str(x.dtype)) for name, x in leaves.items()}
        for leaves in (_leaves(cache), stored)
    )
    wrong = [name for name in needed | found if needed.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} arrays do not fit this decoder: {wrong[0]} is "
            f"{found.get(wrong[0])}, needed is {needed.get(wrong[0])}"
        )
    if structure != _structure(cache):
        raise ValueError(
            f"{path} is the cache of another decoder, {structure}: this one has {_structure(cache)}"
        )
    leaves = [jnp.asarray(stored[name]) for name in needed]
    return jax.tree.unflatten(jax.tree.structure(cache), leaves)


def _config(decoder: Decoder) -> dict[str, Any]:
    if not hasattr(decoder, "model"):
        raise TypeError(f"{type(decoder).__name__}: must be a decoder of one model")
    return config_to_json(decoder.model.config)


def _structure(cache: Any) -> str:
    """What a cache is besides its arrays: its classes, and the policy that filled it."""
    return str(jax.tree.structure(cache))


def _leaves(cache: Any) -> dict[str, Any]:
    """The arrays of a cache by their path in it."""
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(cache)}
