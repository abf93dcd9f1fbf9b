"""Config trees as JSON that can be read back: what a folder says of the model in it."""

import dataclasses
import enum
import importlib
import json
import pathlib
import typing
from typing import Any

from blt_jax.layers.model import ModelConfig

MODEL_FILE = "model.json"


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


def config_from_json(value: Any, kind: type, where: object) -> Any:
    """The config of class `kind` that `config_to_json` wrote.

    Raises ValueError for unknown classes, fields and enum members; where: names the file.
    """
    config = _from_json(value, kind, where)
    if not isinstance(config, kind):
        raise ValueError(f"{where}: {value!r} is no {kind.__name__}")
    return config


def _from_json(value: Any, kind: Any, where: object) -> Any:
    if isinstance(value, dict):
        kind = _config_class(value, where) if "class" in value else kind
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


def write_model_config(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """Writes `model.json`, whole or not at all."""
    path = pathlib.Path(folder) / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config_to_json(config), indent=2) + "\n")
    partial.replace(path)
