"""Contrastive decoding and beam search against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from blt_jax.decoding import contrastive_decoding as cd
from blt_jax.decoding.beam_search import beam_search
from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.interop import hugging_face

GENERATOR = np.random.default_rng(0)
EXPERT = GENERATOR.normal(size=(50, 80)).astype(np.float32) * 3
AMATEUR = GENERATOR.normal(size=(50, 80)).astype(np.float32) * 3


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 1.0])
def test_mask(alpha):
    warper = logits_process.MinPLogitsWarper(alpha, min_tokens_to_keep=1)
    expected = torch.isfinite(warper(None, torch.tensor(EXPERT))).numpy()
    np.testing.assert_array_equal(cd.plausible(jnp.asarray(EXPERT), alpha), expected)


class Guidance(logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """Their combination, with the amateur in place of the unconditional model."""

    def get_unconditional_logits(self, input_ids):
        return torch.tensor(AMATEUR)[:, None]


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0, 2.0])
def test_combination(beta):
    scores = Guidance(1 + beta, model=None)(None, torch.tensor(EXPERT))
    expected = torch.softmax(scores, dim=-1).numpy()
    for form in (cd.Form.LOGITS, cd.Form.LOG_PROBABILITIES):
        mine = cd.contrastive_logits(jnp.asarray(EXPERT), jnp.asarray(AMATEUR), 0.0, beta, form)
        np.testing.assert_allclose(jax.nn.softmax(mine, axis=-1), expected, atol=1e-5)
        if form is cd.Form.LOG_PROBABILITIES:  # not only up to a constant
            np.testing.assert_allclose(mine, scores.numpy(), atol=1e-4)


def peer(seed, num_layers, width, path):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    model.float().eval().save_pretrained(path)
    return model, TransformerDecoder.create(*hugging_face.load_pretrained(path), capacity=24)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return peer(0, 2, 32, path / "expert"), peer(1, 1, 16, path / "amateur")


PROMPTS = GENERATOR.integers(0, 67, (3, 6)).astype(np.int32)
LENGTHS = jnp.full((3,), 6, jnp.int32)


def test_generation_token_for_token(pairs):
    """A pair of theirs in a plain loop of whole passes."""
    text, changed = torch.tensor(PROMPTS, dtype=torch.long), 0
    for _ in range(12):
        with torch.no_grad():
            e, a = (model(text).logits[:, -1] for model, _ in pairs)
        masked = logits_process.MinPLogitsWarper(0.1)(None, e)
        scores = torch.where(torch.isfinite(masked), 1.5 * e - 0.5 * a, -torch.inf)
        changed += int((scores.argmax(-1) != e.argmax(-1)).sum())
        text = torch.cat([text, scores.argmax(-1)[:, None]], dim=1)
    assert changed > 3
    decoder = cd.ContrastiveDecoder.create(*(decoder for _, decoder in pairs))
    greedy = SamplingConfig(temperature=0.0)
    out = generate(decoder, PROMPTS, LENGTHS, greedy, 12)
    np.testing.assert_array_equal(out.tokens, text[:, 6:].numpy())


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search(pairs, length_penalty):
    theirs, decoder = pairs[0]
    best = beam_search(decoder, PROMPTS, LENGTHS, 3, 10)
    # Ids that beams do reach, one of them at the last step.
    stops = tuple(int(best.tokens[row, 0, step]) for row, step in ((0, 4), (1, 7), (2, 9)))
    out = beam_search(decoder, PROMPTS, LENGTHS, 3, 10, stops, length_penalty)
    expected = theirs.generate(
        torch.tensor(PROMPTS, dtype=torch.long),
        attention_mask=torch.ones(PROMPTS.shape, dtype=torch.long),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=list(stops),
        bos_token_id=None,
        pad_token_id=0,
        length_penalty=length_penalty,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = expected.sequences[:, 6:].numpy().reshape(3, 3, -1)
    written = np.arange(texts.shape[-1]) < np.asarray(out.lengths)[..., None]
    tokens = np.asarray(out.tokens)[:, :, : texts.shape[-1]]
    np.testing.assert_array_equal(tokens[written], texts[written])
    scores = expected.sequences_scores.numpy().reshape(3, 3)
    np.testing.assert_allclose(out.scores, scores, atol=1e-4)
    assert np.asarray(out.finished).any()
