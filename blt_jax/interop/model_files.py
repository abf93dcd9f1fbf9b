"""Our own folder of one model: model.json with its config, params/ written by orbax."""

import dataclasses
import enum
import importlib
import json
import pathlib
import typing
from typing import Any

import flax.traverse_util
import jax
from jax.sharding import Mesh

from blt_jax.dist.sharding import ShardingRules, param_shapes, param_shardings
from blt_jax.interop.foreign_config import read_json
from blt_jax.layers.model import Model, ModelConfig

CONFIG_FILE = "model.json"


def config_to_json(config: Any) -> Any:
    """A config tree as JSON values: dataclasses with their class, enums by member name."""
    if dataclasses.is_dataclass(config):
        kind = type(config)
        fields = {f.name: config_to_json(getattr(config, f.name)) for f in dataclasses.fields(kind)}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **fields}
    if isinstance(config, enum.Enum):
        return config.name
    if isinstance(config, tuple):
        return [config_to_json(value) for value in config]
    return config


def config_from_json(value: dict[str, Any], where: object = CONFIG_FILE) -> ModelConfig:
    """The config tree that `config_to_json` wrote; unknown classes and fields are ValueErrors."""
    config = _from_json(value, ModelConfig, where)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{where}: {value!r} is no model config")
    return config


def _from_json(value: Any, kind: Any, where: object) -> Any:
    if isinstance(value, dict):
        kind = _config_class(value, where)
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(set(value) - names - {"class"})
        if unknown:
            raise ValueError(f"{where}: {kind.__name__} has no fields {unknown}: {sorted(names)}")
        return kind(**{k: _from_json(value[k], hints[k], where) for k in value if k != "class"})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in kind.__members__:
            raise ValueError(f"{where}: {value!r}: allowed are {list(kind.__members__)}")
        return kind[value]
    if isinstance(value, list):
        element = (typing.get_args(kind) or (Any,))[0]
        return tuple(_from_json(item, element, where) for item in value)
    return value


def _config_class(value: dict[str, Any], where: object) -> type:
    module, _, name = str(value.get("class")).rpartition(".")
    if not module.startswith("blt_jax."):
        raise ValueError(f"{where}: class {value.get('class')!r} is not one of blt_jax")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where}: there is no class {value['class']}") from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{where}: {value['class']} is no config class")
    return kind


def save_model(path: str | pathlib.Path, model: Model, params: dict[str, Any]) -> None:
    """Writes the folder. Raises FileExistsError if a model is already there."""
    import orbax.checkpoint as ocp

    path = pathlib.Path(path).absolute()
    if (path / CONFIG_FILE).exists():
        raise FileExistsError(f"{path} already holds a model")
    path.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "params", params, force=True)
    # Last, so that a folder with a config is complete.
    text = json.dumps(config_to_json(model.config), indent=2)
    (path / CONFIG_FILE).write_text(text + "\n")


def load_model(
    path: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    sharding: ShardingRules | None = None,
) -> tuple[Model, dict[str, Any]]:
    """(model, params) of a folder written by `save_model`, on a mesh sharded by `sharding`.

    Raises FileNotFoundError for a missing folder, ValueError for a damaged one.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(path).absolute()
    config = config_from_json(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
    model = config.build(sharding)
    if not (path / "params").is_dir():
        raise FileNotFoundError(f"{path}/params: no such folder")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path / "params").item_metadata
        if stored is None:
            raise ValueError(f"{path}/params is damaged: its list of arrays cannot be read")
        target = _abstract_params(model, mesh, stored.tree)
        try:
            return model, checkpointer.restore(path / "params", target)
        except Exception as error:  # orbax and tensorstore raise many types
            raise ValueError(f"{path}/params is damaged: {error}") from error


def _abstract_params(model: Model, mesh: Mesh | None, stored: Any) -> dict[str, Any]:
    """Shapes of the model with the types of the file, which orbax would cast silently."""

    flat = flax.traverse_util.flatten_dict(param_shapes(model))
    types = flax.traverse_util.flatten_dict(dict(stored))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(flat, here)
    if mesh is not None:
        shardings = flax.traverse_util.flatten_dict(param_shardings(model, mesh))
    return flax.traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                types[path].dtype if path in types else leaf.dtype,
                sharding=shardings[path],
            )
            for path, leaf in flat.items()
        }
    )
