"""Steps over a plain transformer equal its full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding import decoder as decoder_module
from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.dist.sharding import init_params, param_shapes
from blt_jax.layers import cache as caches
from blt_jax.layers import step as layer_step
from blt_jax.layers.transformer import PositionEncoding, Softmax
from blt_jax.models import llama3
from tests.decoding import decoders

ALIBI = {"position_encoding": PositionEncoding.ALIBI}
LEARNED_SINK = {"softmax": Softmax.LEARNED_SINK}


def build(capacity=40, sink_tokens=0, stack=(), **fields):
    """A decoder with random parameters; stack: fields of the TransformerConfig to change."""
    config = llama3.small(vocab_size=30, num_layers=2, d_model=24, num_heads=4, **fields)
    transformer = dataclasses.replace(config.transformer, **dict(stack))
    config = dataclasses.replace(config, transformer=transformer, sink_tokens=sink_tokens)
    params = init_params(config.build(), jax.random.key(1))
    attention = params["transformer"]["layers"]["attention"]
    if "sink" in attention:
        attention["sink"] = jax.random.normal(jax.random.key(5), attention["sink"].shape)
    return TransformerDecoder.create(config.build(), params, capacity)


@jax.jit
def steps(decoder, tokens, lengths):
    """Logits [B, N - 1, V] after each token from the second on, fed to the steps."""
    logits, cache = decoder.prefill(tokens[:, :4], lengths)
    decoder = decoder.prepare()

    def body(cache, index):
        token = tokens[jnp.arange(tokens.shape[0]), cache.lengths]
        logits, cache = decoder.step(token, cache)
        return cache, logits

    cache, rest = jax.lax.scan(body, cache, jnp.arange(tokens.shape[1] - 4))
    return cache, jnp.concatenate([logits[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_kv_heads": 2, "window": 6},
        {"num_kv_heads": 1, "tied_embeddings": True},
        {"window": 64},
        {"num_kv_heads": 2, "stack": ALIBI},
        {"window": 6, "stack": {"softmax": Softmax.OFF_BY_ONE}},
        {"sink_tokens": 2},
        {"sink_tokens": 3, "window": 5, "stack": ALIBI | LEARNED_SINK},
    ],
)
def test_prefill_and_steps_equal_the_full_pass(fields, monkeypatch):
    monkeypatch.setattr(caches, "FIRST_CHUNK", 5)  # several chunks, some of them skipped
    decoder = build(**fields)
    tokens = jax.random.randint(jax.random.key(2), (3, 30), 0, 30)
    lengths = jnp.asarray([1, 4, 2], jnp.int32)
    full = jax.jit(decoder.model.apply)({"params": decoder.params}, tokens).logits
    cache, logits = steps(decoder, tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = full[row, length - 1 : length + 26]
        np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(cache.lengths, lengths + 26)
    slots = fields.get("sink_tokens", 0) + min(fields.get("window") or 40, 40)
    assert cache.key_values.slots == slots


@jax.jit
def two_prompts_and_a_token(decoder, tokens, first, second):
    """Logits [B, V] after each of two prompts and after one more token."""
    row, decoder = jnp.arange(tokens.shape[0])[:, None], decoder.prepare()
    logits, cache = decoder.prefill(tokens[:, :4], first)
    after = [logits]
    rest = tokens[row, jnp.minimum(first[:, None] + jnp.arange(17)[None], tokens.shape[1] - 1)]
    logits, cache = decoder.extend(rest, second, cache)
    after.append(logits)
    logits, cache = decoder.step(tokens[row[:, 0], first + second], cache)
    return [*after, logits], cache.lengths


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_heads": 2},
        {"window": 6},
        {"sink_tokens": 3, "window": 5, "stack": ALIBI | LEARNED_SINK},
    ],
)
def test_a_prompt_after_a_prompt_equals_the_full_pass(fields, monkeypatch):
    """In pieces longer than the window, of which one row has a part and one nothing."""
    monkeypatch.setattr(caches, "FIRST_CHUNK", 5)
    monkeypatch.setattr(decoder_module, "PIECE", 9)
    decoder = build(**fields)
    tokens = jax.random.randint(jax.random.key(2), (3, 24), 0, 30)
    first, second = jnp.asarray([1, 4, 2], jnp.int32), jnp.asarray([17, 1, 11], jnp.int32)
    full = jax.jit(decoder.model.apply)({"params": decoder.params}, tokens).logits
    logits, lengths = two_prompts_and_a_token(decoder, tokens, first, second)
    for found, end in zip(logits, (first, first + second, first + second + 1), strict=True):
        np.testing.assert_allclose(found, full[jnp.arange(3), end - 1], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(lengths, first + second + 1)


def test_inactive_rows_keep_their_cache():
    decoder = build(window=3)
    tokens = jnp.asarray([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], jnp.int32)
    _, cache = jax.jit(TransformerDecoder.prefill)(decoder, tokens, jnp.asarray([5, 5]))
    step = jax.jit(TransformerDecoder.step)
    _, after = step(decoder, jnp.asarray([11, 12]), cache, jnp.asarray([True, False]))
    changed = [
        (np.asarray(a) != np.asarray(b)).any(axis=tuple(range(1, a.ndim)))
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True)
    ]
    assert all(row[0] for row in changed) and not any(row[1] for row in changed)


def test_take_rows():
    decoder = build()
    tokens = jnp.asarray([[1, 2, 3], [6, 7, 8]], jnp.int32)
    prefill, step = jax.jit(TransformerDecoder.prefill), jax.jit(TransformerDecoder.step)
    _, cache = prefill(decoder, tokens, jnp.asarray([3, 2]))
    logits, _ = step(decoder, jnp.asarray([4, 5]), cache)
    swapped, _ = step(decoder, jnp.asarray([5, 4, 5]), cache.take_rows(jnp.asarray([1, 0, 1])))
    np.testing.assert_allclose(swapped, logits[jnp.asarray([1, 0, 1])], atol=1e-6)


def test_chunks_double_and_end_at_the_slots(monkeypatch):
    monkeypatch.setattr(caches, "FIRST_CHUNK", 128)
    assert caches.chunk_sizes(100) == (100,)
    assert caches.chunk_sizes(128) == (128,)
    assert caches.chunk_sizes(129) == (129,)
    assert caches.chunk_sizes(512) == (128, 128, 256)
    assert caches.chunk_sizes(1500) == (128, 128, 256, 512, 476)


def test_a_full_row_is_an_error_outside_jit():
    decoder = build(capacity=4)
    _, cache = decoder.prefill(jnp.asarray([[1, 2, 3, 4]], jnp.int32), jnp.asarray([4]))
    with pytest.raises(ValueError, match="exceed capacity=4"):
        decoder.step(jnp.asarray([1]), cache)
    with pytest.raises(ValueError, match="exceed capacity=4"):
        decoder.prefill(jnp.ones((1, 5), jnp.int32), jnp.asarray([5]))
    one, many = jnp.ones((1, 1), jnp.int32), jnp.ones((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="4 tokens and 1 new ones exceed capacity=4"):
        decoder.extend(one, one[0], cache)
    with pytest.raises(ValueError, match=r"cache has \(rows, .* = \(1, .*: must be \(2, "):
        decoder.extend(many, many[:, 0], cache)
    with pytest.raises(ValueError, match=r" = \(1, 2, 4, .*: must be \(1, 2, 9, "):
        build(capacity=9).extend(one, one[0], cache)
    with pytest.raises(ValueError, match=r" = \(1, 2, 4, .*: must be \(1, 2, 9, "):
        build(capacity=9).step(one[0], cache)
    with pytest.raises(ValueError, match="capacity=0"):
        build(capacity=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_of_another_model_is_an_error(rows):
    one = jnp.ones((1, 1), jnp.int32)
    prompt = jnp.ones((rows, 2), jnp.int32), jnp.full((rows,), 2, jnp.int32)
    model = llama3.small(vocab_size=32, num_layers=1, d_model=16, num_heads=4, num_kv_heads=1)
    other = TransformerDecoder.create(
        model.build(), init_params(model.build(), jax.random.key(0)), decoders.CAPACITY
    )
    caches = {"llama": other.prefill(*prompt)[1]}
    texts = decoders.make("recompute", decoders.params_of("recompute"))
    texts = texts.replace(config=dataclasses.replace(texts.config, window=8))
    caches["recompute"] = texts.prefill(*prompt)[1]
    for name, message in (("llama", r"\(1, 1, 12, 2, 4, 0\)"), ("recompute", r"\(1, 4\)")):
        decoder = decoders.make(name, decoders.params_of(name))
        other_name = "recompute" if name == "llama" else "llama"
        for call in (
            lambda cache, decoder=decoder: decoder.step(one[0], cache),
            lambda cache, decoder=decoder: decoder.extend(one, one[0], cache),
        ):
            with pytest.raises(ValueError, match=f"cache has .*must be {message}"):
                call(caches[name])
            with pytest.raises(TypeError, match="Cache"):
                call(caches[other_name])


@pytest.mark.parametrize("name", decoders.NAMES)
def test_bad_ids_of_a_step_are_an_error_outside_jit(name):
    decoder = decoders.make(name, param_shapes(decoders.model_of(name)))
    V, prompts = decoder.vocab_size, jnp.ones((2, 3), jnp.int32)
    _, cache = jax.eval_shape(type(decoder).prefill, decoder, prompts, jnp.asarray([3, 2]))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"tokens hold ids .*{bad}.*must be 0..{V - 1}"):
            decoder.step(jnp.asarray([bad, 1]), cache)


def test_rows_that_are_not_active_may_hold_anything():
    tokens, lengths, active = (np.asarray(x) for x in ([-1, 3], [9, 8], [False, True]))
    layer_step.check_step(tokens, lengths, active, 9, 5)
    layer_step.check_step(tokens, lengths, np.asarray([False, False]), 9, 5)
    with pytest.raises(ValueError, match=r"ids -1..3: must be 0..4"):
        layer_step.check_step(tokens, lengths, None, 9, 5)
    with pytest.raises(ValueError, match="exceed capacity=9"):
        layer_step.check_step(tokens + 1, lengths, ~active, 9, 5)
