"""Reading a foreign configuration so that nothing in it is ignored by accident."""

import dataclasses
import json
import pathlib
from typing import Any

from blt_jax.layers.rope import RopeConfig, RopeLayout


class ForeignConfig:
    """Attributes of a JSON object, each of which must be taken or known to be harmless.

    Use as a context manager: leaving it raises ValueError naming every attribute nobody looked at.
    """

    def __init__(self, where: str, attributes: dict[str, Any]):
        if not isinstance(attributes, dict):
            raise ValueError(f"{where}: expected a JSON object, got {attributes!r}")
        self.where = where
        self._attributes = dict(attributes)
        self._seen: set[str] = set()

    def __enter__(self) -> "ForeignConfig":
        return self

    def __exit__(self, kind, error, trace) -> None:
        unknown = {k: v for k, v in self._attributes.items() if k not in self._seen}
        if unknown and error is None:
            raise ValueError(f"{self.where}: unknown attributes {unknown}")

    def __contains__(self, name: str) -> bool:
        return self._attributes.get(name) is not None

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The attribute, checked against `kind`; null and absence give the default."""
        self._seen.add(name)
        value = self._attributes.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.where}: attribute {name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            names = [k.__name__ for k in wanted]
            raise ValueError(f"{self.where}: {name}={value!r} must be of type {names}")
        return value

    def require(self, **allowed: Any) -> None:
        """Attributes that must be absent, null or equal to the only value supported here."""
        for name, value in allowed.items():
            found = self._attributes.get(name)
            self._seen.add(name)
            if found is not None and found != value:
                raise ValueError(f"{self.where}: {name}={found!r} is not supported, only {value!r}")

    def ignore(self, *names: str) -> None:
        """Attributes without influence on the values of a forward pass."""
        self._seen.update(names)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; FileNotFoundError or ValueError name the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def read_rope(config: ForeignConfig, default_theta: float, layout: RopeLayout) -> RopeConfig:
    """RopeConfig from `rope_parameters`, or from `rope_theta` and `rope_scaling`, its older form.

    Raises ValueError for a scaling other than `llama3`, an incomplete one, and for both forms when
    they disagree.
    """
    old_theta = config.take("rope_theta", float, None)
    old = config.take("rope_scaling", dict, None)
    new = config.take("rope_parameters", dict, None)
    forms = []
    if new is not None:
        forms.append(_rope(config.where + ".rope_parameters", new, default_theta, layout))
    if old is not None or (old_theta is not None and new is None):
        scaling = {"rope_theta": old_theta or default_theta} | (old or {})
        forms.append(_rope(config.where + ".rope_scaling", scaling, default_theta, layout))
    if not forms:
        return RopeConfig(theta=default_theta, layout=layout)
    different_theta = old_theta is not None and old_theta != forms[0].theta
    if different_theta or any(form != forms[0] for form in forms):
        raise ValueError(
            f"{config.where}: rope_parameters={new} contradicts rope_theta={old_theta}, "
            f"rope_scaling={old}"
        )
    return forms[0]


def _rope(where: str, attributes: dict, default_theta: float, layout: RopeLayout) -> RopeConfig:
    with ForeignConfig(where, attributes) as rope:
        theta = rope.take("rope_theta", float, default_theta)
        kind = rope.take("rope_type", str, rope.take("type", str, "default"))
        result = RopeConfig(theta=theta, layout=layout)
        if kind == "llama3":
            result = dataclasses.replace(
                result,
                scaling_factor=rope.take("factor", float),
                low_freq_factor=rope.take("low_freq_factor", float),
                high_freq_factor=rope.take("high_freq_factor", float),
                original_max_positions=rope.take("original_max_position_embeddings", int),
            )
        elif kind != "default":
            raise ValueError(f"{where}: rope_type={kind!r}: allowed are 'default' and 'llama3'")
        rope.require(partial_rotary_factor=1.0)
    return result


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the form that old and new releases of transformers read."""
    scaling = None
    if rope.scaling_factor != 1:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling_factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
