"""Causal attention divided over a mesh: by rows, heads, and pieces of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.attention import dense_causal_attention
from blt_jax.layers.sharded_attention import sharded_causal_attention

RULES = ShardingRules()
LENGTH = 64


def arrays(heads=4, kv_heads=2, length=LENGTH):
    rng = np.random.default_rng(0)

    def normal(n):
        return jnp.asarray(rng.normal(size=(2, length, n, 8)), jnp.float32)

    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
    segments[0, -5:] = 0
    return normal(heads), normal(kv_heads), normal(kv_heads), jnp.asarray(segments)


def with_gradients(attend, q, k, v, segments):
    out, vjp = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
    return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


def close(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "kv_heads", "window"),
    [
        (MeshConfig(context=8, data=1), 2, 0),
        (MeshConfig(context=4, data=2), 2, 0),
        (MeshConfig(context=4, data=1, tensor=2), 2, 7),
        (MeshConfig(context=4, data=1, tensor=2), 1, 16),
        (MeshConfig(context=8, data=1), 4, 20),
        (MeshConfig(data=2, tensor=4), 2, 0),
        (MeshConfig(data=2, fsdp=1, expert=4), 2, 9),
    ],
    ids=str,
)
def test_equals_one_device(config, kv_heads, window):
    arguments = arrays(kv_heads=kv_heads)

    def attend(*x):
        return sharded_causal_attention(*x, window=window, sharding=RULES)

    def dense(*x):
        return dense_causal_attention(*x, window=window)

    expected = with_gradients(dense, *arguments)
    with jax.set_mesh(make_mesh(config)):
        close(jax.jit(lambda *x: with_gradients(attend, *x))(*arguments), expected)


CUTS = (16, 11, 9, 16)
"""Tokens of a row of 52 in its four pieces of 16."""


def cut(x):
    """Rows of 52 laid into four pieces of 16, zeros between."""
    parts, at = [], 0
    for size in CUTS:
        pad = [(0, 0), (0, 16 - size)] + [(0, 0)] * (x.ndim - 2)
        parts.append(jnp.pad(x[:, at : at + size], pad))
        at += size
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 9])
def test_a_row_cut_into_pieces_equals_the_whole_row(context, window):
    arguments = arrays(length=sum(CUTS))

    def attend(*x):
        return sharded_causal_attention(*x, window=window, sharding=RULES, pieces=4)

    def dense(*x):
        return dense_causal_attention(*x, window=window)

    def cut_dense(q, k, v, segments):
        return cut(dense(q, k, v, segments))

    expected = jax.jit(lambda *x: with_gradients(cut_dense, *x))(*arguments)

    def run(*x):
        return with_gradients(lambda q, k, v, s: attend(*map(cut, (q, k, v, s))), *x)

    with jax.set_mesh(make_mesh(MeshConfig(context=context, data=1), jax.devices()[:context])):
        found = jax.jit(run)(*arguments)
    # What padding between the pieces gives has no meaning; the row has none there.
    real = cut(jnp.ones((2, sum(CUTS), 1, 1)))
    close((found[0] * real, *found[1:]), expected)


def test_errors():
    arguments = arrays()
    with pytest.raises(ValueError, match="window 17 is longer than a piece of 16 tokens"):
        sharded_causal_attention(*arguments, window=17, sharding=RULES, pieces=4)
    with pytest.raises(ValueError, match="64 cannot be divided into 3 pieces"):
        sharded_causal_attention(*arguments, window=4, sharding=RULES, pieces=3)
    mesh = make_mesh(MeshConfig(context=4, data=2))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"2 pieces .* over 4 devices"):
        sharded_causal_attention(*arguments, window=4, sharding=RULES, pieces=2)
