"""The kernels on the shapes of published models, beside what this device can do.

bfloat16, the form that `implementation=None` picks; `forward` is the call alone, `training` the
call and its gradients. The device's own rates are measured first: a copy of an array that fits no
cache, one large matrix product, and multiplications with additions of float32 numbers in registers.
`of the device` is the time of our algorithms at these rates over the time measured: that of the
traffic (patch operations: what a pass reads and makes, each once, with what is kept for gradients;
ids aside), of the arithmetic (grouped products: 2 m k n forward, 4 more for gradients) or of the
larger of both (recurrence, token by token: 12 N operations per number of x forward, 33 more for
gradients). `over ragged_dot` is the time of `jax.lax.ragged_dot` over ours. On a CPU the shapes are
16 times shorter: that checks the program and says nothing about a device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.kernels import medians, with_gradients
from pallas_kernels.cema_scan import shapes as cema
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.patch_pool import shapes as patches

CPU_SCALE = 16


class Rates(NamedTuple):
    """Of this device: bytes per second of a copy, FLOPs per second of a matrix product in bfloat16
    and of float32 numbers one by one."""

    copy: float
    product: float
    float32: float


def rows(only: str = "") -> Iterator[dict]:
    chosen = [make for text, make in cases() if only in text]
    if not chosen:
        return
    scale = CPU_SCALE if jax.default_backend() == "cpu" else 1
    rates = Rates(
        copy_bandwidth(2**29 // scale), matmul_rate(8192 // scale), float32_rate(2**24 // scale)
    )
    yield {"operation": "copy", "GB/s": rates.copy / 1e9}
    yield {"operation": "matrix product", "TFLOP/s": rates.product / 1e12}
    yield {"operation": "float32", "TFLOP/s": rates.float32 / 1e12}
    for make in chosen:
        yield make(scale, rates)


def cases() -> Iterator[tuple[str, Callable[[int, Rates], dict]]]:
    """The texts "<operation> <shape>", and what makes the row of each."""
    for shape in patches.TRAINING_SHAPES:
        for operation in PATCH_PASSES:
            make = functools.partial(patch_row, operation, shape)
            yield f"{operation} {shape.name}", make
    for shape in grouped.MODEL_SHAPES:
        yield f"gmm {shape.name}", functools.partial(grouped_row, shape)
    for shape in cema.DEVICE_SHAPES:
        if shape.name in ("megalodon_7b", "megalodon_7b_32k"):
            yield f"cema_scan {shape.name}", functools.partial(cema_row, shape)


def row(operation: str, shape: str, runs, expected: tuple[float, float]) -> dict:
    """runs: calls "forward" and "training", and perhaps "<either> of <peer>", timed in turn;
    expected: seconds that our passes take at this device's rates."""
    found = medians(runs)
    result = {"operation": operation, "shape": shape}
    for name, seconds in zip(("forward", "training"), expected, strict=True):
        ms = found.pop(name)
        result |= {f"{name} ms": ms, f"{name} of the device": 1e3 * seconds / ms}
    for name, ms in found.items():
        ours, _, peer = name.partition(" of ")
        result[f"{ours} over {peer}"] = ms / result[f"{ours} ms"]
    return result


