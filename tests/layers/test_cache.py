import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.layers import cache as caches
from blt_jax.layers.attention import dense_causal_attention
from blt_jax.layers.cache import LayerCache, StepCache
from blt_jax.layers.step import attend_slots

L, B, G, K = 2, 3, 2, 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(caches, "FIRST_CHUNK", 3)  # several chunks


def key_values(length, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, L, B, length, G, K))


def joined(chunks):
    """[B, G, S, K] of the chunks of a layer."""
    return jnp.concatenate(chunks, axis=2)


def written(key, value, lengths, slots):
    """The cache as single writes make it."""
    cache = StepCache.create(L, B, G, slots, K, jnp.float32)
    for t in range(int(max(lengths))):
        active = jnp.array([t < n for n in lengths])
        slot = cache.next_slot(active)
        layers = [
            layer.write(key[i, :, t], value[i, :, t], slot) for i, layer in enumerate(cache.layers)
        ]
        cache = StepCache(tuple(layers), cache.lengths + active.astype(jnp.int32))
    return cache


@pytest.mark.parametrize("slots", [4, 7, 16])
def test_prefill_equals_writes(slots):
    key, value = key_values(9)
    lengths = [9, 4, 1]
    cache = StepCache.from_prefill(key, value, jnp.array(lengths), slots, jnp.float32)
    other = written(key, value, lengths, slots)
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    assert cache.slots == slots and joined(cache.layers[1].key).shape == (B, G, slots, K)


def test_slot_of_a_position():
    key, value = key_values(9)
    cache = StepCache.from_prefill(key, value, jnp.array([9, 4, 1]), 4, jnp.float32)
    for position in (5, 6, 7, 8):
        for layer in range(L):
            ours = cache.layers[layer]
            slot = position % 4
            np.testing.assert_array_equal(joined(ours.key)[0, :, slot], key[layer, 0, position])
            np.testing.assert_array_equal(joined(ours.value)[0, :, slot], value[layer, 0, position])
    np.testing.assert_array_equal(joined(cache.layers[0].key)[2, :, 1:], 0)


@pytest.mark.parametrize("slots", [7, 12])
def test_pinned_tokens_keep_the_first_slots(slots):
    key, value = key_values(2 + 9)
    lengths = jnp.array([9, 4, 1])
    cache = StepCache.from_prefill(key, value, lengths, slots, jnp.float32, pinned=2)
    ring = StepCache.from_prefill(key[:, :, 2:], value[:, :, 2:], lengths, slots - 2, jnp.float32)
    for layer, (ours, rest) in enumerate(zip(cache.layers, ring.layers, strict=True)):
        pinned = jnp.swapaxes(key[layer, :, :2], 1, 2)
        expected = jnp.concatenate([pinned, joined(rest.key)], axis=2)
        np.testing.assert_array_equal(joined(ours.key), expected)
    np.testing.assert_array_equal(cache.lengths, ring.lengths)
    np.testing.assert_array_equal(cache.next_slot(), 2 + ring.next_slot())


@pytest.mark.parametrize("pinned", [0, 2])
@pytest.mark.parametrize("slots", [5, 16])
def test_distance_to_the_token_in_every_slot(pinned, slots):
    lengths, ring = [0, 1, 4, 9], slots - pinned
    cache = StepCache.create(1, 4, G, slots, K, jnp.float32)
    cache = cache.replace(lengths=jnp.array(lengths), pinned=pinned)
    found = np.asarray(cache.distances())
    for row, length in enumerate(lengths):
        at = pinned + length  # of the next token, the pinned ones counted
        np.testing.assert_array_equal(found[row, :pinned], at - np.arange(pinned))
        for position in range(max(0, length - ring + 1), length + 1):
            assert found[row, pinned + position % ring] == length - position
    np.testing.assert_array_equal(cache.distances(jnp.array([3, 1])), found[[3, 1]])


def test_some_rows_are_written():
    key, value = key_values(2)
    cache = LayerCache.create(B, G, 4, K, jnp.float32)
    rows, slot = jnp.array([2, 0, 3]), jnp.array([1, 3, 0])  # row 3 is beyond the cache
    new = cache.write(key[0, :, 0], value[0, :, 0], slot, rows)
    expected = np.zeros((B, G, 4, K), np.float32)
    expected[2, :, 1], expected[0, :, 3] = key[0, 0, 0], key[0, 1, 0]
    np.testing.assert_array_equal(joined(new.key), expected)


def test_take_rows():
    key, value = key_values(5)
    cache = StepCache.from_prefill(key, value, jnp.array([5, 4, 3]), 8, jnp.float32)
    rows = cache.take_rows(jnp.array([2, 2, 0, 1]))
    np.testing.assert_array_equal(rows.lengths, [3, 3, 5, 4])
    np.testing.assert_array_equal(joined(rows.layers[0].key)[2], joined(cache.layers[0].key)[0])
    np.testing.assert_array_equal(joined(rows.layers[1].value)[1], joined(cache.layers[1].value)[2])


def test_type():
    key, value = key_values(5)
    cache = StepCache.from_prefill(key, value, jnp.array([5, 4, 3]), 8, jnp.bfloat16)
    layer = cache.layers[0].write(key[0, :, 0], value[0, :, 0], cache.next_slot())
    assert {x.dtype for x in jax.tree.leaves(layer)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("window", [0, 4])
def test_attention_over_slots_equals_the_last_row_of_the_full_one(window):
    T, H = 10, 4
    q = jax.random.normal(jax.random.key(5), (B, T, H, K))
    key, value = key_values(T)
    segments = jnp.ones((B, T), jnp.int32)
    slots = window or T
    attend = jax.jit(attend_slots)
    full = dense_causal_attention(q, key[0], value[0], segments, window=window)
    for t in (0, 1, 3, 4, 5, 9):
        lengths = jnp.full(B, t + 1, jnp.int32)
        cache = LayerCache.from_rows(
            key[0, :, : t + 1], value[0, :, : t + 1], 0 * lengths, lengths, slots, jnp.float32
        )
        begin, end = 0 * lengths, jnp.minimum(lengths, slots)
        out = attend(q[:, t], cache, begin, end)
        np.testing.assert_allclose(out, full[:, t], atol=1e-5)
        rows = jnp.array([2, 0])
        some = attend(q[rows, t], cache, begin[:2], end[:2], rows)
        np.testing.assert_allclose(some, full[rows, t], atol=1e-5)
