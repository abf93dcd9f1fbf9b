"""Scores of given continuations, token by token, for every Decoder."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from blt_jax.decoding.decoder import Decoder
from blt_jax.layers.embed import check_token_ids
from blt_jax.layers.step import check_prompts, check_room


@flax.struct.dataclass
class ContinuationScores:
    """token_scores: float32 [B, C, M], 0 after the end of a continuation; scores: float32
    [B, C], their sums."""

    token_scores: Any
    scores: Any


def score_continuations(
    decoder: Decoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    continuations: Shaped[Array | np.ndarray, "B C M"],
    continuation_lengths: Shaped[Array | np.ndarray, "B C"],
    normalize: bool = True,
) -> ContinuationScores:
    """Log-probability in nats of C right-padded continuations of every right-padded prompt.

    A prompt is read once. normalize: False takes the decoder's output as token scores, for
    decoders that give comparable ones (`contrastive_decoding`). Raises ValueError for an empty
    continuation, ids outside the vocabulary, rows beyond the capacity, and as Decoder.prefill.
    """
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    continuations = jnp.asarray(continuations)
    continuation_lengths = jnp.asarray(continuation_lengths)
    B, C, M = continuations.shape
    if continuation_lengths.shape != (B, C) or tokens.shape[0] != B:
        raise ValueError(
            f"continuations {(B, C, M)} with lengths {continuation_lengths.shape} and "
            f"{tokens.shape[0]} prompts: must be [B, C, M], [B, C] and B"
        )
    _check_continuations(continuations, continuation_lengths, decoder.vocab_size)
    check_prompts(tokens, lengths, decoder.capacity, decoder.vocab_size)
    # The last token of a row is not read.
    check_room(lengths, int(jnp.max(continuation_lengths)) - 1, decoder.capacity)
    return _score(decoder, tokens, lengths, continuations, continuation_lengths, normalize)


def _check_continuations(continuations, lengths, vocab_size):
    lengths, longest = np.asarray(lengths), continuations.shape[-1]
    if lengths.min() < 1 or lengths.max() > longest:
        raise ValueError(f"continuation_lengths={lengths.tolist()}: must be 1..{longest}")
    real = np.arange(longest) < lengths[..., None]
    check_token_ids("continuations", continuations, vocab_size, real)


@functools.partial(jax.jit, static_argnums=5)
def _score(decoder, tokens, lengths, continuations, continuation_lengths, normalize):
    decoder = decoder.prepare()
    B, C, M = continuations.shape
    logits, cache = decoder.prefill(tokens, lengths)
    cache = cache.take_rows(jnp.repeat(jnp.arange(B, dtype=jnp.int32), C))
    logits = jnp.repeat(logits, C, axis=0)
    lengths_N = continuation_lengths.reshape(B * C)
    tokens_MN = continuations.reshape(B * C, M).T

    def token_score(logits, token):
        scores = token_scores(logits, normalize)
        return jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]

    def body(carry, inputs):
        index, previous, token = inputs
        logits, cache = decoder.step(previous, carry, index < lengths_N)
        return cache, token_score(logits, token)

    first = token_score(logits, tokens_MN[0])
    inputs = (jnp.arange(1, M, dtype=jnp.int32), tokens_MN[:-1], tokens_MN[1:])
    _, rest = jax.lax.scan(body, cache, inputs)
    scores_NM = jnp.concatenate([first[None], rest]).T
    real_NM = jnp.arange(M)[None, :] < lengths_N[:, None]
    scores_BCM = jnp.where(real_NM, scores_NM, 0.0).reshape(B, C, M)
    return ContinuationScores(token_scores=scores_BCM, scores=jnp.sum(scores_BCM, axis=-1))


def token_scores(logits: Float[Array, "*B V"], normalize: bool) -> Float[Array, "*B V"]:
    """What sums over a continuation: float32 log-probabilities, or the logits as they are."""
    logits = logits.astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1) if normalize else logits


def rank(
    scores: Float[Array | np.ndarray, "B C"], sizes: Shaped[Array | np.ndarray, "B C"] | None = None
) -> Int[np.ndarray, "B C"]:
    """Continuations from best to worst, by score per unit of `sizes` (None: by the sum).

    sizes: UTF-8 bytes of the continuations for a byte-normalised ranking, or their tokens.
    Raises ValueError for sizes that are not above 0.
    """
    scores = np.asarray(scores, np.float64)
    if sizes is not None:
        sizes = np.asarray(sizes)
        if sizes.shape != scores.shape or sizes.min() <= 0:
            raise ValueError(f"sizes={sizes.tolist()}: must be above 0, of shape {scores.shape}")
        scores = scores / sizes
    return np.argsort(-scores, axis=-1, kind="stable")
