"""The needs of Triton kernels beside those known by hand, and beside the compiler's."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu_evidence

M, K, N, STEP = 128, 256, 64, 64
SHAPES = jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), jnp.bfloat16)
OPERANDS = (M * STEP + STEP * N) * 2  # bytes of one step


def matmul(x, y, stages=3, steps=K // STEP, interpret=False):
    """One program; the contracted axis in a loop, or all at once with steps=1."""
    step = x.shape[1] // steps

    def kernel(x_ref, y_ref, out_ref):
        def add(i, total):
            at = pl.ds(i * step, step)
            return total + plgpu.dot(x_ref[:, at], y_ref[at]).astype(jnp.float32)

        zeros = jnp.zeros(out_ref.shape, jnp.float32)
        out_ref[...] = add(0, zeros) if steps == 1 else jax.lax.fori_loop(0, steps, add, zeros)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="matmul",
    )(x, y)


def test_matmul_computes_the_product():
    x, y = (np.random.default_rng(0).normal(size=s.shape).astype(np.float32) for s in SHAPES)
    np.testing.assert_allclose(matmul(x, y, interpret=True), x @ y, atol=1e-3)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_operands_of_a_loop_are_staged(stages):
    bounds = gpu_evidence.shared_memory_bounds(lambda x, y: matmul(x, y, stages), *SHAPES)
    assert bounds == [stages * OPERANDS]


def test_operands_outside_a_loop_are_there_once():
    bounds = gpu_evidence.shared_memory_bounds(lambda x, y: matmul(x, y, steps=1), *SHAPES)
    assert bounds == [(M * K + K * N) * 2]


def test_kernels_inside_calls_are_found():
    def twice(x, y):
        body = jax.checkpoint(jax.jit(matmul))
        return jax.lax.scan(lambda c, _: (c + body(x, y), None), jnp.zeros((M, N)), length=2)[0]

    assert gpu_evidence.shared_memory_bounds(twice, *SHAPES) == [3 * OPERANDS]


def test_without_products_the_largest_array_counts():
    def total(x):
        return pl.pallas_call(
            lambda x_ref, out_ref: out_ref.__setitem__(..., x_ref[...].sum(axis=1)),
            out_shape=jax.ShapeDtypeStruct((64,), jnp.float32),
            compiler_params=plgpu.CompilerParams(),
        )(x)

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    assert gpu_evidence.shared_memory_bounds(total, x) == [64 * 32 * 4]


def test_tpu_kernels_are_refused():
    def copy(x):
        return pl.pallas_call(lambda x_ref, out_ref: None, out_shape=x, name="copy")(x)

    with pytest.raises(NotImplementedError, match="copy: only Triton kernels"):
        gpu_evidence.shared_memory_bounds(copy, jnp.zeros((8, 128)))


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("capability", gpu_evidence.SHARED_MEMORY)
def test_the_compiler_agrees(gpu_compiler, capability):
    (kernel,) = gpu_evidence.compile_for_gpu(matmul, SHAPES, capability)
    (bound,) = gpu_evidence.shared_memory_bounds(matmul, *SHAPES)
    assert kernel.name == "matmul" and kernel.fits and kernel.registers > 0
    # Before Hopper the last stage goes straight to registers; from 10.0 on there are barriers.
    assert OPERANDS <= kernel.shared_memory <= bound + 64


@pytest.mark.gpu_compiler
def test_the_compiler_finds_what_does_not_fit(gpu_compiler):
    (kernel,) = gpu_evidence.compile_for_gpu(lambda x, y: matmul(x, y, 12), SHAPES, "9.0")
    assert not kernel.fits


def test_unknown_capabilities():
    with pytest.raises(ValueError, match=r"capability='7\.5' is unknown; allowed are '8\.0'"):
        gpu_evidence.compile_for_gpu(matmul, SHAPES, "7.5")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
