"""Streaming with a state of constant size equals the full forward pass, however it is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.dist.sharding import init_params
from blt_jax.models import megalodon
from blt_jax.models.megalodon_decode import MegalodonDecoder

CONFIG = megalodon.small(
    vocab_size=30,
    num_layers=1,
    d_model=16,
    chunk_size=8,
    norm_groups=4,
    num_heads=2,
    qk_dim=8,
    value_dim=12,
    mlp_dim=16,
    state_size=3,
    scan_form=megalodon.ScanForm.REFERENCE,  # compiles fastest
)
LENGTH = 30


@functools.cache
def decoder_of(**changes):
    model = dataclasses.replace(CONFIG, **changes).build()
    return MegalodonDecoder.create(model, init_params(model, jax.random.key(1)))


def tokens_of(rows=3, length=LENGTH):
    return jax.random.randint(jax.random.key(2), (rows, length), 0, 30, jnp.int32)


@functools.cache
def full_logits(**changes):
    decoder = decoder_of(**changes)
    return jax.jit(decoder.model.apply)({"params": decoder.params}, tokens_of()).logits


@jax.jit
def prefill_and_steps(decoder, tokens, lengths):
    logits, cache = decoder.prefill(tokens[:, :10], lengths)
    decoder = decoder.prepare()

    def body(cache, _):
        token = tokens[jnp.arange(tokens.shape[0]), cache.lengths]
        logits, cache = decoder.step(token, cache)
        return cache, logits

    cache, rest = jax.lax.scan(body, cache, length=LENGTH - 10)
    return cache, jnp.concatenate([logits[:, None], jnp.swapaxes(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "prior_count": 3, "scale_embeddings": True},
        {"attention_window": 5},
        {"gate": megalodon.GateKind.MEGA, "attention": megalodon.AttentionKind.LAPLACE},
        {"ema": megalodon.EmaKind.NONE, "norm": megalodon.NormKind.LAYER},
    ],
)
def test_prefill_and_steps_equal_the_full_pass(options):
    lengths = jnp.asarray([1, 9, 10], jnp.int32)
    cache, logits = prefill_and_steps(decoder_of(**options), tokens_of(), lengths)
    full = full_logits(**options)
    for row, length in enumerate(lengths.tolist()):
        expected = full[row, length - 1 : length + LENGTH - 10]
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + LENGTH - 10)


extend_logits = jax.jit(MegalodonDecoder.extend_logits)


def in_pieces(decoder, tokens, sizes):
    cache, parts, start = decoder.new_cache(tokens.shape[0]), [], 0
    for size in sizes:
        logits, cache = extend_logits(decoder, tokens[:, start : start + size], cache)
        parts.append(logits)
        start += size
    return jnp.concatenate(parts, axis=1), cache


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, (30,)), ({}, (3, 8, 3, 8, 8)), ({"attention_window": 5}, (3, 8, 8, 8, 3))],
)
def test_a_stream_may_be_cut_anywhere(options, sizes):
    logits, cache = in_pieces(decoder_of(**options), tokens_of(), sizes)
    np.testing.assert_allclose(logits, full_logits(**options), atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, LENGTH)


def test_rows_of_different_lengths_extend_together():
    decoder, tokens = decoder_of(), tokens_of()
    lengths = jnp.asarray([2, 7, 10])
    _, cache = jax.jit(MegalodonDecoder.prefill)(decoder, tokens[:, :10], lengths)
    rows = [tokens[row, n : n + 8] for row, n in enumerate(lengths.tolist())]
    logits, _ = extend_logits(decoder, jnp.stack(rows), cache)
    expected = full_logits()[jnp.arange(3)[:, None], lengths[:, None] + jnp.arange(8)[None]]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"attention_window": 5, "prior_count": 3},
        {"gate": megalodon.GateKind.MEGA, "attention": megalodon.AttentionKind.LAPLACE},
        {"ema": megalodon.EmaKind.NONE, "norm": megalodon.NormKind.LAYER},
    ],
)
def test_prompts_of_different_lengths_after_prompts(options):
    """Some rows have whole pieces, others parts of them or nothing."""
    decoder, tokens, full = decoder_of(**options), tokens_of(), full_logits(**options)
    first, second = jnp.asarray([2, 7, 10]), jnp.asarray([18, 1, 8])
    _, cache = jax.jit(MegalodonDecoder.prefill)(decoder, tokens[:, :10], first)
    rest = jnp.stack([tokens[row, n : n + 18] for row, n in enumerate(first.tolist())])
    logits, cache = jax.jit(MegalodonDecoder.extend)(decoder, rest, second, cache)
    end = first + second
    np.testing.assert_allclose(logits, full[jnp.arange(3), end - 1], atol=1e-5)
    token = tokens[jnp.arange(3), end]
    logits, _ = jax.jit(MegalodonDecoder.step)(decoder, token, cache)
    np.testing.assert_allclose(logits, full[jnp.arange(3), end], atol=1e-5)


PACKED = jnp.asarray([[1] * 5 + [2] * 13 + [0] * 2, [0] * 4 + [1] * 16, [3] * 20], jnp.int32)


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "prior_count": 3},
        {"attention_window": 5},
        {"gate": megalodon.GateKind.MEGA, "ema": megalodon.EmaKind.REAL},
        {"norm": megalodon.NormKind.LAYER, "scan_form": megalodon.ScanForm.AUTO},
    ],
)
def test_the_last_document_of_packed_or_left_padded_rows_goes_on(options):
    """As if it had been alone: its cache, and what comes after."""
    decoder, tokens, ends = decoder_of(**options), tokens_of()[:, :20], jnp.asarray([18, 20, 20])
    prefill, step = jax.jit(MegalodonDecoder.prefill), jax.jit(MegalodonDecoder.step)
    padded = jnp.where(PACKED > 0, tokens, -1)  # what stands where there is padding is not read
    logits, cache = prefill(decoder, padded, ends, PACKED)
    decoder.prefill(padded, ends, PACKED)
    first = jnp.asarray([5, 4, 0])
    np.testing.assert_array_equal(cache.lengths, ends - first)
    alone = jnp.stack([jnp.roll(row, -n) for row, n in zip(tokens, first.tolist(), strict=True)])
    expected, again = prefill(decoder, alone, ends - first)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, again)
    for token in tokens_of()[:, 20:25].T:
        logits, cache = step(decoder, token, cache)
        expected, again = step(decoder, token, again)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_inactive_rows_keep_their_cache_and_rows_can_be_taken():
    decoder, tokens = decoder_of(), tokens_of(2)
    _, cache = jax.jit(MegalodonDecoder.prefill)(decoder, tokens[:, :10], jnp.asarray([10, 4]))
    step = jax.jit(MegalodonDecoder.step)
    logits, after = step(decoder, jnp.asarray([11, 12]), cache, jnp.asarray([True, False]))
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        assert (np.asarray(a[0]) != np.asarray(b[0])).any()
    swapped = cache.take_rows(jnp.asarray([1, 0]))
    again, _ = step(decoder, jnp.asarray([12, 11]), swapped, jnp.asarray([False, True]))
    np.testing.assert_allclose(again[1], logits[0], atol=1e-6)


def test_generation():
    decoder = decoder_of()
    assert isinstance(decoder, Decoder)
    tokens, lengths = tokens_of(2, 10), jnp.asarray([10, 4])
    out = generate(decoder, tokens, lengths, SamplingConfig(temperature=0.0), max_new_tokens=12)
    row = jnp.concatenate([tokens[1, :4], out.tokens[1, :-1]])[None]
    full = jax.jit(decoder.model.apply)({"params": decoder.params}, row).logits[0]
    np.testing.assert_array_equal(jnp.argmax(full[3:], axis=-1), out.tokens[1])
    np.testing.assert_array_equal(out.stats["tokens"], 11)


def test_a_hundred_thousand_tokens_in_a_constant_state():
    decoder = decoder_of().prepare()
    tokens = jax.random.randint(jax.random.key(3), (1, 102_400), 0, 30, jnp.int32)
    extend = jax.jit(MegalodonDecoder.extend)
    cache, half = decoder.new_cache(1), jnp.asarray([51_200])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    for start in range(0, tokens.shape[1], 51_200):
        logits, cache = extend(decoder, tokens[:, start : start + 51_200], half, cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes
    assert int(cache.lengths[0]) == 102_400 and bool(jnp.isfinite(logits).all())
    # A stream forgets: what the moving average and the chunk do not hold is in the statistics.
    exact = jax.jit(decoder.model.apply)({"params": decoder.params}, tokens).logits[:, -1]
    np.testing.assert_allclose(logits, exact, atol=2e-4)


def test_bad_inputs():
    decoder = decoder_of()
    with pytest.raises(TypeError, match="segment_ids"):
        decoder.prefill(tokens_of()[:, :20], jnp.asarray([20] * 3), PACKED > 0)
    cache = decoder.new_cache(2)
    one = jnp.ones((2, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"capacity=0: must be 1\.\."):
        MegalodonDecoder.create(decoder.model, decoder.params, 0)
    with pytest.raises(ValueError, match=r"ema is \(2, 16, 3\), but these rows and this model"):
        decoder.extend(jnp.ones((3, 1), jnp.int32), jnp.ones(3, int), cache)
    with pytest.raises(ValueError, match=r"attention slots is 8, but .* need 5"):
        decoder_of(attention_window=5).extend(one, one[:, 0], cache)
    with pytest.raises(ValueError, match="cache has 1 layers: the model has num_layers=2"):
        decoder_of(num_layers=2).extend(one, one[:, 0], cache)
    with pytest.raises(ValueError, match=r"tokens hold ids 30\.\.30: must be 0\.\.29"):
        decoder.extend(one * 30, one[:, 0], cache)
    with pytest.raises(ValueError, match=r"cache\.norm\.mean holds NaN"):
        broken = cache.norm.replace(mean=cache.norm.mean * jnp.nan)
        decoder.extend(one, one[:, 0], cache.replace(norm=broken))
    # One token at a time as well.
    with pytest.raises(ValueError, match=r"attention slots is 4, but .* need 5"):
        decoder_of(attention_window=5).step(one[:, 0], decoder_of(chunk_size=4).new_cache(2))
    with pytest.raises(ValueError, match=r"heads and their width is \(2, 4\), but .* \(1, 8\)"):
        decoder_of(num_heads=1).step(one[:, 0], cache)
    with pytest.raises(ValueError, match=r"ema is \(2, 16, 3\)"):
        decoder.step(one[:1, 0], cache)
    with pytest.raises(ValueError, match=r"cache\.norm\.mean holds NaN"):
        decoder.step(one[:, 0], cache.replace(norm=broken))
    full = cache.replace(lengths=jnp.full((2,), 2**31 - 1, jnp.int32))
    with pytest.raises(ValueError, match="exceed capacity=2147483647"):
        decoder.step(one[:, 0], full)
