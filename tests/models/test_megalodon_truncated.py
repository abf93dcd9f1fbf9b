"""Norms that know recent chunks alone equal the equations in float64, however a stream is cut."""

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
from blt_jax.models.megalodon_truncated import TruncatedDecoder
from tests.models import megalodon_numpy
from tests.models.test_megalodon_decode import CONFIG as SMALL

CONFIG = dataclasses.replace(SMALL, num_layers=2, chunk_size=4)
CHUNKS = 5
FIRST, LENGTH = 24, 53
"""Of six chunks, the first even number from the fifth on, and of a stream with four replacements
and an odd chunk and a part of one after them."""


@functools.cache
def decoder_of(**changes):
    model = dataclasses.replace(CONFIG, **changes).build()
    params = init_params(model, jax.random.key(1))
    # Norms that matter: with statistics of a few tokens less the logits are others.
    params["norm_bias"] = jax.random.normal(jax.random.key(4), params["norm_bias"].shape)
    return TruncatedDecoder.create(model, params, chunks=CHUNKS)


def tokens_of(rows=2):
    return jax.random.randint(jax.random.key(2), (rows, LENGTH), 0, 30, jnp.int32)


@functools.cache
def expected(**changes):
    """Float64 logits [2, T, V], with replaced statistics and without."""
    decoder = decoder_of(**changes).decoder
    config = decoder.model.config
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), decoder.params)
    rows = np.asarray(tokens_of())
    replaced = [megalodon_numpy.truncated_logits(config, params, row, CHUNKS) for row in rows]
    return np.stack(replaced), np.stack(
        [megalodon_numpy.logits(config, params, row) for row in rows]
    )


def test_the_replacement_shows():
    replaced, plain = expected()
    np.testing.assert_array_equal(replaced[:, :FIRST], plain[:, :FIRST])
    # Every logit of the next tokens moves.
    assert np.abs(replaced - plain)[:, FIRST:].max(-1).min() > 1e-3


