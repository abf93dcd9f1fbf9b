"""The patch kernels on devices that are not here: TPU compiles, CUDA lowering, bytes moved."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import evidence, gpu_evidence
from pallas_kernels.patch_pool import gpu, tpu
from pallas_kernels.patch_pool.rows import sorted_rows
from pallas_kernels.patch_pool.shapes import SHAPES, TRAINING_SHAPES, Shape, make_arguments

MODES = ("max", "mean", "sum", "min")
ALL_SHAPES = SHAPES + TRAINING_SHAPES
all_shapes = pytest.mark.parametrize("shape", ALL_SHAPES, ids=[s.name for s in ALL_SHAPES])
training_shapes = pytest.mark.parametrize(
    "shape", TRAINING_SHAPES, ids=[s.name for s in TRAINING_SHAPES]
)
THREE = [s for s in ALL_SHAPES if s.name in ("odd", "several_tiles", "blt_8b")]


def calls_of(module, shape, modes=None) -> dict:
    """name -> (function, arguments) of every kernel; only the rows of the bytes have values.

    Small shapes leave out the sum, a part of the mean, and the minimum, the maximum of -x.
    """
    modes = modes or (MODES if shape in TRAINING_SHAPES else MODES[:2])
    b, t, p, h = shape.rows, shape.num_bytes, shape.num_patches, shape.num_heads
    dtype = jnp.bfloat16 if shape in TRAINING_SHAPES else jnp.float32

    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    small = dataclasses.replace(shape, num_vectors=1, num_heads=1, head_dim=1)
    rows = sorted_rows(jnp.asarray(make_arguments(small).patch_ids), p)
    width = h * shape.head_dim
    x, pooled = array(b, t, width), array(b, p, width)
    calls = {}
    for mode in modes:
        extreme = mode in ("max", "min")
        weight = {"sum": None, "mean": array(b, p, dtype=jnp.float32)}.get(mode, pooled)
        calls[f"pool_forward {mode}"] = (
            lambda x, rows, mode=mode: module.pool_forward(x, rows, p, mode),
            (x, rows),
        )
        calls[f"pool_backward {mode}"] = (
            lambda *args, mode=mode: module.pool_backward(*args, mode),
            (x if extreme else None, pooled if extreme else None, weight, pooled, rows),
        )
    of_bytes = array(b, t, h, shape.head_dim)
    of_patches = array(b, p, shape.num_vectors, h, shape.head_dim)
    for side, q, key in (("patch", of_patches, of_bytes), ("gather", of_bytes, of_patches)):
        forward, backward = getattr(module, f"{side}_forward"), getattr(module, f"{side}_backward")
        lse = array(*q.shape[:-1], dtype=jnp.float32)
        calls[f"{side}_forward"] = (
            lambda *args, f=forward: f(*args, 0.1, dtype),
            (q, key, key, rows),
        )
        calls[f"{side}_backward"] = (
            lambda *args, f=backward: f(*args, 0.1, dtype),
            (q, key, key, rows, q, lse, q),
        )
    return calls


def all_at_once(calls):
    """One program of all calls, which compiles faster than one by one."""

    def run(arguments):
        functions = [function for function, _ in calls.values()]
        return [f(*args) for f, args in zip(functions, arguments, strict=True)]

    return run, [[args for _, args in calls.values()]]


@all_shapes
def test_tpu_compile(shape):
    calls = calls_of(tpu, shape)
    text = evidence.compile_for_tpu(*all_at_once(calls)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= len(calls)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("shape", THREE, ids=[s.name for s in THREE])
def test_tpu_compile_of_other_chips(shape, chip):
    calls = calls_of(tpu, shape, MODES[:2])
    evidence.compile_for_tpu(*all_at_once(calls), evidence.TOPOLOGIES[chip])


@all_shapes
def test_cuda_lowering(shape):
    calls = calls_of(gpu, shape)
    lowering = evidence.lower_for_cuda(*all_at_once(calls))
    assert lowering.kernels == ("__gpu$xla.gpu.triton",) * len(calls)


@all_shapes
def test_shared_memory(shape):
    function, arguments = all_at_once(calls_of(gpu, shape))
    bounds = gpu_evidence.shared_memory_bounds(function, *arguments)
    assert max(bounds) <= min(gpu_evidence.SHARED_MEMORY.values())


@pytest.mark.gpu_compiler
@pytest.mark.parametrize(
    ("capability", "shape"),
    [("9.0", shape) for shape in SHAPES]
    + [(capability, s) for capability in gpu_evidence.SHARED_MEMORY for s in TRAINING_SHAPES],
    ids=lambda x: getattr(x, "name", x),
)
def test_gpu_compile(gpu_compiler, capability, shape):
    kernels = gpu_evidence.compile_for_gpu(*all_at_once(calls_of(gpu, shape)), capability)
    assert all(kernel.fits and not kernel.spilled for kernel in kernels)


@all_shapes
def test_cost_estimates_equal_the_count(shape):
    for name, (function, args) in calls_of(tpu, shape).items():
        (call,) = evidence.kernel_traffic(function, *args)
        assert call.declared == call.total, name


@training_shapes
def test_bytes_near_the_ideal(shape):
    for name, (function, args) in calls_of(tpu, shape).items():
        moved = evidence.bytes_moved(function, *args)
        ideal = evidence.ideal_bytes(function, *args)
        # Ids are copied as int32 codes in place of int32 rows and booleans.
        assert 0.99 * ideal <= moved <= 1.01 * ideal, name


WIDE = "Q4_H32_K128"


def pooled_and_attended(name):
    """Values and gradients by the public operations, and their arguments as structs: windows and
    segments, many short rows, or vectors too wide for the largest tiles."""
    changes = {
        "window": dict(window=3),
        "segments": dict(window=2, segments=True),
        "many_rows": dict(rows=1024, num_bytes=64, num_patches=16, num_heads=1, head_dim=128),
        WIDE: dict(num_bytes=512, num_patches=128, num_vectors=4, num_heads=32, head_dim=128),
    }[name]
    small = dict(name=name, num_bytes=300, num_patches=80, num_heads=2, head_dim=64)
    shape = Shape(**{**small, **changes})
    b, t, p = shape.rows, shape.num_bytes, shape.num_patches
    of_bytes, of_patches = (b, t, shape.num_heads, shape.head_dim), (b, p, shape.num_vectors)
    of_patches += of_bytes[2:]
    ids = [(b, t), *([(b, t), (b, p)] if shape.segments else [])]
    ids = [jax.ShapeDtypeStruct(sizes, jnp.int32) for sizes in ids]

    def run(of_bytes, of_patches, ids):
        options = dict(window=shape.window)
        options |= dict(zip(("segment_ids", "patch_segment_ids"), ids[1:], strict=False))
        x = of_bytes.reshape(b, t, -1)
        outs = [pallas_kernels.patch_pool(x, ids[0], p, mode) for mode in MODES]
        attend, gather = pallas_kernels.patch_attention, pallas_kernels.patch_gather_attention
        outs.append(attend(of_patches, of_bytes, of_bytes, ids[0], **options))
        outs.append(gather(of_bytes, of_patches, of_patches, ids[0], **options))
        return outs

    def gradients(of_bytes, of_patches, ids):
        outs, vjp = jax.vjp(lambda *floats: run(*floats, ids), of_bytes, of_patches)
        return outs, vjp(outs)

    floats = [jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in (of_bytes, of_patches)]
    return gradients, [*floats, ids]


@pytest.mark.parametrize("name", ["window", "segments", "many_rows", WIDE])
def test_public_operations_compile_for_tpu(name):
    evidence.compile_for_tpu(*pooled_and_attended(name))


@pytest.mark.parametrize("name", ["window", "segments"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_public_operations_lower_for_cuda(name, dtype):
    function, (*floats, ids) = pooled_and_attended(name)
    floats = [jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for x in floats]
    # A mode and an attention each have a kernel forward and one backward.
    assert len(evidence.lower_for_cuda(function, [*floats, ids]).kernels) == 12


def test_kernels_compile_for_tpu_with_64_bit_integers():
    with jax.enable_x64(True):
        evidence.compile_for_tpu(*pooled_and_attended("segments"))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_none_takes_the_kernel_of_the_platform(platform):
    shape = next(s for s in SHAPES if s.name == "odd")
    arguments = make_arguments(shape)
    attend = functools.partial(pallas_kernels.patch_attention, patch_ids=arguments.patch_ids)

    def gradients(q, key, value):
        out, vjp = jax.vjp(attend, q, key, value)
        return vjp(out)

    arrays = (arguments.patches_q, arguments.bytes_key, arguments.bytes_value)
    if platform == "tpu":
        found = evidence.compile_for_tpu(gradients, arrays).as_text()
        assert found.count('custom_call_target="tpu_custom_call"') >= 2
    else:
        assert len(evidence.lower_for_cuda(gradients, arrays).kernels) == 2


def test_none_takes_xla_where_kernels_cannot_be_partitioned():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    x, ids = np.zeros((8, 4, 8), np.float32), np.zeros((8, 4), np.int32)

    def pool(x, ids):
        return pallas_kernels.patch_pool(x, ids, 2)

    def has_kernel(function):
        return "by_platform" in str(jax.make_jaxpr(function)(x, ids))

    assert has_kernel(pool)
    with jax.set_mesh(mesh):
        rows = jax.sharding.PartitionSpec("data")
        assert not has_kernel(pool)
        assert has_kernel(
            jax.shard_map(pool, in_specs=(rows, rows), out_specs=rows, check_vma=False)
        )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
