"""The TPU kernel of causal attention, its body run on CPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers.attention import dense_causal_attention
from blt_jax.layers.tpu_attention import splash_attention, splash_flops
from blt_jax.train.flops import count_flops


def arrays(length=200, width=16):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, length, heads, width)), jnp.float32) for heads in (2, 1, 1)
    )
    segments = jnp.asarray(np.repeat([1, 2, 0], [70, length - 80, 10])[None], jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize("window", [0, 40])
def test_values_and_gradients(window):
    q, k, v, segments = arrays()

    def kernel(q, k, v):
        return splash_attention(q, k, v, segments, window=window, scale=0.25, interpret=True)

    def dense(q, k, v):
        return dense_causal_attention(q, k, v, segments, window=window)

    found, found_vjp = jax.vjp(kernel, q, k, v)
    expected, expected_vjp = jax.vjp(dense, q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(found_vjp(expected), expected_vjp(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_flops_are_those_of_the_blocks_below_the_diagonal():
    q, k, v, segments = arrays(length=1024)

    def forward(q, k, v):
        return splash_attention(q, k, v, segments, window=0, scale=0.25).sum()

    # Two blocks of 512: three of the four pairs, two heads, two products (backward: seven more).
    pairs = 3 * 512**2 * 2 * 2 * 16
    assert count_flops(forward, q, k, v, kernel_flops=splash_flops) == 2 * pairs
    backward = count_flops(jax.grad(forward, (0, 1, 2)), q, k, v, kernel_flops=splash_flops)
    assert backward == pytest.approx((2 + 3 + 4) * pairs, rel=1e-3)


def test_other_kernels_have_no_flops_here():
    call = types.SimpleNamespace(params={"name": "other"})
    with pytest.raises(ValueError, match="no splash kernel"):
        splash_flops(call)
