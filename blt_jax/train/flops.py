"""Model FLOPs: peaks of devices, utilisation, and a count over a program's jaxpr."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device, from its maker's data sheet.

    flops: dense bfloat16 FLOPs per second. memory: bytes. bandwidth: of the memory, bytes per
    second. network: bytes per second over all links to other chips. 0: not known.
    """

    flops: float
    memory: float = 0.0
    bandwidth: float = 0.0
    network: float = 0.0


# By the whole name that jax gives a device: those of other cards, and of slices of a card (MIG),
# begin alike. v2 and v3: one of two cores of a chip; V100 and T4: float16.
CHIPS = {
    "TPU v2": Chip(22.5e12, 8e9, 350e9),
    "TPU v3": Chip(61.5e12, 16e9, 450e9),
    "TPU v4": Chip(275e12, 32e9, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1640e9, 448e9),
    "TPU v6e": Chip(918e12, 32e9, 1640e9, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 600e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 600e9),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9, 1555e9),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1935e9),
    "NVIDIA A10G": Chip(70e12, 24e9, 600e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 8000e9, 1800e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 900e9),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3900e9, 600e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 600e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 900e9),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4800e9, 900e9),
    "NVIDIA L4": Chip(121e12, 24e9, 300e9),
    "NVIDIA L40": Chip(181e12, 48e9, 864e9),
    "NVIDIA L40S": Chip(362e12, 48e9, 864e9),
    "Tesla T4": Chip(65e12, 16e9, 320e9),
    "Tesla V100-PCIE-16GB": Chip(112e12, 16e9, 900e9),
    "Tesla V100-PCIE-32GB": Chip(112e12, 32e9, 900e9),
    "Tesla V100-SXM2-16GB": Chip(125e12, 16e9, 900e9, 300e9),
    "Tesla V100-SXM2-32GB": Chip(125e12, 32e9, 900e9, 300e9),
}


def chip(device_kind: str) -> Chip | None:
    """The entry of a device of this kind, None if the kind is not in the table."""
    return CHIPS.get(device_kind)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOPs per second of a device of this kind, None if the kind is not in the table."""
    found = chip(device_kind)
    return found and found.flops


def unknown_device(device_kind: str) -> str:
    """What stands in place of a utilisation where the peak is not known."""
    return f"n/a: unknown device {device_kind}"


def utilization(flops: float, seconds: float, devices: list) -> float | None:
    """Model FLOPs utilisation of `devices` for `flops` in `seconds`, None if unknown."""
    peak = peak_flops(devices[0].device_kind)
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * peak * len(devices))


class UnknownLengthError(ValueError):
    """A program has a loop with matrix products whose length depends on data."""


def count_flops(
    function: Callable,
    *args,
    while_trips: int | None = None,
    kernel_flops: Callable[[Any], float] | None = None,
) -> float:
    """FLOPs of the matrix products and convolutions of `function(*args)` (arrays or shapes).

    A scan counts its body times its length, a cond its largest branch (a choice by platform: of
    those that can be counted), a `shard_map` body once per device, a Pallas call its own cost
    estimate. Loops of unknown length need `while_trips`; without it they raise UnknownLengthError.
    A Pallas call without an estimate raises ValueError, unless kernel_flops gives its FLOPs from
    the equation.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, while_trips, kernel_flops)


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


def _device_forms(eqn) -> list:
    """The jaxprs of the device forms of an operation of `pallas_kernels`, traced here."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
    return [jax.make_jaxpr(form)(*shapes).jaxpr for _, form in eqn.params["forms"]]


def _largest(bodies: list, by_platform: bool, count: Callable) -> float:
    """FLOPs of the largest of some branches; by platform: of those that can be counted."""
    found, errors = [], []
    for body in bodies:
        try:
            found.append(count(body))
        except ValueError as error:
            errors.append(error)
    if errors and not (by_platform and found):
        raise errors[0]
    return max(found, default=0.0)


def _count(jaxpr, while_trips: int | None, kernel_flops: Callable | None) -> float:
    count = functools.partial(_count, while_trips=while_trips, kernel_flops=kernel_flops)
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
            if estimate is not None:
                total += estimate.flops
            elif kernel_flops is not None:
                total += kernel_flops(eqn)
            else:
                raise ValueError(f"Pallas call {eqn.params.get('name')} has no cost_estimate")
        elif name == "cond":
            by_platform = eqn.params.get("branches_platforms") is not None
            total += _largest(_inner(eqn.params), by_platform, count)
        elif name == "by_platform":
            total += _largest(_inner(eqn.params) + _device_forms(eqn), True, count)
        else:
            inner = [count(body) for body in _inner(eqn.params)]
            if name == "scan":
                total += eqn.params["length"] * sum(inner)
            elif name == "while":
                if while_trips is None and sum(inner) > 0:
                    raise UnknownLengthError("a while loop of unknown length: give while_trips")
                total += (while_trips or 0) * sum(inner)
            elif name == "shard_map":
                total += eqn.params["mesh"].size * sum(inner)
            else:
                total += sum(inner)
    return total
