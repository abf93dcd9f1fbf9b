"""Logits processors against those of transformers, on random logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from blt_jax.decoding import logits as ours
from blt_jax.decoding.sampling import SamplingConfig

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(6, 60)).astype(np.float32) * 3
TOKENS = GENERATOR.integers(0, 60, (6, 9)).astype(np.int32)

PAIRS = {
    "repetition": (
        ours.RepetitionPenalty(1.4),
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    "temperature": (ours.Temperature(0.7), theirs.TemperatureLogitsWarper(0.7)),
    "top_k": (ours.TopK(7), theirs.TopKLogitsWarper(7)),
    "top_p": (ours.TopP(0.8), theirs.TopPLogitsWarper(0.8)),
    "min_p": (ours.MinP(0.15), theirs.MinPLogitsWarper(0.15)),
}


def run(processors):
    seen = ours.tokens_seen(jnp.asarray(TOKENS), jnp.full((6,), 9), 60)
    return np.asarray(ours.process_logits(processors, jnp.asarray(LOGITS), seen))


def expected(processors):
    scores = torch.tensor(LOGITS)
    for processor in processors:
        scores = processor(torch.tensor(TOKENS, dtype=torch.long), scores)
    return scores.numpy()


@pytest.mark.parametrize("name", PAIRS)
def test_processor(name):
    mine, peer = PAIRS[name]
    np.testing.assert_allclose(run([mine]), expected([peer]), rtol=1e-6)


def test_composition_in_the_order_of_the_config():
    config = SamplingConfig(temperature=0.7, top_k=7, top_p=0.8, min_p=0.15, repetition_penalty=1.4)
    scores = run(config.processors(60))
    np.testing.assert_allclose(scores, expected([peer for _, peer in PAIRS.values()]), rtol=1e-6)
    assert 6 < np.isfinite(scores).sum() < 42  # every row keeps some, not all of the top 7


def test_padding_is_not_seen():
    seen = ours.tokens_seen(jnp.asarray([[3, 4, 5]]), jnp.asarray([2]), 6)
    np.testing.assert_array_equal(seen, [[False, False, False, True, True, False]])


def test_penalty_without_the_tokens_is_an_error():
    with pytest.raises(ValueError, match="RepetitionPenalty needs the tokens"):
        ours.process_logits([ours.RepetitionPenalty(2.0)], jnp.asarray(LOGITS))
    with pytest.raises(ValueError, match="allowed_ids is empty"):
        ours.AllowedIds.create((), 60)
