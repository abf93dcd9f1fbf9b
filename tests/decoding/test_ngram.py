"""Counted n-grams against counting by hand, as a Decoder and as an amateur."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding import contrastive_decoding as cd
from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.ngram import NgramDecoder, ngram_log_probabilities
from blt_jax.decoding.scoring import score_continuations
from tests.decoding.tables import TableDecoder, random_table

V = 4
DOCUMENTS = [np.asarray(ids) for ids in ([1, 2, 3, 1, 2], [3], [1, 2, 2, 2, 0, 1, 3])]


def by_hand(strength):
    """p(w | u, v) for every u, v, w from a dictionary of counts."""
    counts = collections.Counter()
    for ids in DOCUMENTS:
        row = [0, 0, *ids.tolist()]
        for end in range(2, len(row)):
            for size in (1, 2, 3):
                counts[tuple(row[end - size + 1 : end + 1])] += 1

    def p(context, w):
        if context is None:
            return 1 / V
        total = sum(counts[(*context, x)] for x in range(V))
        lower = p(context[1:] if context else None, w)
        return (counts[(*context, w)] + strength * lower) / (total + strength)

    ids = range(V)
    return np.array([[[p((u, v), w) for w in ids] for v in ids] for u in ids])


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_probabilities_by_hand(strength):
    found = np.exp(ngram_log_probabilities(DOCUMENTS, V, strength=strength))
    np.testing.assert_allclose(found, by_hand(strength), rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_scores_are_read_off_the_table(order):
    table = ngram_log_probabilities(DOCUMENTS, V, order)
    decoder = NgramDecoder(jnp.asarray(table))
    assert isinstance(decoder, Decoder)
    prompts, lengths = jnp.asarray([[1, 2, 3], [2, 3, 3]]), jnp.asarray([3, 1])
    texts, counts = jnp.asarray([[[1, 0, 2]], [[3, 2, 1]]]), jnp.asarray([[3], [2]])
    scores = score_continuations(decoder, prompts, lengths, texts, counts).token_scores
    for row, (length, count) in enumerate(
        zip(lengths.tolist(), counts[:, 0].tolist(), strict=True)
    ):
        ids = [0, 0, *prompts[row, :length].tolist()]
        for place in range(count):
            ids.append(int(texts[row, 0, place]))
            expected = table[tuple(ids[len(ids) - order :])]
            np.testing.assert_allclose(scores[row, 0, place], expected, rtol=1e-6)


def test_rows_that_wait_and_rows_that_are_taken():
    decoder = NgramDecoder(jnp.asarray(ngram_log_probabilities(DOCUMENTS, V)))
    _, cache = decoder.prefill(jnp.asarray([[1, 2], [3, 1]]), jnp.asarray([2, 2]))
    _, after = decoder.step(jnp.asarray([3, 3]), cache, jnp.asarray([True, False]))
    assert after.context.tolist() == [[2, 3], [3, 1]] and after.lengths.tolist() == [3, 2]
    logits, _ = decoder.step(jnp.asarray([0, 2]), after.take_rows(jnp.asarray([1, 0])))
    expected = decoder.log_probabilities[jnp.asarray([1, 3]), jnp.asarray([0, 2])]
    np.testing.assert_array_equal(logits, expected)


def test_an_amateur_of_ngrams():
    expert = TableDecoder(random_table(1))
    amateur = NgramDecoder(jnp.asarray(ngram_log_probabilities(DOCUMENTS, V)))
    pair = cd.ContrastiveDecoder.create(expert, amateur, alpha=0.0)
    logits, _ = pair.prefill(jnp.asarray([[0, 2, 1]]), jnp.asarray([3]))
    expected = 1.5 * expert.table[3, 1] - 0.5 * amateur.log_probabilities[2, 1]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"documents hold ids 1..4: must be 0..3"):
        ngram_log_probabilities([np.asarray([1, 4])], V)
    with pytest.raises(ValueError, match=r"order=0: must be >= 1"):
        ngram_log_probabilities(DOCUMENTS, V, 0)
    with pytest.raises(ValueError, match="vocab_size=50000 to the power of it at most 268435456"):
        ngram_log_probabilities(DOCUMENTS, 50_000)
    with pytest.raises(ValueError, match=r"strength=0.0: must be above 0"):
        ngram_log_probabilities(DOCUMENTS, V, strength=0.0)
    decoder = NgramDecoder(jnp.zeros((V, V, V)))
    cache = jax.eval_shape(decoder.prefill, jnp.ones((1, 2), jnp.int32), jnp.asarray([2]))[1]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    with pytest.raises(ValueError, match=r"tokens hold ids 4..4: must be 0..3"):
        decoder.step(jnp.asarray([4]), cache)
