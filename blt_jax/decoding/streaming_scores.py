"""Scores of whole streams, in few large products (arXiv 2309.17453, section 4.1).

The same function as a decoder of `streaming_decoder` that reads one token at a time.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.decoding.streaming_decoder import (
    RecomputeDecoder,
    StreamingDecoder,
    streaming_decoder,
)
from blt_jax.decoding.streaming_llm import PIECE, Policy, StreamingConfig, piece_size
from blt_jax.layers import step
from blt_jax.layers.losses import target_nats
from blt_jax.layers.model import Model


@flax.struct.dataclass
class StreamScores:
    """Of every token after the first, [B, T - 1]: nats, float32 -log p given those before it;
    correct, whether no token was more probable."""

    nats: Any
    correct: Any


def streaming_nats(
    model: Model,
    params: dict[str, Any],
    config: StreamingConfig,
    tokens: Shaped[Array | np.ndarray, "B T"],
) -> Float[Array, "B U"]:
    """`nats` of `streaming_scores`, [B, T - 1]."""
    return streaming_scores(model, params, config, tokens).nats


def streaming_scores(
    model: Model,
    params: dict[str, Any],
    config: StreamingConfig,
    tokens: Shaped[Array | np.ndarray, "B T"],
) -> StreamScores:
    """Reads whole streams: the same function as the decoder of the policy reading one token at a
    time, in few large products.

    With RECOMPUTE every window predicts its last `stride` tokens. Raises as `streaming_decoder`
    does, TypeError for ids that are no integers, and ValueError for streams of fewer than 2 tokens
    and, outside jit, for ids outside the vocabulary.
    """
    tokens = jnp.asarray(tokens)
    step.check_token_ids("tokens", tokens, model.config.vocab_size)
    if tokens.shape[1] < 2:
        raise ValueError(f"tokens {tokens.shape}: a stream needs at least 2 tokens")
    tokens = tokens.astype(jnp.int32)
    capacity = tokens.shape[1] if config.policy is Policy.DENSE else 0
    decoder = streaming_decoder(model, params, dataclasses.replace(config, stride=1), capacity)
    if config.policy is Policy.DENSE:
        return _dense_scores(decoder, tokens)
    if config.policy is Policy.RECOMPUTE:
        return _recompute_scores(decoder, tokens, config.stride)
    return _ring_scores(decoder, tokens)


def _token_scores(decoder, x, targets) -> StreamScores:
    logits = decoder.model.token_logits(decoder.params, x)
    nats, _, correct = target_nats(logits, targets)
    return StreamScores(nats=nats, correct=correct)


def _joined(scores: StreamScores, length: int) -> StreamScores:
    """[pieces, B, size] as [B, length]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)[:, :length], scores)


@jax.jit
def _ring_scores(decoder: StreamingDecoder, tokens):
    B, T = tokens.shape
    size = piece_size(decoder.config, T - 1)
    decoder = decoder.prepare()
    counts = jnp.full((B,), size, jnp.int32)

    def piece(cache, inputs):
        x, cache = decoder.read(inputs[0], cache, counts)
        return cache, _token_scores(decoder, x, inputs[1])

    inputs = tuple(step.in_pieces(x, size) for x in (tokens[:, :-1], tokens[:, 1:]))
    _, scores = jax.lax.scan(piece, decoder.new_cache(B), inputs)
    return _joined(scores, T - 1)


@jax.jit
def _dense_scores(decoder: TransformerDecoder, tokens):
    B, T = tokens.shape
    model, params = decoder.model, decoder.params
    hidden = model.apply({"params": params}, tokens[:, :-1], compute_logits=False).hidden
    hidden = jnp.pad(hidden, [(0, 0), (0, -(T - 1) % PIECE), (0, 0)])
    hidden = jnp.swapaxes(hidden.reshape(B, -1, PIECE, hidden.shape[-1]), 0, 1)
    inputs = (hidden, step.in_pieces(tokens[:, 1:], PIECE))
    return _joined(jax.lax.map(lambda pair: _token_scores(decoder, *pair), inputs), T - 1)


@functools.partial(jax.jit, static_argnums=2)
def _recompute_scores(decoder: RecomputeDecoder, tokens, stride: int):
    T, C = tokens.shape[1], decoder.config.window
    first = min(C, T - 1)

    def read(text):
        inputs = ({"params": decoder.params}, text[:, :-1])
        hidden = decoder.model.apply(*inputs, compute_logits=False).hidden
        return hidden, text[:, 1:]

    start = _token_scores(decoder, *read(tokens[:, : first + 1]))
    rest = T - 1 - first
    if not rest:
        return start
    # Window n reads the C tokens before first + (n + 1) stride and predicts after the last ones.
    windows = -(-rest // stride)
    padded = jnp.pad(tokens, [(0, 0), (0, windows * stride - rest)])

    def one(number):
        begin = first + (number + 1) * stride - C
        text = jax.lax.dynamic_slice_in_dim(padded, begin, C + 1, axis=1)
        return _token_scores(decoder, *(x[:, -stride:] for x in read(text)))

    batch = max(1, PIECE // C)
    scores = jax.lax.map(one, jnp.arange(windows, dtype=jnp.int32), batch_size=batch)
    pairs = (start, _joined(scores, rest))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *pairs)
