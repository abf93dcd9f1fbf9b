"""A language model of counted n-grams as a Decoder: the weakest amateur (arXiv 2210.15097)."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers import step
from blt_jax.layers.cache import RowCache

LARGEST_TABLE = 2**28
"""Most entries of a table of n-grams."""


def ngram_log_probabilities(
    documents: Iterable[np.ndarray], vocab_size: int, order: int = 3, strength: float = 1.0
) -> np.ndarray:
    """float32 [V, ..., V], `order` axes: log p(last id | the ids before it), oldest first.

    Counts of every order are smoothed by the order below, p_n = (count + strength p_{n-1}) /
    (sum of counts + strength), and p_0 is even. documents: ids [N]; what comes before one counts
    as ids 0. Raises ValueError for ids outside the vocabulary and for a table that is too large.
    """
    if order < 1 or vocab_size**order > LARGEST_TABLE:
        raise ValueError(
            f"order={order}: must be >= 1, and vocab_size={vocab_size} to the power of it at most "
            f"{LARGEST_TABLE}"
        )
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength={strength}: must be above 0")
    counts = np.zeros((vocab_size,) * order)
    for ids in documents:
        step.check_token_ids("documents", ids, vocab_size)
        padded = np.concatenate([np.zeros(order - 1, ids.dtype), ids])
        windows = np.lib.stride_tricks.sliding_window_view(padded, order)
        np.add.at(counts, tuple(windows.T), 1.0)
    p = np.full((vocab_size,), 1 / vocab_size)
    for size in range(1, order + 1):
        seen = counts.sum(axis=tuple(range(order - size)))
        p = (seen + strength * p) / (seen.sum(axis=-1, keepdims=True) + strength)
    return np.log(p).astype(np.float32)


@flax.struct.dataclass
class NgramCache(RowCache):
    """context: int32 [B, N - 1], the last ids, oldest first, 0 before a row begins; lengths [B]."""

    context: Any
    lengths: Any


@flax.struct.dataclass
class NgramDecoder:
    """Decoder that reads the logits of the next id off a table [V, ..., V] of n-grams.

    log_probabilities: of `ngram_log_probabilities`. Rows may be of any length.
    """

    log_probabilities: Any

    capacity = 2**31 - 1
    """Bounded by the type of the lengths alone."""

    @property
    def vocab_size(self) -> int:
        return self.log_probabilities.shape[-1]

    def prepare(self) -> "NgramDecoder":
        return self

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], NgramCache]:
        """As Decoder.prefill."""
        rows, N = tokens.shape[0], self.log_probabilities.ndim
        context, none = jnp.zeros((rows, N - 1), jnp.int32), jnp.zeros((rows,), jnp.int32)
        return self.extend(tokens, lengths, NgramCache(context=context, lengths=none))

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: NgramCache
    ) -> tuple[Float[Array, "B V"], NgramCache]:
        """As Decoder.extend."""
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, self.vocab_size)
        lengths = lengths.astype(jnp.int32)
        ids = jnp.concatenate([cache.context, tokens.astype(jnp.int32)], axis=1)
        last = lengths[:, None] + jnp.arange(cache.context.shape[1], dtype=jnp.int32)[None, :]
        context = jnp.take_along_axis(ids, last, axis=1)
        cache = NgramCache(context=context, lengths=cache.lengths + lengths)
        return self._logits(cache), cache

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: NgramCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], NgramCache]:
        """As Decoder.step."""
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        active = jnp.ones(tokens.shape, bool) if active is None else active
        longer = jnp.concatenate([cache.context, tokens.astype(jnp.int32)[:, None]], axis=1)
        context = jnp.where(active[:, None], longer[:, 1:], cache.context)
        cache = NgramCache(context=context, lengths=cache.lengths + active.astype(jnp.int32))
        return self._logits(cache), cache

    def _logits(self, cache: NgramCache):
        if self.log_probabilities.ndim == 1:
            shape = (cache.lengths.shape[0], self.vocab_size)
            return jnp.broadcast_to(self.log_probabilities[None, :], shape)
        table = jnp.asarray(self.log_probabilities)
        return table.at[tuple(cache.context.T)].get(mode="fill", fill_value=jnp.nan)
