"""Decoders whose logits come from a table: searches and scores by hand."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TableCache:
    lengths: jax.Array

    def take_rows(self, indices):
        return TableCache(self.lengths[indices])

    def counters(self):
        return {"tokens": self.lengths}


@flax.struct.dataclass
class TableDecoder:
    """Logits after `token` as the row reaches `length`: table[length % L, token]."""

    table: jax.Array
    capacity: int = flax.struct.field(pytree_node=False, default=32)

    @property
    def vocab_size(self):
        return self.table.shape[-1]

    def prepare(self):
        return self

    def prefill(self, tokens, lengths):
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        return self._logits(last, lengths), TableCache(lengths.astype(jnp.int32))

    def step(self, tokens, cache, active=None):
        active = True if active is None else active
        lengths = cache.lengths + jnp.asarray(active, jnp.int32)
        return self._logits(tokens, lengths), TableCache(lengths)

    def extend(self, tokens, lengths, cache):
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        lengths = cache.lengths + lengths.astype(jnp.int32)
        return self._logits(last, lengths), TableCache(lengths)

    def _logits(self, tokens, lengths):
        return self.table[lengths % self.table.shape[0], tokens]


def random_table(seed: int, length: int = 5, vocab_size: int = 4, scale: float = 2.0):
    return scale * jax.random.normal(jax.random.key(seed), (length, vocab_size, vocab_size))
