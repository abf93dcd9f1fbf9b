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
from blt_jax.decoding.streaming_llm import (
    Policy,
    Positions,
    Rotation,
    StreamingConfig,
    streaming_decoder,
    streaming_nats,
)
from blt_jax.dist.sharding import init_params
from blt_jax.layers.rope import rope_frequencies
from blt_jax.models import llama3, megalodon
from tests.decoding import streams

LENGTH = 40
TOKENS = np.random.default_rng(0).integers(0, 30, (2, LENGTH)).astype(np.int32)


@functools.cache
def build(num_layers=2, **fields):
    sizes = dict(vocab_size=30, d_model=24, num_heads=4, num_kv_heads=2, mlp_dim=32)
    model = llama3.small(num_layers=num_layers, **{**sizes, **fields}).build()
    params = init_params(model, jax.random.key(1))
    # Large enough that every key counts.
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


CASES = {
    "sinks": streaming_llm.sinks(3, 7),
    "one_sink": streaming_llm.sinks(1, 4),
    "window": streaming_llm.window(8),
    "authors": streaming_llm.sinks(2, 5, include_current=False),
    "original": streaming_llm.sinks(3, 5, positions=Positions.ORIGINAL),
    "window_of_one": streaming_llm.sinks(4, 1),
    "never_full": streaming_llm.sinks(4, 60),
}


@pytest.mark.parametrize("rotation", list(Rotation))
@pytest.mark.parametrize("case", list(CASES))
def test_ring_and_stream_equal_the_loop(case, rotation):
    model, params = build()
    config = dataclasses.replace(CASES[case], rotation=rotation)
    expected = streams.stream_logits(
        model,
        params,
        TOKENS[0],
        config.num_sinks,
        config.window,
        original=config.positions is Positions.ORIGINAL,
        include_current=config.include_current,
    )
    logits, _ = ring(streaming_decoder(model, params, config), jnp.asarray(TOKENS[:1]))
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)
    nats = streaming_nats(model, params, config, TOKENS[:1])
    np.testing.assert_allclose(nats[0], streams.nats(expected, TOKENS[0]), atol=1e-5)
