"""Values and gradients of every operation on this device, beside the plain reference in float32.

Every shape of every `shapes.py`, in the form that `implementation=None` takes for this device.
`value` and `gradients` (at the result as its own cotangent) are the largest difference over the
largest number expected, at least 1; `ok` says whether both are within `tolerance`. Shapes of models
have the dtype of their training and are as short as the reference must have them: at most 1024
tokens or 512 bytes, on a CPU 16 times narrower. float32 runs at the highest precision of products;
what a device makes of float32 by default is not checked.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.kernels import with_gradients
from pallas_kernels.cema_scan import shapes as cema
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.patch_pool import shapes as patches

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
MAX_TOKENS, MAX_BYTES = 1024, 512
PART = 2**24
CPU_SCALE = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation on one shape: function(*floats, implementation=...), differentiable in floats.

    dtype: that of the floats, or of the first where the others are parameters in float32.
    """

    operation: str
    shape: str
    dtype: str
    function: Callable[..., Any]
    floats: tuple[jax.Array, ...]


def rows(only: str = "") -> Iterator[dict]:
    for case in cases():
        if only in f"{case.operation} {case.shape}":
            yield checked(case)


def cases() -> Iterator[Case]:
    """All of them, each with its arguments made when it is its turn."""
    scale = CPU_SCALE if jax.default_backend() == "cpu" else 1
    for shape in patches.SHAPES:
        yield from patch_cases(shape, "float32")
    for shape in patches.TRAINING_SHAPES:
        yield from patch_cases(shortened(shape, scale), "bfloat16")
    for shape in grouped.SHAPES:
        yield from grouped_cases(shape, "float32")
    for shape in grouped.MODEL_SHAPES:
        narrow = {axis: getattr(shape, axis) // scale for axis in ("m", "k", "n")}
        yield from grouped_cases(dataclasses.replace(shape, **narrow), "bfloat16")
    for shape in cema.SHAPES:
        yield cema_case(shape)
    for shape in cema.DEVICE_SHAPES:
        short = min(shape.length, MAX_TOKENS)
        yield cema_case(dataclasses.replace(shape, length=short, width=shape.width // scale))


def checked(case: Case) -> dict:
    """The row of a case. What the device's compiler refuses is a failure with its message."""
    row = {"operation": case.operation, "shape": case.shape, "dtype": case.dtype}
    tolerance = TOLERANCES[case.dtype]
    reference, default = (
        with_gradients(functools.partial(case.function, implementation=name))
        for name in ("reference", None)
    )
    precise = jax.default_matmul_precision("highest")
    try:
        expected = reference(tuple(x.astype(jnp.float32) for x in case.floats))
        with precise if case.dtype == "float32" else contextlib.nullcontext():
            found = jax.block_until_ready(default(case.floats))
    except Exception as error:
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    value, gradients = (difference(*pair) for pair in zip(found, expected, strict=True))
    ok = bool(value <= tolerance and gradients <= tolerance)
    return row | {"value": value, "gradients": gradients, "tolerance": tolerance, "ok": ok}


def difference(found: Any, expected: Any) -> float:
    """The largest over all arrays; NaN where an array holds one."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return float(np.max([_difference(*pair) for pair in pairs]))


def _difference(found, expected) -> float:
    """In parts: the gradients of a large mixture of experts take 8 bytes a number otherwise."""
    found, expected = (np.asarray(x).reshape(-1) for x in (found, expected))
    apart, largest = [], [1.0]
    for start in range(0, len(found), PART):
        part, expected_part = (
            x[start : start + PART].astype(np.float64) for x in (found, expected)
        )
        apart.append(np.abs(part - expected_part).max())
        largest.append(np.abs(expected_part).max())
    return np.max(apart) / np.max(largest)


def shortened(shape: patches.Shape, scale: int) -> patches.Shape:
    ratio = shape.num_bytes / MAX_BYTES
    heads = max(shape.num_heads // scale, 1)
    patch_count = int(shape.num_patches / ratio)
    return dataclasses.replace(shape, num_bytes=MAX_BYTES, num_patches=patch_count, num_heads=heads)


def arrays(dtype: str, *floats: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, dtype) for x in floats)


def patch_cases(shape: patches.Shape, dtype: str) -> Iterator[Case]:
    a = patches.make_arguments(shape)
    ids = jnp.asarray(a.patch_ids)
    x = a.bytes_q.reshape(*ids.shape, -1)
    for mode in ("max", "mean", "sum", "min"):

        def pool(x, implementation, mode=mode):
            return pallas_kernels.patch_pool(x, ids, shape.num_patches, mode, implementation)

        yield Case(f"patch_pool {mode}", shape.name, dtype, pool, arrays(dtype, x))
    options = dict(
        patch_ids=ids,
        window=shape.window,
        segment_ids=a.segment_ids,
        patch_segment_ids=a.patch_segment_ids,
    )
    encoder = (a.patches_q, a.bytes_key, a.bytes_value)
    decoder = (a.bytes_q, a.patches_key, a.patches_value)
    for operation, floats in (("patch_attention", encoder), ("patch_gather_attention", decoder)):
        function = functools.partial(getattr(pallas_kernels, operation), **options)
        yield Case(operation, shape.name, dtype, function, arrays(dtype, *floats))


def grouped_cases(shape: grouped.Shape, dtype: str) -> Iterator[Case]:
    a = grouped.make_arguments(shape)
    options = dict(group_sizes=jnp.asarray(a.group_sizes))
    if shape.local:
        options["group_offset"] = np.int32(shape.offset)
    gmm = functools.partial(pallas_kernels.gmm, **options)
    tgmm = functools.partial(pallas_kernels.tgmm, **options, num_local_groups=shape.local_groups)
    rhs = a.rhs / np.float32(shape.k**0.5)  # so that the gate does not saturate
    both = np.concatenate([rhs, -rhs], axis=2)
    yield Case("gmm", shape.name, dtype, gmm, arrays(dtype, a.lhs, rhs))
    yield Case("tgmm", shape.name, dtype, tgmm, arrays(dtype, a.lhs, a.dout))
    swiglu = functools.partial(gmm, activation="swiglu")
    yield Case("gmm swiglu", shape.name, dtype, swiglu, arrays(dtype, a.lhs, both))


def cema_case(shape: cema.Shape) -> Case:
    a = cema.make_arguments(shape)

    def scan(x, *others, implementation):
        coefficients, state = others[:5], others[5:]
        return pallas_kernels.cema_scan(
            x, *coefficients, state, a.reset, implementation=implementation
        )

    parameters = arrays("float32", *a.coefficients, *a.state)
    floats = (*arrays(shape.dtype, a.x), *parameters)
    return Case("cema_scan", shape.name, shape.dtype, scan, floats)
