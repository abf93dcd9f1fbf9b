"""The TPU kernel of causal attention, its body run on CPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers import tpu_attention
from blt_jax.layers.attention import dense_causal_attention
from blt_jax.layers.tpu_attention import splash_attention, splash_flops
from blt_jax.train.flops import count_flops


def arrays(length=200, width=16, value_width=16):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, length, *shape)), jnp.float32)
        for shape in ((2, width), (1, width), (1, value_width))
    )
    segments = jnp.asarray(np.repeat([1, 2, 0], [70, length - 80, 10])[None], jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize(("window", "value_width"), [(0, 16), (40, 24)])
def test_values_and_gradients(window, value_width):
    q, k, v, segments = arrays(value_width=value_width)

    def kernel(q, k, v):
        return splash_attention(q, k, v, segments, window=window, scale=0.25, interpret=True)

    def dense(q, k, v):
        return dense_causal_attention(q, k, v, segments, window=window)

    found, found_vjp = jax.vjp(kernel, q, k, v)
    expected, expected_vjp = jax.vjp(dense, q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(found_vjp(expected), expected_vjp(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


def test_sink_logit():
    q, k, v, segments = arrays()
    sink = jnp.array([0.5, -1.0])

    def kernel(q, k, v, sink):
        options = dict(window=40, scale=0.25, sink=sink)
        return splash_attention(q, k, v, segments, interpret=True, **options)

    def dense(q, k, v, sink):
        return dense_causal_attention(q, k, v, segments, window=40, sink=sink)

    found, found_vjp = jax.vjp(kernel, q, k, v, sink)
    expected, expected_vjp = jax.vjp(dense, q, k, v, sink)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(found_vjp(expected), expected_vjp(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)


@pytest.mark.parametrize("value_width", [16, 48])
def test_flops_are_those_of_the_blocks_below_the_diagonal(value_width):
    q, k, v, segments = arrays(length=1024, value_width=value_width)

    def forward(q, k, v):
        return splash_attention(q, k, v, segments, window=0, scale=0.25).sum()

    # Two blocks of 512: three of the four pairs, two heads; of the nine products of the gradient
    # five are over the features of keys.
    pairs = 3 * 512**2 * 2 * 2
    forward_flops = count_flops(forward, q, k, v, kernel_flops=splash_flops)
    assert forward_flops == pairs * (16 + value_width)
    backward = count_flops(jax.grad(forward, (0, 1, 2)), q, k, v, kernel_flops=splash_flops)
    assert backward == pytest.approx(pairs * (5 * 16 + 4 * value_width), rel=1e-3)


def test_wide_heads_take_shorter_blocks():
    assert [tpu_attention._block(4096, width) for width in (256, 512, 768, 2304)] == [
        *(512, 512, 256, 128)
    ]
    assert tpu_attention._block(300, 256) == 128


def test_other_kernels_have_no_flops_here():
    call = types.SimpleNamespace(params={"name": "other"})
    with pytest.raises(ValueError, match="no splash kernel"):
        splash_flops(call)