def copy_bandwidth(size: int) -> float:
    """Bytes per second read and written by a copy of `size` bfloat16 numbers."""
    x = jnp.ones((size,), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    return 2 * x.nbytes / (1e-3 * medians({"copy": lambda: copy(x)})["copy"])


def matmul_rate(size: int) -> float:
    """FLOPs per second of a square bfloat16 product."""
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / (1e-3 * medians({"product": lambda: product(x)})["product"])


def float32_rate(size: int, depth: int = 512) -> float:
    """FLOPs per second of multiplications with additions, `depth` of them per number read."""

    @jax.jit
    def run(x):
        y = x
        for _ in range(depth):
            y = y * x + x
        return y

    x = jnp.full((size,), 0.5, jnp.float32)
    return 2 * depth * size / (1e-3 * medians({"run": lambda: run(x)})["run"])


def nbytes(*arrays) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


class Passes(NamedTuple):
    """What the passes of an operation move besides arguments, result, its gradient and gradients:
    whether the backward pass reads the arguments and the result again, and how many arrays of the
    result's size are kept for it."""

    arguments: bool
    result: bool
    kept: int = 0


PATCH_PASSES = {
    "patch_pool max": Passes(True, True, kept=1),
    "patch_pool mean": Passes(False, False),
    "patch_attention": Passes(True, True),
    "patch_gather_attention": Passes(True, True),
}


def traffic(passes: Passes, floats, out) -> tuple[int, int]:
    """Bytes of the forward pass, and of both passes."""
    forward = nbytes(*floats) + nbytes(out)
    backward = nbytes(*floats) + nbytes(out)  # gradients, and the gradient of the result
    backward += passes.arguments * nbytes(*floats)
    backward += (passes.result + 2 * passes.kept) * nbytes(out)
    return forward, forward + backward


def patch_row(operation: str, shape: patches.Shape, scale: int, rates: Rates) -> dict:
    shape = dataclasses.replace(
        shape, num_bytes=shape.num_bytes // scale, num_patches=shape.num_patches // scale
    )
    a = patches.make_arguments(shape)
    name, _, mode = operation.partition(" ")
    if name == "patch_pool":
        floats = (a.bytes_q.reshape(*a.patch_ids.shape, -1),)
    elif name == "patch_attention":
        floats = a.patches_q, a.bytes_key, a.bytes_value
    else:
        floats = a.bytes_q, a.patches_key, a.patches_value
    floats = tuple(jnp.asarray(x, jnp.bfloat16) for x in floats)
    ids = jnp.asarray(a.patch_ids)

    def function(*floats_and_ids):
        if name == "patch_pool":
            return pallas_kernels.patch_pool(*floats_and_ids, shape.num_patches, mode)
        return getattr(pallas_kernels, name)(*floats_and_ids)

    forward, training = jax.jit(function), with_gradients(function)
    moved = traffic(PATCH_PASSES[operation], floats, jax.eval_shape(function, *floats, ids))
    return row(
        operation,
        shape.name,
        {"forward": lambda: forward(*floats, ids), "training": lambda: training(floats, ids)},
        tuple(size / rates.copy for size in moved),
    )


def grouped_row(shape: grouped.Shape, scale: int, rates: Rates) -> dict:
    shape = dataclasses.replace(shape, m=shape.m // scale, k=shape.k // scale, n=shape.n // scale)
    arguments = grouped.make_arguments(shape)
    floats = tuple(jnp.asarray(x, jnp.bfloat16) for x in (arguments.lhs, arguments.rhs))
    sizes = jnp.asarray(arguments.group_sizes)
    forward, training = jax.jit(pallas_kernels.gmm), with_gradients(pallas_kernels.gmm)
    ragged_forward, ragged = jax.jit(jax.lax.ragged_dot), with_gradients(jax.lax.ragged_dot)
    runs = {
        "forward": lambda: forward(*floats, sizes),
        "training": lambda: training(floats, sizes),
        "forward of ragged_dot": lambda: ragged_forward(*floats, sizes),
        "training of ragged_dot": lambda: ragged(floats, sizes),
    }
    seconds = 2 * shape.m * shape.k * shape.n / rates.product
    return row("gmm", shape.name, runs, (seconds, 3 * seconds))


def cema_row(shape: cema.Shape, scale: int, rates: Rates) -> dict:
    shape = dataclasses.replace(shape, length=shape.length // scale, width=shape.width // scale)
    arguments = cema.make_arguments(shape)
    x = jnp.asarray(arguments.x, jnp.bfloat16)
    coefficients = [jnp.asarray(c) for c in arguments.coefficients]

    def scan(x, *coefficients):
        return pallas_kernels.cema_scan(x, *coefficients)[0]

    floats = (x, *coefficients)
    forward, training = jax.jit(scan), with_gradients(scan)
    states = coefficients[0].shape[1]
    # The states that are kept for gradients are float32 and those of every 256th token.
    kept = 2 * (2 * states / 256) * 4 * x.size
    moved, moved_in_all = traffic(Passes(True, False), floats, x)
    arithmetic = states * x.size / rates.float32
    return row(
        "cema_scan",
        shape.name,
        {"forward": lambda: forward(*floats), "training": lambda: training(floats)},
        (
            max(moved / rates.copy, 12 * arithmetic),
            max((moved_in_all + kept) / rates.copy, 45 * arithmetic),
        ),
    )
