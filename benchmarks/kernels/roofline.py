"""The kernels on the shapes of published models, beside what this device can do.

bfloat16, forward and gradients in one call, the form that `implementation=None` picks. The device's
own rates are measured first: a copy of an array that fits no cache, and one large matrix product.
`of the device` is the time that the traffic (patch operations, recurrence: every argument, result
and gradient once) or the arithmetic (grouped products: 6 m k n) would take at those rates, over the
time measured; `over ragged_dot` the time of `jax.lax.ragged_dot` over ours. On a CPU the shapes are
16 times shorter: that checks the program and says nothing about a device.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.kernels import medians, with_gradients
from pallas_kernels.cema_scan import shapes as cema
from pallas_kernels.grouped_matmul import shapes as grouped
from pallas_kernels.patch_pool import shapes as patches

CPU_SCALE = 16


def rows() -> list[dict]:
    scale = CPU_SCALE if jax.default_backend() == "cpu" else 1
    bandwidth, rate = copy_bandwidth(2**29 // scale), matmul_rate(8192 // scale)
    table = [
        {"operation": "copy", "GB/s": bandwidth / 1e9},
        {"operation": "matrix product", "TFLOP/s": rate / 1e12},
    ]
    for shape in patches.TRAINING_SHAPES:
        for name, function, floats, ids in patch_cases(shape, scale):
            seconds = traffic(function, floats, ids) / bandwidth
            table.append(row(name, shape.name, timed(function, floats, ids), seconds))
    for shape in grouped.MODEL_SHAPES:
        table.append(grouped_row(shape, scale, rate))
    for name in ("megalodon_7b", "megalodon_7b_32k"):
        (shape,) = (s for s in cema.DEVICE_SHAPES if s.name == name)
        table.append(cema_row(shape, scale, bandwidth))
    return table


def row(operation: str, shape: str, ms: float, seconds: float) -> dict:
    return {"operation": operation, "shape": shape, "ms": ms, "of the device": 1e3 * seconds / ms}


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


def timed(function, floats, *others) -> float:
    """Milliseconds of a call with gradients."""
    call = with_gradients(function)
    return medians({"ours": lambda: call(floats, *others)})["ours"]


def traffic(function, floats, *others) -> float:
    """Bytes of the arguments, read by both passes, the result and its gradient, the gradients."""
    out, gradients = jax.eval_shape(with_gradients(function), floats, *others)
    arrays = [*floats, *floats, *gradients, out, out]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def patch_cases(shape: patches.Shape, scale: int):
    """(operation, function of (*floats, ids), floats, ids) of every patch operation."""
    shape = dataclasses.replace(
        shape, num_bytes=shape.num_bytes // scale, num_patches=shape.num_patches // scale
    )
    arguments = patches.make_arguments(shape)
    ids = jnp.asarray(arguments.patch_ids)

    def low(*arrays):
        return [jnp.asarray(x, jnp.bfloat16) for x in arrays]

    x = low(arguments.bytes_q.reshape(*ids.shape, -1))
    encoder = low(arguments.patches_q, arguments.bytes_key, arguments.bytes_value)
    decoder = low(arguments.bytes_q, arguments.patches_key, arguments.patches_value)
    for mode in ("max", "mean"):

        def pool(x, ids, mode=mode):
            return pallas_kernels.patch_pool(x, ids, shape.num_patches, mode)

        yield f"patch_pool {mode}", pool, x, ids
    yield "patch_attention", pallas_kernels.patch_attention, encoder, ids
    yield "patch_gather_attention", pallas_kernels.patch_gather_attention, decoder, ids


def grouped_row(shape: grouped.Shape, scale: int, rate: float) -> dict:
    shape = dataclasses.replace(shape, m=shape.m // scale, k=shape.k // scale, n=shape.n // scale)
    arguments = grouped.make_arguments(shape)
    lhs, rhs = (jnp.asarray(x, jnp.bfloat16) for x in (arguments.lhs, arguments.rhs))
    sizes = jnp.asarray(arguments.group_sizes)
    ours, ragged = with_gradients(pallas_kernels.gmm), with_gradients(jax.lax.ragged_dot)
    floats = (lhs, rhs)
    found = medians({"ours": lambda: ours(floats, sizes), "ragged": lambda: ragged(floats, sizes)})
    seconds = 6 * shape.m * shape.k * shape.n / rate
    result = row("gmm", shape.name, found["ours"], seconds)
    return result | {"over ragged_dot": found["ragged"] / found["ours"]}


def cema_row(shape: cema.Shape, scale: int, bandwidth: float) -> dict:
    shape = dataclasses.replace(shape, length=shape.length // scale, width=shape.width // scale)
    arguments = cema.make_arguments(shape)
    x = jnp.asarray(arguments.x, jnp.bfloat16)
    coefficients = [jnp.asarray(c) for c in arguments.coefficients]

    def scan(x, *coefficients):
        return pallas_kernels.cema_scan(x, *coefficients)[0]

    floats = (x, *coefficients)
    seconds = traffic(scan, floats) / bandwidth
    return row("cema_scan", shape.name, timed(scan, floats), seconds)
