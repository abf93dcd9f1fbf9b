import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers.attention import cached_attention, dense_causal_attention
from blt_jax.layers.cache import KVCache

L, B, G, K = 2, 3, 2, 4


def key_values(length, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, L, B, length, G, K))


def appended(key, value, lengths, slots):
    """The cache as `lengths` single appends make it."""
    cache = KVCache.create(L, B, G, slots, K, jnp.float32)
    for t in range(int(max(lengths))):
        active = jnp.array([t < n for n in lengths])
        cache = cache.append(key[:, :, t : t + 1], value[:, :, t : t + 1], active)
    return cache


@pytest.mark.parametrize("slots", [4, 7, 16])
def test_prefill_equals_appends(slots):
    key, value = key_values(9)
    lengths = [9, 4, 1]
    cache = KVCache.from_prefill(key, value, jnp.array(lengths), slots, jnp.float32)
    other = appended(key, value, lengths, slots)
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    assert cache.key.shape == (L, B, G, slots, K) and cache.slots == slots
    np.testing.assert_array_equal(cache.valid().sum(1), [min(n, slots) for n in lengths])


def test_slot_of_a_position():
    key, value = key_values(9)
    cache = KVCache.from_prefill(key, value, jnp.array([9, 4, 1]), 4, jnp.float32)
    for position in (5, 6, 7, 8):
        np.testing.assert_array_equal(cache.key[:, 0, :, position % 4], key[:, 0, position])
        np.testing.assert_array_equal(cache.value[:, 0, :, position % 4], value[:, 0, position])
    np.testing.assert_array_equal(cache.key[:, 2, :, 1:], 0)


def test_take_rows():
    key, value = key_values(5)
    cache = KVCache.from_prefill(key, value, jnp.array([5, 4, 3]), 8, jnp.float32)
    rows = cache.take_rows(jnp.array([2, 2, 0, 1]))
    np.testing.assert_array_equal(rows.lengths, [3, 3, 5, 4])
    np.testing.assert_array_equal(rows.key[:, 2], cache.key[:, 0])
    np.testing.assert_array_equal(rows.value[:, 1], cache.value[:, 2])


def test_type():
    key, value = key_values(5)
    cache = KVCache.from_prefill(key, value, jnp.array([5, 4, 3]), 8, jnp.bfloat16)
    assert cache.key.dtype == jnp.bfloat16
    cache = cache.append(key[:, :, :1], value[:, :, :1])
    assert cache.value.dtype == jnp.bfloat16 and list(cache.lengths) == [6, 5, 4]


@pytest.mark.parametrize("window", [0, 4])
def test_cached_attention_equals_the_last_row_of_the_full_one(window):
    T, H = 10, 4
    q = jax.random.normal(jax.random.key(5), (B, T, H, K))
    key, value = key_values(T)
    slots = window or T
    segments = jnp.ones((B, T), jnp.int32)
    attend = jax.jit(cached_attention)
    for layer in range(L):
        full = dense_causal_attention(q, key[layer], value[layer], segments, window=window)
        for t in (1, 3, 4, 5, 9):
            past = KVCache.from_prefill(
                key[:, :, :t], value[:, :, :t], jnp.full(B, t), slots, jnp.float32
            )
            own = (x[layer, :, t : t + 1] for x in (key, value))
            out = attend(q[:, t : t + 1], *own, past, jnp.int32(layer))
            np.testing.assert_allclose(out[:, 0], full[:, t], atol=1e-5)


def test_an_empty_cache_shows_the_token_itself():
    cache = KVCache.create(L, B, G, 6, K, jnp.float32)
    key, value = key_values(1)
    q = jnp.ones((B, 1, 4, K))
    out = cached_attention(q, key[0], value[0], cache, jnp.int32(0))
    np.testing.assert_allclose(out, jnp.repeat(value[0], 2, axis=2), atol=1e-6)
