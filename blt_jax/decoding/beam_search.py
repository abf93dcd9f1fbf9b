"""Beam search over any Decoder, in one compiled program."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.scoring import token_scores
from blt_jax.layers.step import check_prompts, check_room


@flax.struct.dataclass
class Beams:
    """The best continuations, best first.

    tokens: int32 [B, K, M], stop ids included, 0 after the end; lengths: int32 [B, K]; scores:
    float32 [B, K], sum of token scores over length ** length_penalty, -inf where there are fewer
    than K continuations; finished: bool [B, K], whether it ended with a stop id.
    """

    tokens: Any
    lengths: Any
    scores: Any
    finished: Any


def beam_search(
    decoder: Decoder,
    tokens: Shaped[Array | np.ndarray, "B T"],
    lengths: Shaped[Array | np.ndarray, " B"],
    num_beams: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    length_penalty: float = 0.0,
    normalize: bool = True,
) -> Beams:
    """Keeps `num_beams` unfinished and as many finished continuations of every prompt.

    One finishes where a stop id makes it one of the `num_beams` best of its step. Scores are sums
    of log-probabilities; normalize: False sums the decoder's output as it is
    (`contrastive_decoding`). A row ends early when no continuation can still become better.
    length_penalty: above 0 favours long ones, 0 compares sums. Raises ValueError for settings
    below their least value, rows beyond the capacity, and as Decoder.prefill does.
    """
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty={length_penalty}: must be >= 0")
    for stop in stop_ids:
        if not 0 <= stop < decoder.vocab_size:
            raise ValueError(f"stop_ids={stop_ids}: must be 0..{decoder.vocab_size - 1}")
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    check_prompts(tokens, lengths, decoder.capacity, decoder.vocab_size)
    check_room(lengths, max_new_tokens, decoder.capacity)
    settings = (num_beams, max_new_tokens, tuple(stop_ids), normalize)
    return _search(decoder, tokens, lengths, jnp.float32(length_penalty), *settings)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _search(decoder, tokens, lengths, length_penalty, K, M, stop_ids, normalize):
    decoder, B, V = decoder.prepare(), tokens.shape[0], decoder.vocab_size
    logits, cache = decoder.prefill(tokens, lengths)
    cache = cache.take_rows(jnp.repeat(jnp.arange(B, dtype=jnp.int32), K))
    # One beam at the start: K equal ones would give every continuation K times.
    alive_scores = jnp.where(jnp.arange(K)[None, :] == 0, 0.0, -jnp.inf)
    nothing = Beams(
        tokens=jnp.zeros((B, K, M), jnp.int32),
        lengths=jnp.zeros((B, K), jnp.int32),
        scores=jnp.full((B, K), -jnp.inf),
        finished=jnp.zeros((B, K), bool),
    )
    alive = nothing.replace(scores=jnp.broadcast_to(alive_scores, (B, K)))

    def expand(index, logits, alive, done):
        """The beams after one more token, and the row of the cache that each continues."""
        scores_BKV = token_scores(logits, normalize).reshape(B, K, V) + alive.scores[..., None]
        # Of the candidates of one beam, len(stop_ids) end it: so many leave K that go on.
        count = min(K * (1 + len(stop_ids)), K * V)
        scores, flat = jax.lax.top_k(scores_BKV.reshape(B, K * V), count)
        beam, token = flat // V, flat % V
        texts = jnp.take_along_axis(alive.tokens, beam[..., None], axis=1)
        stops = jnp.zeros(token.shape, bool)
        for stop in stop_ids:
            stops |= token == stop
        candidates = Beams(
            tokens=texts.at[:, :, index].set(token),
            lengths=jnp.full_like(token, index + 1),
            scores=scores,
            finished=stops,
        )
        going = jnp.where(stops, -jnp.inf, scores)
        alive, places = _best(candidates.replace(scores=going), K)
        ranked = jnp.arange(count)[None, :] < K
        ended = jnp.where(
            stops & ranked, scores / jnp.float32(index + 1) ** length_penalty, -jnp.inf
        )
        done, _ = _best(_join(done, candidates.replace(scores=ended)), K)
        return alive, done, jnp.take_along_axis(beam, places, axis=1)

    def can_improve(alive, done):
        if not normalize:
            return jnp.any(jnp.isfinite(alive.scores))
        # Sums of log-probabilities only fall, and length helps at most up to M tokens.
        bound = jnp.max(alive.scores, axis=1) / jnp.float32(M) ** length_penalty
        return jnp.any(bound > jnp.min(done.scores, axis=1))

    def body(state):
        index, alive, done, cache = state
        token = jax.lax.dynamic_index_in_dim(alive.tokens, index - 1, axis=2, keepdims=False)
        logits, cache = decoder.step(token.reshape(B * K), cache)
        alive, done, beam = expand(index, logits, alive, done)
        first_B1 = jnp.arange(B, dtype=jnp.int32)[:, None] * K
        return index + 1, alive, done, cache.take_rows((first_B1 + beam).reshape(B * K))

    alive, done, _ = expand(jnp.int32(0), jnp.repeat(logits, K, axis=0), alive, nothing)
    state = (jnp.int32(1), alive, done, cache)
    state = jax.lax.while_loop(lambda s: (s[0] < M) & can_improve(s[1], s[2]), body, state)
    index, alive, done, _ = state
    cut = alive.scores / jnp.float32(index) ** length_penalty
    return _best(_join(done, alive.replace(scores=cut)), K)[0]


def _join(a: Beams, b: Beams) -> Beams:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)


def _best(beams: Beams, K: int) -> tuple[Beams, jax.Array]:
    """The K best of every row, best first, and their places [B, K]."""
    _, places = jax.lax.top_k(beams.scores, K)
    rows = jnp.arange(places.shape[0])[:, None]
    return jax.tree.map(lambda x: x[rows, places], beams), places
