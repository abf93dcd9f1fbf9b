"""Filters and draws against numpy, and the generation loop over a plain transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.decoding.logits import (
    AllowedIds,
    MinP,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    process_logits,
)
from blt_jax.decoding.sampling import (
    SamplingConfig,
    _generate,
    compile_generation,
    generate,
    row_keys,
    sample,
)
from blt_jax.dist.sharding import init_params
from blt_jax.models import llama3
from tests.decoding.tables import TableDecoder, random_table

LOGITS = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def filter_logits(logits, config):
    return process_logits(config.processors(logits.shape[-1]), jnp.asarray(logits))


def kept_by_numpy(logits, config):
    """Sets of ids that the filters keep, row by row, by sorting."""
    kept = []
    for row in logits / config.temperature:
        order = np.argsort(-row, kind="stable")
        ids = order[: config.top_k] if config.top_k else order
        p = softmax(row[ids])
        count = len(ids) if config.top_p == 1 else np.searchsorted(np.cumsum(p), config.top_p) + 1
        ids = ids[:count]
        p = softmax(row[ids])
        kept.append(set(ids[p >= config.min_p * p.max()].tolist()))
    return kept


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_k": 1},
        {"top_k": 400},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"temperature": 2.0, "top_p": 0.95},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_filters_against_numpy(fields):
    config = SamplingConfig(**fields)
    filtered = np.asarray(filter_logits(LOGITS, config))
    kept = [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in filtered]
    assert kept == kept_by_numpy(LOGITS, config)
    expected = LOGITS / config.temperature
    np.testing.assert_allclose(
        filtered[np.isfinite(filtered)], expected[np.isfinite(filtered)], rtol=1e-6
    )


def test_ties_are_kept():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    kept = np.isfinite(filter_logits(logits, SamplingConfig(top_k=2)))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=1.3, top_k=6, top_p=0.9)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (20_000, 50))
    ids = np.asarray(sample(logits, jax.random.key(0), config))
    expected = softmax(np.asarray(filter_logits(LOGITS[:1], config))[0])
    observed = np.bincount(ids, minlength=50) / len(ids)
    np.testing.assert_allclose(observed, expected, atol=0.015)


def test_greedy_takes_the_argmax():
    ids = sample(jnp.asarray(LOGITS), jax.random.key(0), SamplingConfig(temperature=0.0))
    np.testing.assert_array_equal(ids, LOGITS.argmax(-1))


def test_rows_draw_by_their_own_keys():
    config, keys = SamplingConfig(), row_keys(jax.random.key(3), 4)
    together = sample(jnp.asarray(LOGITS), keys, config)
    np.testing.assert_array_equal(together, sample(jnp.asarray(LOGITS), jax.random.key(3), config))
    for row in range(4):
        alone = sample(jnp.asarray(LOGITS[row : row + 1]), keys[row : row + 1], config)
        assert int(alone[0]) == int(together[row])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan: must be above 0, or 0 for greedy"),
        ({"top_k": -1}, "top_k=-1: must be >= 1, or 0 for all"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperature(0.0), "Temperature.temperature=0.0: must be above 0"),
        (lambda: Temperature(-1), "Temperature.temperature=-1"),
        (lambda: TopK(0), "TopK.k=0: must be >= 1"),
        (lambda: TopP(0.0), "TopP.p=0.0: must be above 0 and <= 1"),
        (lambda: MinP(2.0), "MinP.share=2.0: must be 0..1"),
        (lambda: MinP(jnp.asarray([[0.1], [np.nan]])), "MinP.share="),
        (lambda: RepetitionPenalty(jnp.float32(0)), "RepetitionPenalty.penalty=0.0"),
        (lambda: AllowedIds(np.zeros(50, bool)), "excludes every token"),
    ],
)
def test_bad_processors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_reported(temperature):
    config, key = SamplingConfig(temperature=temperature), jax.random.key(0)
    checked = checkify.checkify(lambda logits: sample(logits, key, config))
    checked(jnp.asarray(LOGITS))[0].throw()
    for bad in (np.nan, -np.inf):
        logits = LOGITS.copy()
        logits[1, : 1 if np.isnan(bad) else None] = bad
        with pytest.raises(checkify.JaxRuntimeError, match="hold NaN, or are all -inf"):
            checked(jnp.asarray(logits))[0].throw()


def test_allowed_ids_of_another_vocabulary():
    with pytest.raises(TypeError, match=r"dtype int32: must be bool \[V\] \(AllowedIds.create"):
        AllowedIds(jnp.asarray([3, 5]))
    for processors in ((AllowedIds.create((1,), 49),), (AllowedIds.create((0,), 1),)):
        with pytest.raises(ValueError, match=r"AllowedIds.allowed has shape .*: must be \(50,\)"):
            process_logits(processors, jnp.asarray(LOGITS))


def test_numbers_that_are_not_known_are_not_judged():
    low = jax.jit(lambda t: Temperature(t)(jnp.asarray(LOGITS), None))(2.0)
    np.testing.assert_allclose(low, LOGITS / 2, rtol=1e-6)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.eval_shape(lambda p: TopP(p), number) == TopP(number)
    per_row = Temperature(jnp.asarray([[1.0], [2.0], [3.0], [4.0]]))
    expected = LOGITS / np.arange(1.0, 5.0, dtype=np.float32)[:, None]
    np.testing.assert_allclose(per_row(jnp.asarray(LOGITS), None), expected, rtol=1e-6)


# ------------------------------------------------------------------------ generation loop


@pytest.fixture(scope="module")
def decoder():
    config = llama3.small(vocab_size=50, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2)
    model = config.build()
    return TransformerDecoder.create(model, init_params(model, jax.random.key(0)), capacity=32)


PROMPTS = jnp.asarray([[1, 7, 9, 0, 0], [1, 4, 5, 6, 8], [1, 0, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.asarray([3, 5, 1], jnp.int32)


def test_greedy_generation_is_the_argmax_of_the_full_pass(decoder):
    out = generate(decoder, PROMPTS, LENGTHS, SamplingConfig(temperature=0.0), max_new_tokens=12)
    forward = jax.jit(lambda tokens: decoder.model.apply({"params": decoder.params}, tokens).logits)
    for row, length in enumerate(LENGTHS.tolist()):
        text = np.concatenate([PROMPTS[row, :length], out.tokens[row]])
        logits = forward(jnp.asarray(text)[None])
        expected = np.argmax(logits[0], -1)[length - 1 : -1]
        np.testing.assert_array_equal(out.tokens[row], expected)
    np.testing.assert_array_equal(out.lengths, [12, 12, 12])
    np.testing.assert_array_equal(out.stats["tokens"], [11, 11, 11])


def test_rows_are_independent_and_stop_alone(decoder):
    config, keys = SamplingConfig(temperature=1.5), row_keys(jax.random.key(5), 3)
    free = generate(decoder, PROMPTS, LENGTHS, config, 10, (), keys)
    stop = int(free.tokens[0, 4])
    out = generate(decoder, PROMPTS, LENGTHS, config, 10, (stop,), keys)
    for row in range(3):
        text = free.tokens[row].tolist()
        end = text.index(stop) + 1 if stop in text else 10
        assert out.tokens[row].tolist() == text[:end] + [0] * (10 - end)
        assert int(out.lengths[row]) == end
        assert bool(out.finished[row]) == (stop in text)
        rows = slice(row, row + 1)
        alone = generate(decoder, PROMPTS[rows], LENGTHS[rows], config, 10, (stop,), keys[rows])
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])


def test_loop_ends_when_all_rows_are_finished(decoder):
    greedy = SamplingConfig(temperature=0.0)
    first = int(generate(decoder, PROMPTS[:1], LENGTHS[:1], greedy, 1).tokens[0, 0])
    out = generate(decoder, PROMPTS[:1], LENGTHS[:1], greedy, 20, (first,))
    assert int(out.lengths[0]) == 1 and bool(out.finished[0])
    assert int(out.stats["tokens"][0]) == 0


def test_penalty_and_allowed_ids_follow_the_full_pass(decoder):
    """By hand: the logits of the whole text so far, penalised for its own tokens."""
    allowed = (3, 8, 21, 22, 40, 41)
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.7, allowed_ids=allowed)
    out = generate(decoder, PROMPTS, LENGTHS, config, max_new_tokens=8)
    forward = jax.jit(lambda tokens: decoder.model.apply({"params": decoder.params}, tokens).logits)
    for row, length in enumerate(LENGTHS.tolist()):
        text = np.concatenate([PROMPTS[row, :length], out.tokens[row]])
        logits = np.asarray(forward(jnp.asarray(text)[None])[0])
        for index, token in enumerate(out.tokens[row].tolist()):
            scores = logits[length + index - 1].copy()
            held = np.unique(text[: length + index])
            scores[held] = np.where(scores[held] < 0, scores[held] * 1.7, scores[held] / 1.7)
            assert token == max(allowed, key=lambda i, scores=scores: scores[i])


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_a_generation_is_continued(penalty):
    """Without a prompt as if it had not been cut, and with one as from the text so far."""
    decoder = TableDecoder(random_table(0, vocab_size=10))
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    whole = generate(decoder, PROMPTS, LENGTHS, greedy, 10)
    half = generate(decoder, PROMPTS, LENGTHS, greedy, 4)
    rest = generate(decoder, PROMPTS[:, :1], 0 * LENGTHS, greedy, 6, previous=half)
    np.testing.assert_array_equal(jnp.concatenate([half.tokens, rest.tokens], 1), whole.tokens)
    np.testing.assert_array_equal(rest.cache.lengths, whole.cache.lengths)

    # Row 1 has ended by a stop id; its prompt comes after that one.
    stop = int(half.tokens[1, 1])
    stopped = generate(decoder, PROMPTS, LENGTHS, greedy, 4, (stop,))
    assert int(stopped.lengths[1]) == 2
    run = compile_generation(decoder, PROMPTS, LENGTHS, greedy, 5, previous=stopped)
    found = run(PROMPTS, LENGTHS, previous=stopped)
    texts, ends = np.zeros((3, 20), np.int32), []
    for row in range(3):
        parts = PROMPTS[row, : LENGTHS[row]], stopped.tokens[row, : stopped.lengths[row]]
        text = np.concatenate([*parts, parts[0]])
        texts[row, : len(text)] = text
        ends.append(len(text))
    expected = generate(decoder, jnp.asarray(texts), jnp.asarray(ends), greedy, 5)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.cache.lengths, expected.cache.lengths)


def test_generations_that_cannot_be_continued():
    decoder, greedy = TableDecoder(random_table(0, vocab_size=10)), SamplingConfig(temperature=0.0)
    before = generate(decoder, PROMPTS, LENGTHS, greedy, 4)
    request = dict(config=greedy, max_new_tokens=4, previous=before)
    with pytest.raises(ValueError, match=r"tokens \(2, 5\): previous has 3 rows"):
        generate(decoder, PROMPTS[:2], LENGTHS[:2], **request)
    with pytest.raises(ValueError, match="8 tokens and 26 new ones exceed capacity=32"):
        generate(decoder, PROMPTS, LENGTHS, **request | {"max_new_tokens": 20})
    penalty = SamplingConfig(temperature=0.0, repetition_penalty=2.0)
    with pytest.raises(ValueError, match=r"previous\.seen=None"):
        generate(decoder, PROMPTS, LENGTHS, **request | {"config": penalty})


def test_numbers_of_processors_change_without_a_compile(decoder):
    greedy = SamplingConfig(temperature=0.0)
    before = _generate._cache_size()
    texts = [
        generate(decoder, PROMPTS, LENGTHS, greedy, 8, processors=(RepetitionPenalty(penalty),))
        for penalty in (1.0, 1.5, 1e6)
    ]
    assert _generate._cache_size() == before + 1
    plain = generate(decoder, PROMPTS, LENGTHS, greedy, 8)
    np.testing.assert_array_equal(texts[0].tokens, plain.tokens)
    for row, length in enumerate(LENGTHS.tolist()):  # so large a penalty forbids repetition
        ids = [*PROMPTS[row, :length].tolist(), *texts[2].tokens[row].tolist()]
        assert len(set(ids)) == len(ids)


def test_processors_come_before_those_of_the_config(decoder):
    key = jax.random.key(0)
    arguments = (decoder, PROMPTS, LENGTHS)
    cold = generate(*arguments, SamplingConfig(temperature=0.5), 6, key=key)
    halves = (Temperature(0.25), Temperature(2.0))
    run = compile_generation(*arguments, SamplingConfig(), 6, key=key, processors=halves)
    np.testing.assert_array_equal(run(PROMPTS, LENGTHS, key).tokens, cold.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 28}, "exceed capacity=32"),
        ({"stop_ids": (50,)}, "stop_ids"),
        ({"lengths": jnp.asarray([0, 1, 1])}, "every prompt needs"),
        ({"lengths": jnp.asarray([6, 1, 1])}, "every prompt needs"),
        ({"tokens": PROMPTS.at[1, 2].set(50)}, "must be 0..49"),
        ({"tokens": PROMPTS[:, :0]}, "tokens is empty"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "key has shape"),
        ({"config": SamplingConfig()}, "key=None"),
        ({"config": SamplingConfig(temperature=0.0, allowed_ids=(3, 50))}, "allowed_ids=.*0..49"),
        ({"processors": (AllowedIds.create((3,), 51),)}, r"shape \(51,\): must be \(50,\)"),
    ],
)
def test_bad_requests(decoder, change, message):
    request = {
        "tokens": PROMPTS,
        "lengths": LENGTHS,
        "config": SamplingConfig(temperature=0.0),
        "max_new_tokens": 4,
    }
    with pytest.raises(ValueError, match=message):
        generate(decoder, **(request | change))


def test_float_ids_are_refused(decoder):
    with pytest.raises(TypeError):
        generate(decoder, PROMPTS.astype(jnp.float32), LENGTHS, SamplingConfig(temperature=0.0))
