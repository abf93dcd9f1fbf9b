"""Before anything is evicted, the rolling cache gives the logits of LlamaForCausalLM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from blt_jax.decoding.streaming_decoder import streaming_decoder
from blt_jax.decoding.streaming_llm import Rotation, sinks
from blt_jax.decoding.streaming_scores import streaming_nats
from blt_jax.interop import hugging_face
from tests.parity.test_llama3 import peer, random_ids


@pytest.mark.parametrize("case", ["grouped", "scaled"])
def test_logits_before_eviction(case, tmp_path):
    theirs = peer(case)
    theirs.save_pretrained(tmp_path)
    model, params = hugging_face.load_pretrained(tmp_path)
    ids = random_ids(shape=(2, 33))
    with torch.no_grad():
        logits = theirs(torch.tensor(ids, dtype=torch.long)).logits
    expected = logits[:, 31].numpy()
    log_p = torch.log_softmax(logits.double(), -1)[:, :-1]
    targets = torch.tensor(ids[:, 1:], dtype=torch.long)
    nats = -log_p.gather(-1, targets[..., None])[..., 0].numpy()
    for rotation in Rotation:
        config = sinks(4, 28, rotation=rotation)
        decoder = streaming_decoder(model, params, config)
        _, cache = jax.jit(type(decoder).prefill)(
            decoder, jnp.asarray(ids[:, :31]), jnp.full(2, 31)
        )
        found, _ = jax.jit(type(decoder).step)(decoder, jnp.asarray(ids[:, 31]), cache)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        scores = streaming_nats(model, params, config, ids[:, :33])
        np.testing.assert_allclose(scores[:, :31], nats[:, :31], atol=1e-5)
