"""Config trees: re-validation after overrides, flat text, differences, the runs of a file."""

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

# A change of these parts never changes what is computed, so a workdir may be continued with it.
NEUTRAL_FIELDS = ("mesh", "sharding", "logging", "checkpointing")


def validate(config: Any) -> None:
    """Runs every `__post_init__` of a config tree again, children first, tuples included.

    Overrides assign fields one by one without any check; this makes their combination checked.
    """
    if isinstance(config, tuple | list):
        for item in config:
            validate(item)
    elif isinstance(config, dict):
        for item in config.values():
            validate(item)
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            validate(getattr(config, field.name))
        if hasattr(config, "__post_init__"):
            config.__post_init__()


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # The class name without its module: the same config may be declared in two files.
        yield path, type(value).__qualname__
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            yield from _walk(getattr(value, field.name), name)
    elif isinstance(value, tuple) and any(
        dataclasses.is_dataclass(item) or isinstance(item, tuple) for item in value
    ):
        yield path, f"({len(value)} items)"
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]")
    elif isinstance(value, enum.Enum):
        yield path, f"{type(value).__name__}.{value.name}"
    else:
        yield path, repr(value)


def flatten(config: Any) -> dict[str, str]:
    """Text of every field by its path (`model.num_layers` -> `4`); the root's path is empty."""
    return dict(_walk(config, ""))


def to_text(config: Any) -> str:
    """One line `path = value` per field, the form of `config.txt`."""
    return "".join(f"{path or 'config'} = {value}\n" for path, value in flatten(config).items())


def from_text(text: str) -> dict[str, str]:
    """Inverse of `to_text`, as the flat dictionary of `flatten`."""
    pairs = (line.split(" = ", 1) for line in text.splitlines() if line)
    return {("" if path == "config" else path): value for path, value in pairs}


def is_neutral(path: str) -> bool:
    """True for fields whose change does not change what a run computes."""
    return any(part.split("[")[0] in NEUTRAL_FIELDS for part in path.split("."))


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Lines `path: old -> new` for the fields that matter and differ between two flat configs."""
    return [
        f"{path or 'config'}: {old.get(path, '(absent)')} -> {new.get(path, '(absent)')}"
        for path in [*old, *(path for path in new if path not in old)]
        if old.get(path) != new.get(path) and not is_neutral(path)
    ]


def check_path(config: Any, path: str) -> None:
    """ValueError naming the allowed fields unless `path` (`model.phases[0].steps`) exists."""
    value, done = config, ""
    for part in path.split("."):
        name, *indices = part.replace("]", "").split("[")
        if dataclasses.is_dataclass(value):
            allowed = [field.name for field in dataclasses.fields(value)]
        elif isinstance(value, dict):
            allowed = list(value)
        else:
            raise ValueError(f"--config.{path}: {done} is {value!r} and has no field {name!r}")
        if name not in allowed:
            raise ValueError(
                f"--config.{path}: {type(value).__name__} has no field {name!r}; "
                f"allowed are {', '.join(sorted(allowed))}"
            )
        value = value[name] if isinstance(value, dict) else getattr(value, name)
        done = f"{done}.{name}" if done else name
        for index in indices:
            if not isinstance(value, tuple | list) or not index.lstrip("-").isdigit():
                raise ValueError(f"--config.{path}: {done} is not a tuple with item [{index}]")
            if not -len(value) <= int(index) < len(value):
                raise ValueError(f"--config.{path}: {done} has {len(value)} items, no [{index}]")
            value, done = value[int(index)], f"{done}[{index}]"
        if value is None:
            return  # an optional config; its fields are checked when it is built


def select_run(runs: tuple[Callable[[], Any], ...], run: str) -> Any:
    """The config that the function named `run` returns; ValueError listing the runs if unknown."""
    by_name = {function.__name__: function for function in runs}
    if run not in by_name:
        raise ValueError(f"unknown run {run!r}; the runs are {', '.join(by_name)}")
    return by_name[run]()


def replace_seeds(config: Any, seed: int) -> Any:
    """A copy of an experiment with every field named `seed` set, model configs left alone."""
    if isinstance(config, tuple):
        return tuple(replace_seeds(item, seed) for item in config)
    if not dataclasses.is_dataclass(config) or _is_model_config(config):
        return config
    values = {
        field.name: seed
        if field.name == "seed"
        else replace_seeds(getattr(config, field.name), seed)
        for field in dataclasses.fields(config)
    }
    return dataclasses.replace(config, **values)


def _is_model_config(config: Any) -> bool:
    # A seed of a model (of its hash functions, say) is part of the method, not of the repetition.
    from blt_jax.layers.model import ModelConfig

    return isinstance(config, ModelConfig)
