"""Megalodon (arXiv 2404.08801) with statistics of recent tokens alone, as its release generates.

The timestep norms of a stream know all tokens so far, however old. The released code, not the
paper, replaces what they know while it reads a long text: after every second chunk, from the
eighth on, by the statistics of a pass over the last six chunks that starts from nothing; the keys
and values and the moving averages stay.

Departure: the release does so for the text that it is given, there also after an odd last chunk,
not at the very end of a prompt and not for what it generates. Here it is after every second chunk,
whoever wrote it, so that a stream gives the same however it is cut.

With eight chunks reading costs three more passes over every token (of all rows at every
replacement, where rows stand at different places), and the tokens of six chunks are kept.

Axes as in `megalodon_decode`; R tokens that are kept.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from blt_jax.layers import step
from blt_jax.layers.cache import RowCache, ring_index
from blt_jax.layers.losses import target_nats
from blt_jax.models.megalodon import Megalodon, MegalodonCache
from blt_jax.models.megalodon_config import MegalodonConfig, NormKind
from blt_jax.models.megalodon_decode import MegalodonDecoder, check_cache, select_rows

PERIOD = 2
"""Chunks between two replacements: what the release reads at once."""

CHUNKS = 8
"""Chunks before the first replacement, in the release."""


@flax.struct.dataclass
class TruncatedCache(RowCache):
    """cache: a MegalodonCache; recent: int32 [B, R], the last tokens of every row, token p in slot
    p % R."""

    cache: Any
    recent: Any

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: tokens read."""
        return self.cache.lengths


@flax.struct.dataclass
class TruncatedDecoder:
    """A MegalodonDecoder whose norms, after an even number of chunks that is `chunks` or more, know
    the last `chunks` - 2 of them and what comes up to the next replacement."""

    decoder: MegalodonDecoder
    chunks: int = flax.struct.field(pytree_node=False, default=CHUNKS)

    @classmethod
    def create(
        cls,
        model: Megalodon,
        params: dict[str, Any],
        capacity: int = 2**31 - 1,
        chunks: int = CHUNKS,
    ) -> "TruncatedDecoder":
        """Raises ValueError as `check_chunks` and MegalodonDecoder.create."""
        check_chunks("chunks", chunks, model.config)
        return cls(MegalodonDecoder.create(model, params, capacity), chunks)

    @property
    def model(self) -> Megalodon:
        return self.decoder.model

    @property
    def capacity(self) -> int:
        return self.decoder.capacity

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def chunk_size(self) -> int:
        return self.model.config.chunk_size

    @property
    def kept_tokens(self) -> int:
        """Tokens that the statistics are made of again, R."""
        return (self.chunks - PERIOD) * self.chunk_size

    def prepare(self) -> "TruncatedDecoder":
        return self.replace(decoder=self.decoder.prepare())

    def new_cache(self, rows: int) -> TruncatedCache:
        """The state of rows that have read nothing."""
        recent = jnp.zeros((rows, self.kept_tokens), jnp.int32)
        return TruncatedCache(self.decoder.new_cache(rows), recent)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], TruncatedCache]:
        """As Decoder.prefill; prompts that reach a replacement are read in pieces."""
        step.check_prompts(tokens, lengths, self.capacity, self.vocab_size)
        tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)
        if tokens.shape[1] >= self.chunks * self.chunk_size:
            return self.extend(tokens, lengths, self.new_cache(tokens.shape[0]))
        logits, inner = self.decoder.prefill(tokens, lengths)
        index, filled = ring_index(jnp.zeros_like(lengths), lengths, self.kept_tokens)
        recent = jnp.take_along_axis(tokens, index, axis=1, mode="clip").astype(jnp.int32)
        return logits, TruncatedCache(inner, jnp.where(filled, recent, 0))

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Any
    ) -> tuple[Float[Array, "B V"], TruncatedCache]:
        """As MegalodonDecoder.extend, every row up to its next replacement at once; TypeError for
        another decoder's cache."""
        self._check(cache, tokens.shape[0])
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, self.vocab_size)
        decoder, period = self.prepare(), PERIOD * self.chunk_size
        (B, T), lengths = tokens.shape, lengths.astype(jnp.int32)

        def turn(state):
            done, logits, cache = state
            room = period - cache.lengths % period
            piece, counts = _cut(tokens, done, jnp.minimum(lengths - done, room), min(T, period))
            found, inner = decoder.decoder.extend(piece, counts, cache.cache)
            recent = _written(cache.recent, piece, cache.lengths, counts)
            logits = jnp.where((counts > 0)[:, None], found, logits)
            return done + counts, logits, decoder._replaced(inner, recent, counts > 0)

        state = jnp.zeros((B,), jnp.int32), jnp.zeros((B, self.vocab_size), jnp.float32), cache
        state = jax.lax.while_loop(lambda state: jnp.any(state[0] < lengths), turn, state)
        return state[1:]

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: Any,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], TruncatedCache]:
        """As Decoder.step; TypeError for another decoder's cache."""
        self._check(cache, tokens.shape[0])
        active = jnp.ones(tokens.shape, bool) if active is None else active
        logits, inner = self.decoder.step(tokens, cache.cache, active)
        counts = active.astype(jnp.int32)
        recent = _written(cache.recent, tokens[:, None], cache.lengths, counts)
        return logits, self._replaced(inner, recent, active)

    def stream_nats(self, tokens: Shaped[Array | np.ndarray, "B T"]) -> Float[Array, "B U"]:
        """-log p of every token after the first, [B, T - 1], as the release evaluates a long text
        (but for an odd last chunk, see above).

        Raises TypeError for ids that are no integers, and ValueError for fewer than two tokens,
        more than the capacity and, outside jit, ids outside the vocabulary.
        """
        tokens = jnp.asarray(tokens)
        step.check_token_ids("tokens", tokens, self.vocab_size)
        if tokens.ndim != 2 or not 2 <= tokens.shape[1] <= self.capacity:
            raise ValueError(
                f"tokens {tokens.shape}: must be [B, T] with T in 2..capacity={self.capacity}"
            )
        # Rows are read in whole pairs of chunks, the last one with padding.
        longer = self.replace(decoder=self.decoder.replace(capacity=2**31 - 1))
        return _stream_nats(longer, tokens.astype(jnp.int32))

    def _replaced(self, cache: MegalodonCache, recent, advanced) -> TruncatedCache:
        """With the statistics of the last R tokens, in the rows that have just read a last one."""
        c, R, lengths = self.chunk_size, self.kept_tokens, cache.lengths
        if self.capacity < self.chunks * c:
            return TruncatedCache(cache, recent)
        due = advanced & (lengths % (PERIOD * c) == 0) & (lengths >= self.chunks * c)

        def replace(cache):
            order = ((lengths % R)[:, None] + jnp.arange(R, dtype=jnp.int32)[None, :]) % R
            text = jnp.take_along_axis(recent, order, axis=1)
            _, again = self.decoder.prefill(text, jnp.full(lengths.shape, R, jnp.int32))
            layers = tuple(
                old.replace(norm=select_rows(due, new.norm, old.norm))
                for old, new in zip(cache.layers, again.layers, strict=True)
            )
            return cache.replace(layers=layers, norm=select_rows(due, again.norm, cache.norm))

        return TruncatedCache(jax.lax.cond(jnp.any(due), replace, lambda x: x, cache), recent)

    def _check(self, cache: Any, rows: int) -> None:
        if not isinstance(cache, TruncatedCache):
            raise TypeError(f"cache is a {type(cache).__name__}: must be a TruncatedCache")
        check_cache(self.model.config, cache.cache, rows)
        if cache.recent.shape != (rows, self.kept_tokens):
            raise ValueError(
                f"cache: recent is {cache.recent.shape}, but these rows and chunks={self.chunks} "
                f"need {(rows, self.kept_tokens)}"
            )


