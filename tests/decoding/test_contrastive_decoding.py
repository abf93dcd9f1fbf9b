"""The contrastive rule, its identities, and two models decoded in step."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from blt_jax.data.tokenizers import ByteTokenizer
from blt_jax.decoding import contrastive_decoding as cd
from blt_jax.decoding.contrastive_decoding import ContrastiveDecoder, Form, Masked
from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.decoding.logits import AllowedIds, ProcessedDecoder, RepetitionPenalty
from blt_jax.decoding.sampling import SamplingConfig, _generate, generate
from blt_jax.decoding.scoring import score_continuations
from blt_jax.dist.sharding import init_params
from blt_jax.models import llama3
from tests.decoding import decoders
from tests.decoding.tables import TableDecoder, random_table

EXPERT = jax.random.normal(jax.random.key(0), (7, 40)) * 3
AMATEUR = jax.random.normal(jax.random.key(1), (7, 40)) * 3
GREEDY = SamplingConfig(temperature=0.0)
TABLE = TableDecoder(random_table(1))


def kept(scores):
    return np.isfinite(np.asarray(scores))


# ------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("form", list(Form))
def test_forms_in_probabilities(form):
    """p_e (p_e / p_a) ** beta on the kept set; p_e / p_a ** beta for the difference."""
    p_e, p_a = (np.asarray(jax.nn.softmax(x, axis=-1), np.float64) for x in (EXPERT, AMATEUR))
    beta = 0.7
    expected = p_e / p_a**beta * (1.0 if form is Form.DIFFERENCE else p_e**beta)
    expected[p_e < 0.05 * p_e.max(-1, keepdims=True)] = 0
    expected /= expected.sum(-1, keepdims=True)
    scores = cd.contrastive_logits(EXPERT, AMATEUR, 0.05, beta, form)
    np.testing.assert_allclose(jax.nn.softmax(scores, axis=-1), expected, atol=1e-5)
    assert (kept(scores) == (expected > 0)).all() and not kept(scores).all()


def test_amateur_temperature_and_comparable_scores():
    scores = cd.contrastive_logits(EXPERT, AMATEUR, 0.0, 1.0, Form.DIFFERENCE, 0.5)
    expected = jax.nn.log_softmax(EXPERT) - jax.nn.log_softmax(AMATEUR / 0.5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_limits_of_alpha_and_beta():
    plain = cd.contrastive_logits(EXPERT, AMATEUR, alpha=0.0, beta=0.0)
    np.testing.assert_array_equal(plain, EXPERT)
    only = cd.contrastive_logits(EXPERT, AMATEUR, alpha=1.0, beta=5.0)
    np.testing.assert_array_equal(kept(only), EXPERT.max(-1, keepdims=True) == EXPERT)
    tied = cd.contrastive_logits(jnp.asarray([[2.0, 2.0, 1.0]]), AMATEUR[:1, :3], alpha=1.0)
    np.testing.assert_array_equal(kept(tied), [[True, True, False]])
    for beta in (0.5, 3.0):
        same = cd.contrastive_logits(EXPERT, EXPERT, beta=beta)
        np.testing.assert_array_equal(same.argmax(-1), EXPERT.argmax(-1))


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 1.5), st.floats(0.05, 3.0), st.booleans())
def test_the_choice_flips_at_the_known_strength(of_expert, gap, above):
    """Log-ratios De of error to truth for the expert and Da > De for the amateur flip at
    beta = De / (Da - De)."""
    flips_at = of_expert / gap
    beta = flips_at * (1.05 if above else 0.95)
    expert = jnp.asarray([0.0, of_expert, -50.0])
    amateur = jnp.asarray([0.0, of_expert + gap, 0.0])
    for form in (Form.LOGITS, Form.LOG_PROBABILITIES):
        scores = cd.contrastive_logits(expert, amateur, 0.1, beta, form)
        assert int(jnp.argmax(scores)) == (0 if above else 1)
        assert not np.isfinite(scores[2])


def test_masked_tokens_may_get_the_lowest_score():
    scores = np.asarray(cd.contrastive_logits(EXPERT, AMATEUR, masked=Masked.LOWEST))
    mask = np.asarray(cd.plausible(EXPERT, 0.1))
    for row in range(7):
        assert (scores[row, ~mask[row]] == scores[row, mask[row]].min()).all()


def test_excluded_tokens_give_no_nan():
    both = EXPERT.at[:, 3].set(-jnp.inf), AMATEUR.at[:, 3].set(-jnp.inf)
    for form in Form:
        scores = np.asarray(cd.contrastive_logits(*both, alpha=0.0, form=form))
        assert not np.isnan(scores).any() and (scores[:, 3] == -np.inf).all()
        alone = cd.contrastive_logits(EXPERT, both[1], 0.0, 0.5, form)
        assert np.isfinite(alone).all() and (alone.argmax(-1) == 3).all()


@pytest.mark.parametrize("masked", list(Masked))
@pytest.mark.parametrize("form", list(Form))
def test_nan_stays_visible(form, masked):
    nan_expert, nan_amateur = EXPERT.at[2, 5].set(jnp.nan), AMATEUR.at[3, 6].set(jnp.nan)
    nan_expert = nan_expert.at[4].set(-jnp.inf)
    scores = cd.contrastive_logits(nan_expert, nan_amateur, form=form, masked=masked)
    bad = np.isnan(scores)
    assert bad[2:5].all() and not bad[:2].any() and not bad[5:].any()


def test_nan_is_an_error_under_checkify():
    nan = EXPERT.at[2, 5].set(jnp.nan)
    checked = checkify.checkify(jax.jit(cd.contrastive_logits), errors=checkify.user_checks)
    assert checked(EXPERT, AMATEUR)[0].get() is None
    for pair in ((nan, AMATEUR), (EXPERT, nan)):
        assert "hold NaN" in checked(*pair)[0].get()


def test_rows_of_expert_and_amateur_must_be_the_same(monkeypatch):
    # The hook of the tests would find it first; users have no hook.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for amateur in (AMATEUR[:1], AMATEUR[0], AMATEUR[:, :39]):
        with pytest.raises(ValueError, match=r"expert \(7, 40\) and amateur .*: must be equal"):
            cd.contrastive_logits(EXPERT, amateur)


def test_bfloat16_logits_are_combined_in_float32():
    low = EXPERT.astype(jnp.bfloat16), AMATEUR.astype(jnp.bfloat16)
    high = [x.astype(jnp.float32) for x in low]
    np.testing.assert_array_equal(cd.contrastive_logits(*low), cd.contrastive_logits(*high))


# ------------------------------------------------------------------------- two models


def model_decoder(seed, num_layers, d_model, capacity=24, vocab_size=40):
    config = llama3.small(
        vocab_size=vocab_size, num_layers=num_layers, d_model=d_model, num_heads=2
    )
    model = config.build()
    params = init_params(model, jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)  # far from uniform
    return TransformerDecoder.create(model, params, capacity)


@pytest.fixture(scope="module")
def models():
    return model_decoder(0, 2, 16), model_decoder(1, 1, 8)


PROMPTS = jnp.asarray([[1, 7, 9, 3, 0], [1, 4, 5, 6, 8], [1, 0, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.asarray([4, 5, 1], jnp.int32)


@pytest.mark.parametrize("context", [0, 2])
def test_greedy_follows_the_full_passes(models, context):
    new = 6
    decoder = ContrastiveDecoder.create(*models, beta=1.0, amateur_context=context)
    out = generate(decoder, PROMPTS, LENGTHS, GREEDY, new)

    @jax.jit
    def best(decoder, texts, shown, lengths):
        """Argmax of both whole passes, and of the expert alone, after each of the new tokens."""
        expert, amateur = decoder.expert, decoder.amateur
        e = expert.model.apply({"params": expert.params}, texts).logits
        a = amateur.model.apply({"params": amateur.params}, shown).logits
        e, a = (
            jnp.take_along_axis(x, (n[:, None] - 1 + jnp.arange(new)[None])[..., None], axis=1)
            for x, n in ((e, lengths), (a, jnp.minimum(lengths, context or 8)))
        )
        return cd.contrastive_logits(e, a, beta=1.0).argmax(-1), e.argmax(-1)

    texts, shown = np.zeros((2, 3, 11), np.int32)
    for row, length in enumerate(LENGTHS.tolist()):
        text = np.concatenate([PROMPTS[row, :length], out.tokens[row]])
        texts[row, : len(text)] = text
        text = text[max(length - context, 0) :] if context else text
        shown[row, : len(text)] = text
    expected, of_expert = best(decoder, jnp.asarray(texts), jnp.asarray(shown), LENGTHS)
    np.testing.assert_array_equal(out.tokens, expected)
    assert (expected != of_expert).any()  # the amateur changed some choice


def test_amateur_with_a_prompt_of_its_own():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    prompt = jnp.asarray([[3, 2]]), jnp.asarray([2])
    decoder = ContrastiveDecoder.create(
        expert, amateur.__class__(amateur.table, 40), amateur_prompt=prompt, alpha=0.0
    )
    logits, _ = decoder.prefill(jnp.asarray([[0, 3, 1]]), jnp.asarray([3]))
    expected = 1.5 * expert.table[3, 1] - 0.5 * amateur.table[2, 2]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="amateur_prompt has 1 rows: must be 3"):
        generate(decoder, PROMPTS % 4, LENGTHS, GREEDY, 2)


def test_a_stream_with_a_prompt_of_the_amateur():
    """A model that reads without end needs no room for the longer prompt."""
    params = decoders.params_of("sinks")
    stream = decoders.make("sinks", params)
    prompt = jnp.asarray([[3, 2, 9], [4, 4, 4]]), jnp.asarray([2, 3])
    pair = ContrastiveDecoder.create(stream, stream, amateur_prompt=prompt, beta=0.5, alpha=0.0)
    tokens = jnp.asarray([[5], [6]]), jnp.asarray([1, 1])
    expected = 1.5 * stream.prefill(*tokens)[0] - 0.5 * stream.prefill(*prompt)[0]
    np.testing.assert_allclose(pair.prefill(*tokens)[0], expected, atol=1e-5)


def test_an_equal_amateur_or_no_strength_is_the_expert():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    plain = generate(expert, PROMPTS % 4, LENGTHS, GREEDY, 10).tokens
    for pair in (
        ContrastiveDecoder.create(expert, expert, beta=2.0),
        ContrastiveDecoder.create(expert, amateur, beta=0.0),
        ContrastiveDecoder.create(expert, amateur, alpha=1.0),
    ):
        np.testing.assert_array_equal(
            generate(pair, PROMPTS % 4, LENGTHS, GREEDY, 10).tokens, plain
        )
    other = ContrastiveDecoder.create(expert, amateur, beta=1.0)
    assert (generate(other, PROMPTS % 4, LENGTHS, GREEDY, 10).tokens != plain).any()


def test_strengths_are_swept_without_a_compile():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    before = _generate._cache_size()
    for beta in (0.0, 0.25, 0.5, 1.0):
        pair = ContrastiveDecoder.create(expert, amateur, beta=beta, alpha=0.1 + beta / 10)
        generate(pair, PROMPTS % 4, LENGTHS, GREEDY, 3)
    assert _generate._cache_size() == before + 1


def test_expert_with_penalty_and_allowed_ids():
    """Processors of the expert act before the mask: an allowed token is always plausible."""
    expert = ProcessedDecoder(TABLE, (RepetitionPenalty(3.0), AllowedIds.create((0, 2), 4)))
    pair = ContrastiveDecoder.create(expert, TableDecoder(random_table(2)), alpha=1.0)
    out = generate(pair, PROMPTS % 4, LENGTHS, GREEDY, 8)
    config = SamplingConfig(temperature=0.0, repetition_penalty=3.0, allowed_ids=(0, 2))
    plain = generate(TABLE, PROMPTS % 4, LENGTHS, config, 8)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert set(np.unique(out.tokens)) == {0, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_allowed_ids_hold_where_every_plausible_token_is_excluded(temperature):
    """The constraint comes first: the plausible tokens are found among the allowed ones."""
    pair = ContrastiveDecoder.create(TABLE, TableDecoder(random_table(2)), alpha=0.9, beta=1.0)
    last = jnp.asarray([0, 1, 2, 3])[:, None]
    lengths, key = jnp.ones(4, jnp.int32), jax.random.key(0)
    first, _ = pair.prefill(last, lengths)
    worst = int(jnp.argmin(TABLE.table[1].max(0)))  # implausible after most tokens
    assert (first[:, worst] == -jnp.inf).any() and worst != 0
    config = SamplingConfig(temperature=temperature, allowed_ids=(worst, 3))
    for decoder in (pair, ProcessedDecoder(pair, ())):
        out = generate(decoder, last, lengths, config, 6, (), key).tokens
        assert set(np.unique(out)) <= {worst, 3}
    out = generate(pair, last, lengths, GREEDY, 6, (), None, (AllowedIds.create((worst,), 4),))
    assert (out.tokens == worst).all()


def test_constraints_without_a_common_token():
    processors = (AllowedIds.create((1, 2), 4),)
    config = SamplingConfig(temperature=0.0, allowed_ids=(0, 3))
    with pytest.raises(ValueError, match="allow no token in common"):
        generate(TABLE, PROMPTS % 4, LENGTHS, config, 2, (), None, processors)


def test_sampling_draws_from_the_contrastive_distribution():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    pair = ContrastiveDecoder.create(expert, amateur, beta=0.5)
    tokens, lengths = jnp.full((4000, 1), 3, jnp.int32), jnp.ones(4000, jnp.int32)
    out = generate(pair, tokens, lengths, SamplingConfig(temperature=0.7), 1, (), jax.random.key(0))
    scores = cd.contrastive_logits(expert.table[1, 3], amateur.table[1, 3])
    share = np.bincount(out.tokens[:, 0], minlength=4) / 4000
    np.testing.assert_allclose(share, jax.nn.softmax(scores / 0.7), atol=0.03)


def test_a_prompt_after_a_prompt():
    """Of both models, one of them with a penalty for the ids of both prompts."""
    penalised = ProcessedDecoder(TABLE, (RepetitionPenalty(1.5),))
    pair = ContrastiveDecoder.create(penalised, TableDecoder(random_table(7)))
    prompts, lengths = PROMPTS % 4, LENGTHS
    first = jnp.minimum(lengths, 2)
    rest = jnp.take_along_axis(
        prompts, jnp.minimum(first[:, None] + jnp.arange(4)[None], 4), axis=1
    )
    rows = jnp.asarray([0, 1])  # The third one has no rest.
    _, cache = pair.prefill(prompts[rows], first[rows])
    logits, cache = pair.extend(rest[rows], (lengths - first)[rows], cache)
    expected, _ = pair.prefill(prompts[rows], lengths[rows])
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    np.testing.assert_array_equal(cache.lengths, lengths[rows])


def test_padded_vocabulary_is_never_chosen():
    expert = TableDecoder(random_table(1, vocab_size=6).at[:, :, 5].set(50.0))
    amateur = TableDecoder(random_table(2, vocab_size=8))
    with pytest.raises(ValueError, match="vocab_size=6 and 8"):
        ContrastiveDecoder.create(expert, amateur)
    pair = ContrastiveDecoder.create(expert, amateur, vocab_size=5)
    logits, _ = pair.prefill(PROMPTS % 5, LENGTHS)
    assert logits.shape == (3, 5) and kept(logits).sum() > 3  # id 5 does not raise the cutoff


# ---------------------------------------------------------------------- search and ranking


def test_scores_and_beams_sum_contrastive_log_probabilities():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    pair = ContrastiveDecoder.create(expert, amateur)
    texts, counts = jnp.asarray([[[1, 3, 0], [2, 2, 1]]]), jnp.asarray([[3, 2]])
    prompt = jnp.asarray([[0, 1]]), jnp.asarray([2])
    out = cd.contrastive_scores(pair, *prompt, texts, counts)
    for column, count in enumerate(counts[0].tolist()):
        row, total = [0, 1], 0.0
        for token in texts[0, column, :count].tolist():
            e, a = (jax.nn.log_softmax(d.table[len(row), row[-1]]) for d in (expert, amateur))
            total += float(1.5 * e[token] - 0.5 * a[token])
            row.append(token)
        np.testing.assert_allclose(out.scores[0, column], total, rtol=1e-5)
    beams = cd.contrastive_beam_search(pair.replace(alpha=0.0), *prompt, 64, 3)
    everything = jnp.asarray([[[i, j, k] for i in range(4) for j in range(4) for k in range(4)]])
    scores = cd.contrastive_scores(pair, *prompt, everything, jnp.full((1, 64), 3)).scores[0]
    order = jnp.argsort(-scores)
    np.testing.assert_array_equal(beams.tokens[0], everything[0, order])
    np.testing.assert_allclose(beams.scores[0], scores[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["blt", "sinks", "megalodon"])
def test_pairs_of_any_models(name):
    """Scores of a pair are the combination of what each model gives alone."""
    expert = decoders.make(name, decoders.params_of(name))
    V = expert.vocab_size
    amateur = model_decoder(1, 1, 8, capacity=12, vocab_size=V)
    if name == "sinks":  # beside a decoder of streams there must be another one
        amateur = decoders.make(name, decoders.params_of(name, seed=2))
    pair = ContrastiveDecoder.create(expert, amateur, beta=0.25)
    texts = jax.random.randint(jax.random.key(2), (2, 2, 6), 4, V)
    rows = PROMPTS[:2] + 4, LENGTHS[:2], texts, jnp.asarray([[6, 2], [4, 5]])
    of_expert = score_continuations(expert, *rows).token_scores
    of_amateur = score_continuations(amateur, *rows).token_scores
    both = cd.contrastive_scores(pair, *rows).token_scores
    np.testing.assert_allclose(both, 1.25 * of_expert - 0.25 * of_amateur, atol=1e-4)
    assert float(jnp.abs(both - of_expert).max()) > 0.01


def beams_by_hand(pair, prompt, num_beams, new_tokens, expert_pool):
    """Li et al.'s difference, summed; with expert_pool a step compares the 2 num_beams pairs that
    the expert finds most probable, and nothing else."""
    tables = pair.expert.table, pair.amateur.table
    scores = np.asarray(cd.contrastive_logits(*tables, pair.alpha, pair.beta, pair.form))
    log_e = np.asarray(jax.nn.log_softmax(pair.expert.table))
    beams = [((), 0.0)]
    for _ in range(new_tokens):
        pairs = []
        for text, total in beams:
            row = [*prompt, *text]
            place = len(row) % 5, row[-1]
            pairs += [
                (log_e[*place, v], (*text, v), total + float(scores[*place, v])) for v in range(4)
            ]
        if expert_pool:
            pairs = sorted(pairs, key=lambda pair: -pair[0])[: 2 * num_beams]
        beams = sorted((pair[1:] for pair in pairs), key=lambda beam: -beam[1])[:num_beams]
    return beams


@pytest.mark.parametrize("pool", list(cd.BeamPool))
def test_pools_of_beams_by_hand(pool):
    expert_pool, differ = pool is cd.BeamPool.EXPERT, 0
    for seed in range(3):
        tables = (TableDecoder(random_table(seed + shift)) for shift in (0, 10))
        pair = ContrastiveDecoder.create(*tables, alpha=0.0, beta=1.0, form=Form.DIFFERENCE)
        out = cd.contrastive_beam_search(pair, PROMPTS[:2] % 4, LENGTHS[:2], 2, 4, pool=pool)
        for row, length in enumerate(LENGTHS[:2].tolist()):
            prompt = (PROMPTS[row, :length] % 4).tolist()
            expected = beams_by_hand(pair, prompt, 2, 4, expert_pool)
            assert [tuple(text) for text in out.tokens[row].tolist()] == [t for t, _ in expected]
            np.testing.assert_allclose(out.scores[row], [s for _, s in expected], rtol=1e-4)
            differ += expected != beams_by_hand(pair, prompt, 2, 4, not expert_pool)
    assert differ  # the pools do find other beams


def test_masked_tokens_never_enter_a_beam():
    expert, amateur = TABLE, TableDecoder(random_table(2))
    pair = ContrastiveDecoder.create(expert, amateur, alpha=0.4, form=Form.DIFFERENCE, beta=1.0)
    out = cd.contrastive_beam_search(pair, jnp.asarray([[0, 1]]), jnp.asarray([2]), 64, 3)
    found = np.isfinite(out.scores[0])
    assert 1 <= found.sum() < 64
    for text in out.tokens[0][found].tolist():
        row = [0, 1]
        for token in text:
            assert bool(cd.plausible(expert.table[len(row), row[-1]], 0.4)[token])
            row.append(token)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed": jnp.ones(5, bool)}, r"shape \(5,\): must be \(4,\)"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"amateur_temperature": 0.0}, "amateur_temperature=0.0"),
        ({"amateur_context": -1}, "amateur_context=-1"),
        ({"vocab_size": 9}, "vocab_size=9: must be 0..4"),
        ({"amateur": TableDecoder(TABLE.table, 31)}, "capacity=31: must be >= 32"),
        (
            {"amateur_prompt": (jnp.zeros((1, 3), jnp.int32), jnp.asarray([3]))},
            "capacity=32: must be >= 34",
        ),
        (
            {"amateur_prompt": (jnp.zeros((1, 3), jnp.int32), jnp.asarray([4]))},
            r"amateur_prompt: lengths=\[4\]: every prompt needs 1..3 tokens",
        ),
        (
            {"amateur_prompt": (jnp.asarray([[0, 4]]), jnp.asarray([2]))},
            "amateur_prompt: .*4",
        ),
    ],
)
def test_bad_pairs(fields, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDecoder.create(**({"expert": TABLE, "amateur": TABLE} | fields))


def test_a_strong_beta_warns():
    with pytest.warns(UserWarning, match="beta=3.0 is strong"):
        ContrastiveDecoder.create(TABLE, TABLE, beta=3.0)


def test_tokenizers_must_agree():
    class Other(ByteTokenizer):
        def decode(self, ids):
            return super().decode(ids).lower()

    cd.check_tokenizers(ByteTokenizer(), ByteTokenizer())
    with pytest.raises(ValueError, match=f"id {ord('A') + 4} is b'A' and b'a'"):
        cd.check_tokenizers(ByteTokenizer(), Other())


def test_majority_vote_and_copy_rate():
    assert cd.majority_vote(["7", None, "5", "5", "7", None, None]) == "7"
    assert cd.majority_vote([None]) is None
    assert cd.copy_rate([3, 4, 5], [3, 9, 3, 8]) == 0.5
    assert cd.copy_rate("abc", "") == 0.0
