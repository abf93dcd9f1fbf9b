"""Several models in step and functions of their logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding import contrastive_decoding as cd
from blt_jax.decoding.beam_search import beam_search
from blt_jax.decoding.combined import CombinedDecoder, WeightedSum
from blt_jax.decoding.logits import AllowedIds, ProcessedDecoder, TopK
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.decoding.scoring import score_continuations
from tests.decoding import decoders
from tests.decoding.tables import TableDecoder, random_table

GREEDY = SamplingConfig(temperature=0.0)
TABLES = tuple(TableDecoder(random_table(seed)) for seed in (1, 2, 3))
PROMPTS, LENGTHS = jnp.asarray([[0, 3, 1], [2, 0, 0], [3, 1, 0]]), jnp.asarray([3, 1, 2])


def by_hand(logits_of, steps):
    """Greedy continuations by a function (length, last token) -> logits [V]."""
    rows = np.zeros((3, steps), np.int32)
    for row, length in enumerate(LENGTHS.tolist()):
        token = int(PROMPTS[row, length - 1])
        for i in range(steps):
            token = int(np.argmax(logits_of(length + i, token)))
            rows[row, i] = token
    return rows


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_dexperts(alpha):
    """Base plus alpha times the difference of expert and anti-expert, token by token."""
    base, expert, anti = (np.asarray(model.table, np.float64) for model in TABLES)

    def logits_of(length, token):
        place = length % 5, token
        return base[place] + alpha * (expert[place] - anti[place])

    decoder = CombinedDecoder.create(TABLES, WeightedSum((1.0, alpha, -alpha)))
    out = generate(decoder, PROMPTS, LENGTHS, GREEDY, 12)
    np.testing.assert_array_equal(out.tokens, by_hand(logits_of, 12))
    if alpha:
        assert (out.tokens != generate(TABLES[0], PROMPTS, LENGTHS, GREEDY, 12).tokens).any()


def test_scores_and_a_continued_generation():
    decoder = CombinedDecoder.create(TABLES, WeightedSum((1.0, 0.5, -0.5)))
    whole = generate(decoder, PROMPTS, LENGTHS, GREEDY, 8)
    first = generate(decoder, PROMPTS, LENGTHS, GREEDY, 5)
    none = jnp.zeros((3, 1), jnp.int32), jnp.zeros((3,), jnp.int32)
    rest = generate(decoder, *none, GREEDY, 3, previous=first)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, rest.tokens], 1), whole.tokens)
    scores = score_continuations(
        decoder, PROMPTS, LENGTHS, whole.tokens[:, None], jnp.full((3, 1), 8)
    )
    table = sum(w * model.table for w, model in zip((1.0, 0.5, -0.5), TABLES, strict=True))
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    expected = np.zeros(3)
    for row, length in enumerate(LENGTHS.tolist()):
        last = int(PROMPTS[row, length - 1])
        for i, token in enumerate(np.asarray(whole.tokens[row])):
            expected[row] += log_p[(length + i) % 5, last, token]
            last = token
    np.testing.assert_allclose(scores.scores[:, 0], expected, rtol=1e-5)


def test_contrastive_decoding_is_one_function():
    rule = jax.tree_util.Partial(functools.partial(cd.contrastive_logits, alpha=0.2, beta=0.8))
    decoder = CombinedDecoder.create(TABLES[:2], rule)
    pair = cd.ContrastiveDecoder.create(*TABLES[:2], alpha=0.2, beta=0.8)
    a, b = (generate(each, PROMPTS, LENGTHS, GREEDY, 10).tokens for each in (decoder, pair))
    np.testing.assert_array_equal(a, b)


def test_excluded_tokens_and_numbers_without_a_new_compile():
    logits = jnp.asarray([[1.0, -jnp.inf, 2.0]]), jnp.asarray([[-jnp.inf, 0.0, 1.0]])
    np.testing.assert_allclose(WeightedSum((2.0, 1.0))(*logits), [[2.0 - 1e9, -np.inf, 5.0]])
    assert np.isnan(WeightedSum((1.0, 1.0))(jnp.asarray([[jnp.nan]]), jnp.zeros((1, 1)))).all()
    traces = []

    @jax.jit
    def run(decoder):
        traces.append(0)
        return decoder.prefill(PROMPTS, LENGTHS)[0]

    for weight in (0.5, 0.7):
        run(CombinedDecoder.create(TABLES[:2], WeightedSum((1.0, jnp.float32(weight)))))
    assert len(traces) == 1


def test_two_transformers():
    """Caches of their own: as the full pass of both."""
    models = [decoders.make("llama", decoders.params_of("llama", seed)) for seed in (1, 2)]
    decoder = CombinedDecoder.create(models, WeightedSum((1.5, -0.5)))
    out = generate(decoder, PROMPTS + 7, LENGTHS, GREEDY, 6)
    for row, length in enumerate(LENGTHS.tolist()):
        text = [int(t) + 7 for t in PROMPTS[row, :length]]
        for token in np.asarray(out.tokens[row]):
            read = jnp.asarray([text]), jnp.asarray([len(text)])
            a, b = (model.prefill(*read)[0][0] for model in models)
            assert token == int(jnp.argmax(1.5 * a - 0.5 * b))
            text.append(int(token))


# ------------------------------------------------------------------ allowed ids before filters

ONLY = AllowedIds.create((3,), 4)


@pytest.mark.parametrize("inside", [False, True])
def test_a_filter_leaves_an_allowed_id(inside):
    """TopK(1) alone would keep one that is not allowed, and the argmax of nothing is 0."""
    config = SamplingConfig(temperature=0.0, allowed_ids=(3,))
    decoder, processors = TABLES[0], (TopK(1),)
    if inside:
        decoder, processors = ProcessedDecoder(decoder, processors), ()
    out = generate(decoder, PROMPTS, LENGTHS, config, 5, processors=processors)
    assert (np.asarray(out.tokens) == 3).all()


def test_allowed_ids_reach_a_pair_inside_of_a_search():
    pair = cd.ContrastiveDecoder.create(*TABLES[:2], alpha=0.9)
    inside = beam_search(pair.constrained(ONLY.allowed), PROMPTS, LENGTHS, 1, 3)
    around = beam_search(ProcessedDecoder(pair, (ONLY,)), PROMPTS, LENGTHS, 1, 3)
    assert (np.asarray(around.tokens) == 3).all() and np.isfinite(around.scores).all()
    np.testing.assert_allclose(around.scores, inside.scores, atol=1e-5)


# ---------------------------------------------------------------------------------- errors


def test_bad_models():
    wider = TableDecoder(random_table(4, vocab_size=6))
    with pytest.raises(ValueError, match="models is empty"):
        CombinedDecoder.create((), WeightedSum(()))
    with pytest.raises(ValueError, match=r"and models\[1\] have vocab_size=4 and 6: must be equal"):
        CombinedDecoder.create((TABLES[0], wider), WeightedSum((1.0, 1.0)))
    CombinedDecoder.create((TABLES[0], wider), WeightedSum((1.0, 1.0)), vocab_size=4)
    with pytest.raises(ValueError, match=r"vocab_size=5: must be 0\.\.4"):
        CombinedDecoder.create((TABLES[0], wider), WeightedSum((1.0, 1.0)), vocab_size=5)
    with pytest.raises(ValueError, match=r"shape \(3,\): must be \(4,\)"):
        CombinedDecoder.create(TABLES, WeightedSum((1.0,) * 3), allowed=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"models.1. has capacity=9: must be >= 32"):
        short = TableDecoder(TABLES[1].table, 9)
        CombinedDecoder.create((TABLES[0], short), WeightedSum((1.0, 1.0)))
    with pytest.raises(ValueError, match="weights: 2 for 3 models"):
        CombinedDecoder.create(TABLES, WeightedSum((1.0, 1.0))).prefill(PROMPTS, LENGTHS)