@pytest.mark.parametrize("options", [{}, {"prior_count": 3, "attention_window": 5}])
def test_a_whole_stream(options):
    nats = decoder_of(**options).stream_nats(tokens_of())
    logits = expected(**options)[0][:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(tokens_of())[:, 1:, None]
    np.testing.assert_allclose(nats, -np.take_along_axis(log_p, targets, -1)[..., 0], atol=1e-5)


prefill = jax.jit(TruncatedDecoder.prefill)
extend = jax.jit(TruncatedDecoder.extend)


@pytest.mark.parametrize("first", [(19, 6), (40, 25), (24, 23), (53, 1)])
def test_prompts_pieces_and_steps(first):
    """Rows of different lengths: a replacement in the prompt, in a piece, in a step, in one row."""
    decoder, tokens = decoder_of(), tokens_of()
    first, rows = jnp.asarray(first), jnp.arange(2)
    logits, cache = prefill(decoder, tokens, first)
    np.testing.assert_allclose(logits, expected()[0][rows, first - 1], atol=1e-5)

    counts = jnp.minimum(LENGTH - first, 17)
    if (counts > 0).all():
        index = jnp.minimum(first[:, None] + jnp.arange(17)[None, :], LENGTH - 1)
        piece = jnp.take_along_axis(tokens, index, axis=1)
        logits, cache = extend(decoder, piece, counts, cache)
        np.testing.assert_allclose(logits, expected()[0][rows, cache.lengths - 1], atol=1e-5)

    @jax.jit
    def steps(decoder, cache):
        def step(cache, _):
            position, active = cache.lengths, cache.lengths < LENGTH
            logits, cache = decoder.step(tokens[rows, position], cache, active)
            return cache, (position, logits)

        return jax.lax.scan(step, cache, length=LENGTH)

    position, logits = steps(decoder.prepare(), cache)[1]
    for row in rows.tolist():
        count = LENGTH - int(cache.lengths[row])
        at = position[:count, row]
        np.testing.assert_allclose(logits[:count, row], expected()[0][row, at], atol=1e-5)


def test_short_prompts_are_those_of_the_plain_decoder():
    """The first tokens of what is kept come from a prompt that is read at once."""
    decoder, tokens, lengths = decoder_of(), tokens_of()[:, :15], jnp.asarray([15, 11])
    logits, cache = prefill(decoder, tokens, lengths)
    plain, inner = jax.jit(MegalodonDecoder.prefill)(decoder.decoder, tokens, lengths)
    np.testing.assert_array_equal(logits, plain)
    jax.tree.map(np.testing.assert_array_equal, cache.cache, inner)
    for row, length in enumerate(lengths.tolist()):
        for position in range(max(0, length - decoder.kept_tokens), length):
            assert cache.recent[row, position % decoder.kept_tokens] == tokens[row, position]


def test_generation_and_rows():
    decoder, tokens = decoder_of(), tokens_of()[:, :20]
    assert isinstance(decoder, Decoder)
    out = generate(
        decoder, tokens, jnp.asarray([20, 9]), SamplingConfig(temperature=0.0), max_new_tokens=24
    )
    config, params = decoder.decoder.model.config, decoder.decoder.params
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    text = np.concatenate([tokens[1, :9], out.tokens[1]])
    greedy = megalodon_numpy.truncated_logits(config, params, text[:-1], CHUNKS).argmax(-1)[8:]
    np.testing.assert_array_equal(greedy, out.tokens[1])
    np.testing.assert_array_equal(out.stats["tokens"], 23)
    swapped = out.cache.take_rows(jnp.asarray([1, 0]))
    np.testing.assert_array_equal(swapped.recent, out.cache.recent[::-1])


def test_rows_that_never_get_there_cost_no_second_pass():
    decoder = decoder_of()
    short = TruncatedDecoder.create(decoder.decoder.model, decoder.decoder.params, 19, CHUNKS)
    logits, _ = short.prefill(tokens_of()[:, :19], jnp.asarray([19, 3]))
    np.testing.assert_allclose(logits[0], expected()[0][0, 18], atol=1e-5)
    np.testing.assert_allclose(
        short.stream_nats(tokens_of()[:, :19]), decoder.stream_nats(tokens_of())[:, :18], atol=1e-5
    )


def test_the_last_replacement_before_the_counters_end():
    """The kept tokens are in order where the position and their number pass 2**31."""
    decoder, tokens = decoder_of(), tokens_of()
    _, cache = prefill(decoder, tokens, jnp.asarray([23, 23]))
    step, far = jax.jit(TruncatedDecoder.step), 2**31 - 8
    start = (far - 1) % decoder.kept_tokens
    moved = cache.replace(
        cache=cache.cache.replace(lengths=jnp.full((2,), far - 1, jnp.int32)),
        recent=jnp.roll(cache.recent, start - 23 % decoder.kept_tokens, axis=1),
    )
    _, near = step(decoder, tokens[:, 23], cache)
    _, distant = step(decoder, tokens[:, 23], moved)
    for a, b in zip(
        jax.tree.leaves(near.cache.norm), jax.tree.leaves(distant.cache.norm), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bad_inputs():
    decoder = decoder_of()
    model, params = decoder.decoder.model, decoder.decoder.params
    one = jnp.ones((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="chunks=3: must be >= 4 chunks"):
        TruncatedDecoder.create(model, params, chunks=3)
    with pytest.raises(ValueError, match="chunks=8: norm=LAYER, only TIMESTEP"):
        layer_norm = dataclasses.replace(CONFIG, norm=megalodon.NormKind.LAYER).build()
        TruncatedDecoder.create(layer_norm, params)
    with pytest.raises(TypeError, match="cache is a MegalodonCache: must be a TruncatedCache"):
        decoder.step(one[:, 0], decoder.decoder.new_cache(2))
    other = TruncatedDecoder.create(model, params, chunks=8)
    with pytest.raises(ValueError, match=r"recent is \(2, 24\), but .* need \(2, 12\)"):
        decoder.extend(one, one[:, 0], other.new_cache(2))
    with pytest.raises(ValueError, match=r"ema is \(2, 16, 3\), but these rows"):
        decoder.step(one[:1, 0], decoder.new_cache(2))
    with pytest.raises(ValueError, match=r"must be \[B, T\] with T in 2\.\.capacity="):
        decoder.stream_nats(one)
    with pytest.raises(ValueError, match=r"tokens hold ids 30\.\.30: must be 0\.\.29"):
        decoder.stream_nats(jnp.full((1, 3), 30))