def check_chunks(name: str, chunks: int, config: MegalodonConfig) -> None:
    """Raises ValueError for fewer than 4 chunks, of which less would be known than is read between
    two replacements, and for a model without timestep norms."""
    if chunks < 2 * PERIOD:
        raise ValueError(f"{name}={chunks}: must be >= {2 * PERIOD} chunks")
    if config.norm is not NormKind.TIMESTEP:
        raise ValueError(f"{name}={chunks}: norm={config.norm.name}, only TIMESTEP has statistics")


def _cut(tokens, start, counts, size: int):
    """`size` tokens of every row from `start` [B] on, 0 after `counts`; and those that fit."""
    counts = jnp.clip(counts, 0, size).astype(jnp.int32)
    index = jnp.arange(size, dtype=jnp.int32)[None, :]
    piece = jnp.take_along_axis(tokens, start[:, None] + index, axis=1, mode="clip")
    return jnp.where(index < counts[:, None], piece.astype(jnp.int32), 0), counts


def _written(recent, tokens, start, counts):
    """The ring after the first `counts` of `tokens` [B, T] at the positions from `start` on."""
    (B, R), index = recent.shape, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    slot = jnp.where(index < counts[:, None], (start[:, None] + index) % R, R)
    rows = jnp.arange(B)[:, None]
    return recent.at[rows, slot].set(tokens.astype(jnp.int32), mode="drop")


@jax.jit
def _stream_nats(decoder: TruncatedDecoder, tokens):
    decoder, size = decoder.prepare(), PERIOD * decoder.chunk_size
    B, T = tokens.shape
    every = jnp.full((B,), size, jnp.int32)

    def pair(cache, inputs):
        logits, inner = decoder.decoder.extend_logits(inputs[0], cache.cache)
        recent = _written(cache.recent, inputs[0], cache.lengths, every)
        return decoder._replaced(inner, recent, every > 0), target_nats(logits, inputs[1])[0]

    inputs = tuple(step.in_pieces(x, size) for x in (tokens[:, :-1], tokens[:, 1:]))
    _, nats = jax.lax.scan(pair, decoder.new_cache(B), inputs)
    return jnp.swapaxes(nats, 0, 1).reshape(B, -1)[:, : T - 1]
