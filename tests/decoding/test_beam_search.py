"""Beam search and scores of continuations against all continuations of a tiny vocabulary."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding.beam_search import beam_search
from blt_jax.decoding.logits import AllowedIds, ProcessedDecoder, RepetitionPenalty
from blt_jax.decoding.scoring import rank, score_continuations
from tests.decoding import decoders, streams
from tests.decoding.tables import TableDecoder, random_table

V, M, STOP = 4, 4, 2
DECODER = TableDecoder(random_table(0))
PROMPTS = jnp.asarray([[0, 3, 1], [2, 1, 0]], jnp.int32)
LENGTHS = jnp.asarray([3, 2], jnp.int32)


def log_probability(table, prompt, text):
    """Sum over the text, by hand."""
    row, total = list(prompt), 0.0
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1), np.float64)
    for token in text:
        total += log_p[len(row) % len(log_p), row[-1], token]
        row.append(token)
    return total


def all_texts(stop):
    """Every text of M tokens, or shorter and ended by `stop`."""
    for length in range(1, M + 1):
        for text in itertools.product(range(V), repeat=length):
            if stop not in text[:-1] and (length == M or text[-1] == stop):
                yield text


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("num_beams", [64, 81])
def test_wide_beams_find_the_best_of_all_texts(length_penalty, num_beams):
    out = beam_search(DECODER, PROMPTS, LENGTHS, num_beams, M, (STOP,), length_penalty)
    for row, length in enumerate(LENGTHS.tolist()):
        prompt = PROMPTS[row, :length].tolist()
        scored = {
            text: log_probability(DECODER.table, prompt, text) / len(text) ** length_penalty
            for text in all_texts(STOP)
        }
        best = sorted(scored, key=scored.__getitem__, reverse=True)[:num_beams]
        found = [
            tuple(out.tokens[row, beam, :count].tolist())
            for beam, count in enumerate(out.lengths[row].tolist())
        ]
        assert found == best
        np.testing.assert_allclose(out.scores[row], [scored[text] for text in best], rtol=1e-5)
        assert out.finished[row].tolist() == [text[-1] == STOP for text in best]


def narrow_beams(table, prompt, num_beams):
    """The same search in Python, without stop ids."""
    beams = [((), 0.0)]
    for _ in range(M):
        longer = [(*text, token) for text, _ in beams for token in range(V)]
        scored = [(text, log_probability(table, prompt, text)) for text in longer]
        beams = sorted(scored, key=lambda item: -item[1])[:num_beams]
    return beams


def test_narrow_beams_are_those_of_a_loop():
    narrower = 0
    for seed in range(6):
        decoder = TableDecoder(random_table(seed))
        out = beam_search(decoder, PROMPTS, LENGTHS, 2, M)
        for row, length in enumerate(LENGTHS.tolist()):
            prompt = PROMPTS[row, :length].tolist()
            expected = narrow_beams(decoder.table, prompt, 2)
            assert [tuple(text) for text in out.tokens[row].tolist()] == [t for t, _ in expected]
            np.testing.assert_allclose(out.scores[row], [s for _, s in expected], rtol=1e-5)
            narrower += expected[1][0] != narrow_beams(decoder.table, prompt, 256)[1][0]
    assert narrower  # the beam did lose texts


def test_processors_constrain_the_search():
    decoder = ProcessedDecoder(DECODER, (AllowedIds.create((0, 3), V),))
    out = beam_search(decoder, PROMPTS, LENGTHS, 20, M)
    assert np.isfinite(out.scores).sum(axis=1).tolist() == [16, 16]
    assert set(np.unique(out.tokens[:, :16])) == {0, 3}
    penalized = ProcessedDecoder(DECODER, (RepetitionPenalty(1e6),))
    prompt, one = jnp.asarray([[1]]), jnp.asarray([1])
    positive = penalized.replace(decoder=TableDecoder(jnp.abs(DECODER.table) + 1))
    best = beam_search(positive, prompt, one, 64, 3).tokens[0, 0].tolist()
    assert sorted(best) == [0, 2, 3]  # each beam has its own history


def test_a_row_ends_when_nothing_better_can_follow():
    table = jnp.full((1, 3, 3), -20.0).at[:, :, STOP].set(0.0)
    out = beam_search(TableDecoder(table), PROMPTS[:1] % 3, LENGTHS[:1], 1, 20, (STOP,))
    assert out.tokens[0, 0].tolist() == [STOP] + [0] * 19
    assert int(out.lengths[0, 0]) == 1 and bool(out.finished[0, 0])


@pytest.mark.parametrize("name", ["llama", "sinks", "megalodon", "blt"])
def test_beams_carry_their_caches(name):
    """The scores of beams over a real cache are those of the same texts from scratch."""
    decoder = decoders.make(name, decoders.params_of(name))
    out = beam_search(decoder, PROMPTS, LENGTHS, 3, 6)
    scores = score_continuations(decoder, PROMPTS, LENGTHS, out.tokens, out.lengths)
    np.testing.assert_allclose(out.scores, scores.scores, atol=1e-4)
    assert (np.diff(out.scores, axis=1) <= 0).all()


def full_logits(name, decoder, rows):
    """[N, T, V] without a cache: the full pass, or for sinks the float64 loop."""
    if name == "sinks":
        sizes = decoder.config.num_sinks, decoder.config.window
        model, params = decoder.model, decoder.params
        return np.stack([streams.stream_logits(model, params, row, *sizes) for row in rows])
    return jax.jit(decoder.model.apply)({"params": decoder.params}, jnp.asarray(rows)).logits


@pytest.mark.parametrize("name", ["llama", "sinks", "megalodon"])
def test_scores_are_those_of_the_full_pass(name):
    decoder = decoders.make(name, decoders.params_of(name))
    texts = np.random.default_rng(2).integers(0, 32, (2, 3, 6)).astype(np.int32)
    counts = np.asarray([[6, 1, 3], [2, 4, 5]], np.int32)
    out = score_continuations(decoder, PROMPTS, LENGTHS, texts, counts)
    rows = np.zeros((6, 9), np.int32)  # nothing after a text changes what comes before
    for number, text in enumerate(texts.reshape(6, 6)):
        row = np.concatenate([PROMPTS[number // 3, : LENGTHS[number // 3]], text])
        rows[number, : len(row)] = row
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(full_logits(name, decoder, rows))))
    for number, count in enumerate(counts.reshape(6).tolist()):
        row, column = divmod(number, 3)
        first = int(LENGTHS[row]) - 1
        expected = log_p[number, first + np.arange(count), texts[row, column, :count]]
        found = np.asarray(out.token_scores[row, column])
        np.testing.assert_allclose(found[:count], expected, atol=1e-4)
        assert not found[count:].any()
        np.testing.assert_allclose(out.scores[row, column], expected.sum(), atol=1e-4)


def test_ranking_by_sum_and_by_size():
    scores = np.asarray([[-4.0, -3.0, -9.0]])
    assert rank(scores).tolist() == [[1, 0, 2]]
    assert rank(scores, np.asarray([[4, 2, 12]])).tolist() == [[2, 0, 1]]
    with pytest.raises(ValueError, match="sizes"):
        rank(scores, np.asarray([[4, 0, 12]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 30}, "exceed capacity=32"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0"),
        ({"stop_ids": (4,)}, "stop_ids"),
    ],
)
def test_bad_searches(change, message):
    request = {"num_beams": 2, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=message):
        beam_search(DECODER, PROMPTS, LENGTHS, **(request | change))


@pytest.mark.parametrize(
    ("texts", "counts", "message"),
    [
        ([[[1, 2]], [[1, 2]]], [[1], [0]], "continuation_lengths"),
        ([[[1, 2]], [[1, 4]]], [[1], [2]], "must be 0..3"),
        ([[[1] * 31], [[1] * 31]], [[31], [31]], "exceed capacity=32"),
    ],
)
def test_bad_continuations(texts, counts, message):
    with pytest.raises(ValueError, match=message):
        score_continuations(DECODER, PROMPTS, LENGTHS, np.asarray(texts), np.asarray(counts))
