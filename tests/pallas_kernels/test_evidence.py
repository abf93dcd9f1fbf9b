"""The counts of evidence.py beside those known by hand, and its compilers."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import evidence

F32 = 4  # bytes
M, K, N = 512, 384, 256
TILE = 128


def matmul_kernel(x_ref, y_ref, out_ref, sum_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)
    out_ref[...] = sum_ref[...]


def matmul(x, y, interpret=False):
    """Tiles of 128, the contracted axis innermost: x is read N/128 times, y M/128 times."""
    (m, k), n = x.shape, y.shape[1]
    grid = (pl.cdiv(m, TILE), pl.cdiv(n, TILE), pl.cdiv(k, TILE))
    return pl.pallas_call(
        matmul_kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((TILE, TILE), lambda i, j, k: (i, k)),
            pl.BlockSpec((TILE, TILE), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((TILE, TILE), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((TILE, TILE), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        cost_estimate=pl.CostEstimate(flops=2 * m * n * k, transcendentals=0, bytes_accessed=7),
        interpret=interpret,
    )(x, y)


def shapes(m=M, k=K, n=N):
    return jax.ShapeDtypeStruct((m, k), jnp.float32), jax.ShapeDtypeStruct((k, n), jnp.float32)


def test_matmul_computes_the_product():
    x, y = (np.random.default_rng(0).normal(size=s.shape).astype(np.float32) for s in shapes())
    np.testing.assert_allclose(matmul(x, y, interpret=True), x @ y, atol=1e-3)


def test_matmul_count():
    (call,) = evidence.kernel_traffic(matmul, *shapes())
    assert call.grid == (4, 2, 3)
    assert call.operands == (M * K * F32 * (N // TILE), K * N * F32 * (M // TILE))
    assert call.results == (M * N * F32,)  # its block index does not change along k
    assert call.declared == 7
    assert evidence.bytes_moved(matmul, *shapes()) == call.total
    assert evidence.ideal_bytes(matmul, *shapes()) == F32 * (M * K + K * N + M * N)


def test_matmul_flops():
    assert evidence.kernel_flops(matmul, *shapes()) == [2 * M * K * N]
    padded = evidence.kernel_flops(matmul, *shapes(m=300, k=TILE, n=TILE))
    assert padded == [2 * 3 * TILE * TILE * TILE]  # whole blocks


def products(x, counts, by_index=True):
    """In step s, counts[s] products of x[8, 128] with itself, none where the count is negative."""

    def kernel(counts_ref, x_ref, out_ref):
        count = counts_ref[pl.program_id(0)] if by_index else x_ref[0, 0].astype(jnp.int32)
        out_ref[...] = jnp.zeros_like(out_ref)

        @pl.when((count >= 0) & (pl.program_id(0) < pl.num_programs(0)))
        def _():
            @pl.loop(0, count)
            def _(_):
                out_ref[...] += jnp.dot(x_ref[...], x_ref[...].T)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(counts.shape[0],),
            in_specs=[pl.BlockSpec((8, 128), lambda s, counts: (0, 0))],
            out_specs=pl.BlockSpec((8, 8), lambda s, counts: (0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 8), x.dtype),
    )(counts, x)


def test_flops_follow_branches_and_loops():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    counts = np.array([3, 0, -5, 1], np.int32)
    assert evidence.kernel_flops(products, x, counts) == [4 * 2 * 8 * 8 * 128]
    with pytest.raises(ValueError, match="depends on what is not known"):
        evidence.kernel_flops(lambda *args: products(*args, by_index=False), x, counts)


def test_one_block_of_the_contracted_axis_is_kept():
    (call,) = evidence.kernel_traffic(matmul, *shapes(k=TILE))
    assert call.operands[0] == M * TILE * F32  # the same block for every j: read once


def test_blocks_are_clipped_to_the_array():
    (call,) = evidence.kernel_traffic(matmul, *shapes(m=300, k=TILE, n=TILE))
    assert call.operands[0] == 300 * TILE * F32
    assert call.results == (300 * TILE * F32,)


def test_calls_inside_calls_are_counted():
    def twice(x, y):
        def body(carry, _):
            return carry + jax.checkpoint(jax.jit(matmul))(x, y), None

        return jax.lax.scan(body, jnp.zeros((M, N)), length=5)[0]

    assert evidence.bytes_moved(twice, *shapes()) == 5 * evidence.bytes_moved(matmul, *shapes())


def gather_rows(x, index, steps):
    """x[R, 8, 128] -> the blocks that `index` names, `steps` of them."""
    return pl.pallas_call(
        lambda index_ref, x_ref, out_ref: out_ref.__setitem__(..., x_ref[...]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[pl.BlockSpec((None, 8, 128), lambda s, index: (index[s], 0, 0))],
            out_specs=pl.BlockSpec((None, 8, 128), lambda s, index: (s, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((index.shape[0], 8, 128), x.dtype),
    )(index, x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_prefetched_indices_and_grid_sizes(dynamic):
    def function(x, index, steps):
        return gather_rows(x, index + 1, steps - 1 if dynamic else index.shape[0])

    x = jax.ShapeDtypeStruct((9, 8, 128), jnp.bfloat16)
    index = np.array([0, 0, 3, 3, 0, 5], np.int32)
    block = 8 * 128 * 2
    (call,) = evidence.kernel_traffic(function, x, index, np.int32(5))
    steps = 4 if dynamic else 6
    assert call.grid == (steps,)
    assert call.operands == (index.nbytes, (2 if dynamic else 4) * block)
    assert call.results == (steps * block,)
    with pytest.raises(ValueError, match="without concrete values"):
        unknown = jax.ShapeDtypeStruct(index.shape, index.dtype)
        evidence.kernel_traffic(function, x, unknown, np.int32(5))


def test_what_cannot_be_counted_is_refused():
    def copy(x, **options):
        return pl.pallas_call(
            lambda x_ref, out_ref: None,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            **options,
        )(x)

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match="stays in HBM"):
        evidence.bytes_moved(lambda x: copy(x, in_specs=[pl.BlockSpec(memory_space=pl.ANY)]), x)
    with pytest.raises(NotImplementedError, match="only TPU kernels"):
        evidence.bytes_moved(lambda x: copy(x, compiler_params=plgpu.CompilerParams()), x)


@pytest.mark.parametrize("topology", evidence.TOPOLOGIES.values())
def test_compile_for_tpu(topology):
    text = evidence.compile_for_tpu(matmul, shapes(), topology).as_text()
    assert "tpu_custom_call" in text


def test_the_tpu_compiler_refuses_what_does_not_fit():
    def too_much(x):
        return pl.pallas_call(
            lambda x_ref, out_ref: out_ref.__setitem__(slice(0, 8), x_ref[:8]),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        )(x)

    with pytest.raises(Exception, match=r"(?i)vmem|memory"):
        evidence.compile_for_tpu(too_much, [jax.ShapeDtypeStruct((2**13, 2**13), jnp.float32)])


def test_lower_for_cuda():
    def double(x):
        return pl.pallas_call(
            lambda x_ref, out_ref: out_ref.__setitem__(..., 2 * x_ref[...]),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=1),
        )(x)

    lowering = evidence.lower_for_cuda(double, [jax.ShapeDtypeStruct((64,), jnp.float32)])
    assert lowering.kernels == ("__gpu$xla.gpu.triton",)
    assert lowering.size > 0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
