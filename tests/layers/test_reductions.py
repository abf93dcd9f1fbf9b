"""Sums of products over the last axis against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers.reductions import drop_unit_axes, group_sums, inner

SHAPES = [(3, 4, 5), (1, 7, 8), (2, 1, 3, 16), (1, 1, 6), (9,), (0, 4), (5, 32, 8), (2, 22, 3)]


def rows(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradients(shape):
    x, y = rows(shape, 0), rows(shape, 1)
    truth = (x.astype(np.float64) * y).sum(-1)
    np.testing.assert_allclose(inner(jnp.asarray(x), jnp.asarray(y)), truth, atol=1e-5)
    dx, dy = jax.grad(lambda *pair: inner(*pair).sum(), (0, 1))(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(dx, y)
    np.testing.assert_array_equal(dy, x)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_sums_over_groups(shape, jit):
    x, weights = rows(shape, 0), rows(shape[:-1], 1)
    truth = x.astype(np.float64).sum(-1)
    np.testing.assert_allclose(jit(group_sums)(jnp.asarray(x)), truth, rtol=1e-6, atol=1e-5)
    gradient = jit(jax.grad(lambda x: (weights * group_sums(x)).sum()))(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, np.broadcast_to(weights[..., None], shape))


def test_unit_axes_go_but_for_the_last():
    assert drop_unit_axes(jnp.zeros((1, 3, 1, 1))).shape == (3, 1)
    assert drop_unit_axes(jnp.zeros((1, 1, 5))).shape == (5,)
