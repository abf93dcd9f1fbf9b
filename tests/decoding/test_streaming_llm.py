"""The rolling cache with sinks: a float64 loop, the ring, and whole streams at once agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_jax.decoding import streaming_llm
from blt_jax.decoding.decoder import Decoder, TransformerDecoder
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.decoding.streaming_decoder import StreamingDecoder, streaming_decoder
from blt_jax.decoding.streaming_llm import (
    MAX_TOKENS,
    Policy,
    Positions,
    Rotation,
    StreamingConfig,
    query_positions,
    stream_rope,
)
from blt_jax.decoding.streaming_scores import streaming_nats, streaming_scores
from blt_jax.dist.sharding import init_params
from blt_jax.layers.cache import ring_index
from blt_jax.layers.rope import RopeConfig, rope_frequencies
from blt_jax.layers.transformer import PositionEncoding, Softmax
from blt_jax.models import llama3, megalodon
from tests.decoding import streams

LENGTH = 40
TOKENS = np.random.default_rng(0).integers(0, 30, (2, LENGTH)).astype(np.int32)


@functools.cache
def build(num_layers=2, **fields):
    sizes = dict(vocab_size=30, d_model=24, num_heads=4, num_kv_heads=2, mlp_dim=32)
    model = llama3.small(num_layers=num_layers, **{**sizes, **fields}).build()
    params = init_params(model, jax.random.key(1))
    # Larger weights: attention is far from even.
    return model, jax.tree.map(lambda x: x * 2.0 if x.ndim > 2 else x, params)


@jax.jit
def ring(decoder, tokens):
    """Logits [B, T, V] of one token at a time from an empty cache."""
    decoder = decoder.prepare()

    def body(cache, token):
        logits, cache = decoder.step(token, cache)
        return cache, logits

    cache, logits = jax.lax.scan(body, decoder.new_cache(tokens.shape[0]), tokens.T)
    return jnp.swapaxes(logits, 0, 1), cache


prefill, step = jax.jit(StreamingDecoder.prefill), jax.jit(StreamingDecoder.step)
TWO_PHASE = dict(rotation=Rotation.TWO_PHASE)
CASES = {
    "sinks": streaming_llm.sinks(3, 7),
    "sinks, keys rotated once": streaming_llm.sinks(3, 7, **TWO_PHASE),
    "window": streaming_llm.window(8),
    "published cache": streaming_llm.sinks(2, 5, include_current=False, **TWO_PHASE),
    "original": streaming_llm.sinks(3, 5, positions=Positions.ORIGINAL),
    "original, keys rotated once": streaming_llm.sinks(
        3, 5, positions=Positions.ORIGINAL, **TWO_PHASE
    ),
    "window of one": streaming_llm.sinks(4, 1),
    "never full": streaming_llm.sinks(4, 60),
}


SCALED = RopeConfig(theta=50.0, scaling_factor=4.0, original_max_positions=24)
"""One frequency of three is kept, one blended, one stretched."""


@functools.cache
def loop_logits(config):
    """Of both rows, by the float64 loop."""
    settings = dict(
        original=config.positions is Positions.ORIGINAL, include_current=config.include_current
    )
    sizes = (config.num_sinks, config.window)
    return [streams.stream_logits(*build(), row, *sizes, **settings) for row in TOKENS]


@pytest.mark.parametrize("case", list(CASES))
def test_ring_and_stream_equal_the_loop(case):
    config = CASES[case]
    expected = loop_logits(dataclasses.replace(config, rotation=Rotation.IN_CACHE))[0]
    logits, _ = ring(streaming_decoder(*build(), config), jnp.asarray(TOKENS[:1]))
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    nats = streaming_nats(*build(), config, TOKENS[:1])
    np.testing.assert_allclose(nats[0], streams.nats(expected, TOKENS[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"position_encoding": PositionEncoding.ALIBI}, CASES["sinks"]),
        ({"softmax": Softmax.OFF_BY_ONE}, streaming_llm.window(6)),
        ({"softmax": Softmax.LEARNED_SINK, "sink_tokens": 2}, CASES["sinks"]),
        ({"sink_tokens": 1}, streaming_llm.window(6)),
        ({"rope": SCALED}, CASES["sinks"]),
    ],
    ids=[
        "alibi",
        "zero sink",
        "learned sink, sink tokens",
        "sink token evicted",
        "scaled rotation",
    ],
)
def test_options_of_the_model(options, config):
    model, _ = build()
    options = dict(options)
    count = options.pop("sink_tokens", 0)
    stack = dataclasses.replace(model.config.transformer, **options)
    model = dataclasses.replace(model.config, transformer=stack, sink_tokens=count).build()
    params = init_params(model, jax.random.key(1))
    if "sink" in params["transformer"]["layers"]["attention"]:
        learned = jax.random.normal(jax.random.key(2), (2, 4))
        params["transformer"]["layers"]["attention"]["sink"] = learned
    sizes = (config.num_sinks, config.window)
    expected = streams.stream_logits(model, params, TOKENS[0], *sizes)
    logits, cache = ring(streaming_decoder(model, params, config), jnp.asarray(TOKENS[:1]))
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    assert cache.lengths.tolist() == [LENGTH]
    nats = streaming_nats(model, params, config, TOKENS[:1])
    np.testing.assert_allclose(nats[0], streams.nats(expected, TOKENS[0]), atol=1e-5)


@pytest.mark.parametrize("case", ["sinks", "sinks, keys rotated once"])
def test_prompts_longer_than_the_cache_then_steps(case, monkeypatch):
    """Rows stand at different positions, one has read fewer tokens than there are sinks."""
    monkeypatch.setattr(streaming_llm, "PIECE", 14)
    config = CASES[case]
    expected = loop_logits(CASES["sinks"])
    decoder = streaming_decoder(*build(), config).prepare()
    assert isinstance(decoder, Decoder)
    lengths = jnp.asarray([36, 2])
    logits, cache = prefill(decoder, jnp.asarray(TOKENS[:, :36]), lengths)
    for row in (0, 1):
        np.testing.assert_allclose(logits[row], expected[row][lengths[row] - 1], atol=1e-5)
    for _ in range(3):
        tokens = jnp.asarray(TOKENS)[jnp.arange(2), cache.lengths]
        logits, cache = step(decoder, tokens, cache, jnp.asarray([True, True]))
    np.testing.assert_allclose(logits[0], expected[0][38], atol=1e-5)
    np.testing.assert_allclose(logits[1], expected[1][4], atol=1e-5)
    _, waited = step(decoder, jnp.asarray([5, 6]), cache, jnp.asarray([True, False]))
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(waited), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    tokens = jnp.asarray([TOKENS[1, 5], TOKENS[0, 39]])
    logits, _ = step(decoder, tokens, cache.take_rows(jnp.asarray([1, 0])), jnp.ones(2, bool))
    np.testing.assert_allclose(logits[0], expected[1][5], atol=1e-5)
    np.testing.assert_allclose(logits[1], expected[0][39], atol=1e-5)


extend = jax.jit(StreamingDecoder.extend)


@pytest.mark.parametrize("case", ["sinks", "sinks, keys rotated once"])
def test_a_prompt_after_a_prompt(case, monkeypatch):
    """The second one is longer than the cache for one row, and within the sinks for the other."""
    monkeypatch.setattr(streaming_llm, "PIECE", 14)
    expected, decoder = loop_logits(CASES["sinks"]), streaming_decoder(*build(), CASES[case])
    cache, start = decoder.new_cache(2), np.zeros(2, int)
    for lengths in ([5, 1], [31, 1], [3, 31]):
        index = np.minimum(start[:, None] + np.arange(31)[None], LENGTH - 1)
        tokens = jnp.asarray(TOKENS[np.arange(2)[:, None], index])
        logits, cache = extend(decoder, tokens, jnp.asarray(lengths), cache)
        start += lengths
        for row in (0, 1):
            np.testing.assert_allclose(logits[row], expected[row][start[row] - 1], atol=1e-5)


def test_a_conversation_is_one_stream():
    """Two prompts with what they are continued with, one longer than the cache: every token is the
    most probable one of the whole text before it, which is read at once here."""
    decoder, greedy = streaming_decoder(*build(), CASES["sinks"]), SamplingConfig(temperature=0.0)
    text, previous = np.zeros(0, int), None
    for prompt in (TOKENS[:1, :5], TOKENS[:1, 5:25]):
        lengths = jnp.asarray([prompt.shape[1]])
        previous = generate(decoder, prompt, lengths, greedy, 6, previous=previous)
        text = np.concatenate([text, prompt[0], previous.tokens[0]])
    logits, _ = ring(decoder, jnp.asarray(np.pad(text, (0, LENGTH - len(text)))[None], jnp.int32))
    chosen = np.asarray(logits[0].argmax(-1))
    np.testing.assert_array_equal(
        chosen[[*range(4, 10), *range(30, 36)]], text[[*range(5, 11), *range(31, 37)]]
    )
    assert previous.cache.lengths.tolist() == [36]


def test_generation_goes_on_beyond_the_cache():
    decoder = streaming_decoder(*build(), CASES["sinks"])
    prompt = jnp.asarray(TOKENS[:1, :5])
    greedy = SamplingConfig(temperature=0.0)
    out = generate(decoder, prompt, jnp.asarray([5]), greedy, max_new_tokens=35)
    text = np.concatenate([prompt[0], out.tokens[0]])
    logits, _ = ring(decoder, jnp.asarray(text[None]))
    np.testing.assert_array_equal(logits[0, 4:-1].argmax(-1), text[5:])
    assert int(out.cache.lengths[0]) == 39 and int(out.stats["tokens"][0]) == 34


def test_one_layer_equals_the_dense_run_on_the_kept_suffix_at_constant_memory():
    """With one layer keys depend on their token alone, so positions are all that counts: also
    after 100,000 tokens, in a cache of the same size."""
    model, params = build(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, mlp_dim=16)
    text = np.random.default_rng(1).integers(0, 30, 100_000).astype(np.int32)
    suffix = jnp.asarray(text[None, -50:])
    expected = jax.jit(model.apply)({"params": params}, suffix).logits[0, -1]
    sizes = []
    for rotation in Rotation:
        config = streaming_llm.window(50, rotation=rotation)
        decoder = streaming_decoder(model, params, config)
        logits, cache = prefill(decoder, jnp.asarray(text[None]), jnp.asarray([100_000]))
        np.testing.assert_allclose(logits[0], expected, atol=1e-5)
        _, short = jax.eval_shape(prefill, decoder, jnp.asarray(text[None, :9]), jnp.asarray([9]))
        sizes += [
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(c)) for c in (cache, short)
        ]
    assert len(set(sizes)) == 1
    # Keys and values of 50 tokens, one head of width 8, in float32; the length.
    assert sizes[0] == 2 * 50 * 8 * 4 + 4


@pytest.mark.parametrize("num_sinks", [2, 6])
def test_what_left_the_window_cannot_be_recovered(num_sinks):
    """One layer, a prompt of 6 tokens and 8 more: the last logits depend on sinks and window alone,
    on the whole prompt where it is pinned."""
    model, params = build(num_layers=1)
    decoder = streaming_decoder(model, params, streaming_llm.sinks(num_sinks, 4))
    tokens = jnp.arange(14, dtype=jnp.int32)[None]  # every id once

    @jax.jit
    @jax.grad
    def gradient(table):
        changed = decoder.replace(params=params | {"embed": {"table": table}})
        _, cache = changed.prefill(tokens[:, :6], jnp.asarray([6]))
        logits, _ = changed.extend(tokens[:, 6:], jnp.asarray([8]), cache)
        return jnp.sum(logits * jnp.linspace(-1, 1, 30)[None])

    changes = np.abs(gradient(params["embed"]["table"])[:14]).max(axis=1)
    kept = [*range(num_sinks), *range(10, 14)]
    assert (np.delete(changes, kept) == 0).all() and (changes[kept] > 1e-3).all()


def test_recomputation_is_the_dense_run_on_the_last_tokens():
    model, params = build()
    decoder = streaming_decoder(model, params, streaming_llm.recompute(8))
    apply = jax.jit(model.apply)
    step = jax.jit(type(decoder).step)
    _, cache = decoder.prefill(jnp.asarray(TOKENS[:, :4]), jnp.asarray([4, 1]))
    rest = jnp.asarray(np.stack([TOKENS[0, 4:12], TOKENS[1, 1:9]]))
    logits, cache = decoder.extend(rest, jnp.asarray([8, 2]), cache)
    ends = [12, 3]
    for _ in range(2):
        for row, end in enumerate(ends):
            text = TOKENS[row : row + 1, max(end - 8, 0) : end]
            padded = jnp.asarray(np.pad(text, [(0, 0), (0, 8 - text.shape[1])]))
            expected = apply({"params": params}, padded).logits[0, text.shape[1] - 1]
            np.testing.assert_allclose(logits[row], expected, atol=1e-5)
        logits, cache = step(decoder, jnp.asarray(TOKENS[[0, 1], ends]), cache)
        ends = [end + 1 for end in ends]


def test_scores_of_dense_and_recomputed_streams():
    model, params = build()
    full = jax.jit(model.apply)({"params": params}, jnp.asarray(TOKENS)).logits
    expected = [streams.nats(np.asarray(x, np.float64), t) for x, t in zip(full, TOKENS)]  # noqa: B905
    dense = streaming_scores(model, params, streaming_llm.dense(), TOKENS)
    np.testing.assert_allclose(dense.nats, expected, atol=1e-5)
    np.testing.assert_array_equal(dense.correct, full[:, :-1].argmax(-1) == TOKENS[:, 1:])
    strided = streaming_nats(model, params, streaming_llm.recompute(8, 3), TOKENS)
    np.testing.assert_allclose(strided[:, :8], np.stack(expected)[:, :8], atol=1e-5)
    # Predictions 8, 9, 10 come from the window that ends at token 10, and so on.
    windows = jnp.asarray([TOKENS[0, i : i + 8] for i in (3, 6)])
    windows = jnp.pad(windows, [(0, 0), (0, 1)])
    read = jax.jit(model.apply)({"params": params}, windows).logits
    for row, begin in enumerate((3, 6)):
        nats = streams.nats(np.asarray(read[row], np.float64), TOKENS[0, begin : begin + 9])
        np.testing.assert_allclose(strided[0, begin + 5 : begin + 8], nats[5:], atol=1e-5)


@given(
    num_sinks=st.integers(0, 6),
    size=st.integers(1, 9),
    total=st.integers(1, 60),
    original=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_slots_and_ranks_equal_a_list(num_sinks, size, total, original):
    """The list [0, 1, .., sinks - 1, oldest, .., newest], as the paper draws it."""
    config = (streaming_llm.sinks if num_sinks else streaming_llm.window)(
        *((num_sinks,) if num_sinks else ()), size
    )
    if original:
        config = dataclasses.replace(config, positions=Positions.ORIGINAL)
    kept = []
    for token in range(total):
        kept.append(token)
        if len(kept) > config.size:
            del kept[num_sinks]
    here = np.asarray([total - 1], np.int32)
    recent, filled = ring_index(jnp.full((1,), num_sinks), jnp.asarray(here + 1), config.recent)
    recent, filled = np.asarray(recent)[0], np.asarray(filled)[0]
    assert sorted(recent[filled]) == kept[num_sinks:]
    assert all(
        (p - num_sinks) % config.recent == slot for slot, p in enumerate(recent) if filled[slot]
    )
    to_recent, to_sinks = (int(x[0]) for x in query_positions(config, jnp.asarray(here)))
    ranks = {token: rank for rank, token in enumerate(kept)}
    if original:
        assert (to_recent, to_sinks) == (total - 1, total - 1)
    else:
        assert to_recent == to_sinks == len(kept) - 1
        for token in recent[filled]:
            assert token + to_recent - (total - 1) == ranks[token]


def test_rotations_are_accurate_at_any_position():
    rope = RopeConfig(theta=10_000.0)
    positions = np.asarray([[0, 1, 255, 256, 65_537, 4_000_000, MAX_TOKENS - 1]], np.int32)
    angle = positions[0][:, None] * rope_frequencies(rope, 8).astype(np.float64)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    table = jax.jit(lambda x: stream_rope(x, rope, 8))(jnp.asarray(positions))
    np.testing.assert_allclose(table[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_sinks": -1}, "num_sinks=-1: must be >= 0"),
        ({"window": 0}, "window=0: must be >= 1"),
        ({"num_sinks": 0}, "num_sinks=0: must be >= 1 with policy SINKS"),
        ({"policy": Policy.WINDOW}, "num_sinks=4: .* not with WINDOW"),
        ({"stride": 2}, "stride=2: only policy RECOMPUTE"),
        ({"policy": Policy.RECOMPUTE, "num_sinks": 0, "window": 4, "stride": 5}, "must be 1..wind"),
        ({"trained_length": -1}, "trained_length=-1"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        StreamingConfig(**fields)


def test_bad_arguments():
    model, params = build()
    config = streaming_llm.sinks(4, 12)
    other = megalodon.small(vocab_size=30, num_layers=1, d_model=16, chunk_size=8).build()
    with pytest.raises(TypeError, match="constant size"):
        streaming_decoder(other, {}, config)
    with pytest.raises(ValueError, match="capacity=0: must be >= 1 with policy DENSE"):
        streaming_decoder(model, params, streaming_llm.dense())
    with pytest.raises(ValueError, match=r"capacity=9: .* not with SINKS"):
        streaming_decoder(model, params, config, 9)
    assert isinstance(
        streaming_decoder(model, params, streaming_llm.dense(), 9), TransformerDecoder
    )
    with pytest.raises(ValueError, match="stride=2"):
        streaming_decoder(model, params, streaming_llm.recompute(8, 2))
    windowed = llama3.small(vocab_size=30, num_layers=1, window=8).build()
    with pytest.raises(ValueError, match="window=8 tokens at most"):
        streaming_decoder(windowed, {}, config)
    with pytest.warns(UserWarning, match="16 positions, the model was trained on 8"):
        streaming_decoder(model, params, streaming_llm.sinks(4, 12, trained_length=8))
    decoder = streaming_decoder(model, params, config)
    full = decoder.new_cache(1).replace(read=jnp.asarray([MAX_TOKENS]))
    with pytest.raises(ValueError, match="exceed capacity=2147483647"):
        decoder.step(jnp.asarray([1]), full)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        streaming_nats(model, params, config, TOKENS[:, :1])
    with pytest.raises(TypeError, match="must be integers"):
        streaming_nats(model, params, config, TOKENS.astype(np.float32))
    for bad in (-1, 30):
        with pytest.raises(ValueError, match=f"tokens hold ids .*{bad}.*must be 0..29"):
            streaming_nats(model, params, config, np.where(TOKENS == 7, bad, TOKENS))
    with pytest.raises(ValueError, match="no multiple of the block of 12"):
        decoder.read(jnp.zeros((1, 20), jnp.int32), decoder.new_cache(1), jnp.asarray([20]))


@pytest.mark.parametrize("read", ["step", "extend"])
@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        (dict(window=11), 1, r"window=11.*must be one of .*window=12"),
        (TWO_PHASE, 1, "TWO_PHASE.*must be one of .*IN_CACHE"),
        (dict(positions=Positions.ORIGINAL), 1, "ORIGINAL"),
        (dict(), 2, r"cache has \(rows, .* = \(2, 2, \(4, 12\), 2, 6\): must be \(1, "),
    ],
)
def test_caches_of_another_config_or_batch(read, change, rows, message):
    config = streaming_llm.sinks(4, 12)
    other = streaming_decoder(*build(), dataclasses.replace(config, **change)).new_cache(rows)
    decoder, token = streaming_decoder(*build(), config), jnp.asarray([1])
    arguments = (token, other) if read == "step" else (token[:, None], token, other)
    with pytest.raises(ValueError, match=message):
        getattr(decoder, read)(*arguments)


def test_caches_of_another_model_and_counts():
    decoder, token = streaming_decoder(*build(), streaming_llm.sinks(4, 12)), jnp.asarray([1])
    smaller = streaming_decoder(*build(num_layers=1), decoder.config).new_cache(1)
    with pytest.raises(ValueError, match=r"= \(1, 1, .*: must be \(1, 2, "):
        decoder.step(token, smaller)
    for count in (5, -1):
        with pytest.raises(ValueError, match=rf"counts=\[{count}\]: must be one of 0\.\.4"):
            decoder.read(jnp.zeros((1, 4), jnp.int32), decoder.new_cache(1), token * count)
