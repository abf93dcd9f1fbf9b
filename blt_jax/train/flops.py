"""Model FLOPs: peaks of devices, utilisation, and a count over a program's jaxpr."""

import math
from collections.abc import Callable

import jax

# Dense bfloat16 FLOPs per second of one jax device (v2 and v3: one of two cores of a chip;
# V100 and T4: float16), from the makers' data sheets. Matched by the longest prefix.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOPs per second of a device of this kind, None if the kind is not in the table."""
    fitting = [name for name in PEAK_FLOPS if device_kind.lower().startswith(name.lower())]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def utilization(flops: float, seconds: float, devices: list) -> float | None:
    """Model FLOPs utilisation of `devices` for `flops` in `seconds`, None if unknown."""
    peak = peak_flops(devices[0].device_kind)
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * peak * len(devices))


def count_flops(function: Callable, *args, while_trips: int | None = None) -> float:
    """FLOPs of the matrix products and convolutions of `function(*args)` (arrays or shapes).

    A scan counts its body times its length, a cond its largest branch, a `shard_map` body once
    per device, a Pallas call its own cost estimate. Loops of unknown length need `while_trips`;
    without it they raise ValueError, as does a Pallas call without an estimate.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, while_trips)


def _dot_general(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_features


def _ragged_dot(eqn) -> float:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contracted), (_, rhs_batch) = numbers.dot_dimension_numbers
    skipped = {*rhs_contracted, *rhs_batch, *numbers.rhs_group_dimensions}
    lhs, rhs = (variable.aval.shape for variable in eqn.invars[:2])
    return 2.0 * math.prod(lhs) * math.prod(s for i, s in enumerate(rhs) if i not in skipped)


def _inner(params) -> list:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _count(jaxpr, while_trips: int | None) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot_general(eqn)
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "ragged_dot_general":
            total += _ragged_dot(eqn)
        elif name == "pallas_call":
            estimate = eqn.params.get("cost_estimate")
            if estimate is None:
                raise ValueError(f"Pallas call {eqn.params.get('name')} has no cost_estimate")
            total += estimate.flops
        else:
            inner = [_count(body, while_trips) for body in _inner(eqn.params)]
            if name == "scan":
                total += eqn.params["length"] * sum(inner)
            elif name == "while":
                if while_trips is None and sum(inner) > 0:
                    raise ValueError("a while loop of unknown length: give while_trips")
                total += (while_trips or 0) * sum(inner)
            elif name == "cond":
                total += max(inner, default=0.0)
            elif name == "shard_map":
                total += eqn.params["mesh"].size * sum(inner)
            else:
                total += sum(inner)
    return total
