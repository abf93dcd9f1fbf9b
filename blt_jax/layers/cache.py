"""Key-value cache of a stack of attention layers."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

FIRST_CHUNK = 128


def chunk_sizes(slots: int) -> tuple[int, ...]:
    """Sizes of the chunks that make up `slots`: each about as large as all before it together."""
    sizes = []
    while (used := sum(sizes)) < slots:
        size = max(used, FIRST_CHUNK)
        rest = slots - used - size
        sizes.append(size if 4 * rest > size else slots - used)
    return tuple(sizes)


class RowCache:
    """What the caches of decoders share: trees with the batch axis first in every array, and
    `lengths`, int32 [B], the tokens that rows have read."""

    lengths: Any

    def take_rows(self, indices) -> "RowCache":
        """The cache of rows `indices` [B'], for beams and compaction."""
        return jax.tree.map(lambda x: x[indices], self)

    def counters(self) -> dict[str, jax.Array]:
        """int32 [B] each, what a step increases."""
        return {"tokens": self.lengths}


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, read only as far as they are filled.

    key, value: tuples of arrays [B, G, S_c, K], consecutive chunks of slots that double in size.
    Layers and chunks are arrays of their own because XLA:CPU copies a slice before it multiplies
    with it, which costs more than the product.
    """

    key: Any
    value: Any

    @classmethod
    def create(cls, batch, num_kv_heads, slots, head_dim, dtype) -> "LayerCache":
        def zeros():
            shapes = [(batch, num_kv_heads, size, head_dim) for size in chunk_sizes(slots)]
            return tuple(jnp.zeros(shape, dtype) for shape in shapes)

        return cls(key=zeros(), value=zeros())

    @classmethod
    def from_rows(cls, key, value, first, end, slots, dtype, pinned=0) -> "LayerCache":
        """From key and value [B, T, G, K]: tokens first..end-1 of each row are 0.. of the cache.

        Of more tokens than slots the last stay, token p in slot p % slots. pinned: so many tokens
        in front of these, which keep the first slots.
        """
        index_BS, filled_BS = ring_index(first, end, slots - pinned)
        if pinned:
            front_BS = jnp.broadcast_to(jnp.arange(pinned, dtype=jnp.int32), (len(first), pinned))
            index_BS = jnp.concatenate([front_BS, pinned + index_BS], axis=1)
            filled_BS = jnp.concatenate([front_BS >= 0, filled_BS], axis=1)
        index_BS = jnp.clip(index_BS, 0, key.shape[1] - 1)

        def place(x):
            x = jnp.take_along_axis(x, index_BS[:, :, None, None], axis=1)
            return jnp.where(filled_BS[:, :, None, None], x, 0)

        return cls.from_slots(place(key), place(value), dtype)

    @classmethod
    def from_slots(cls, key, value, dtype) -> "LayerCache":
        """From what lies in the slots: key and value [B, S, G, K]."""
        ends = np.cumsum(chunk_sizes(key.shape[1]))[:-1].tolist()

        def chunks(x):
            return tuple(jnp.split(jnp.swapaxes(x.astype(dtype), 1, 2), ends, axis=2))

        return cls(key=chunks(key), value=chunks(value))

    @property
    def slots(self) -> int:
        return sum(chunk.shape[2] for chunk in self.key)

    def write(self, key, value, slot, rows=None) -> "LayerCache":
        """Writes key, value [C, G, K] into `slot` [C] of `rows` [C], None for all in order.

        Slots outside 0..slots-1 and rows outside 0..B-1 write nothing. Write before reading:
        XLA:CPU copies a buffer that is read and afterwards written.
        """

        def place(chunks, x):
            written, start = [], 0
            for chunk in chunks:
                B, G, S, K = chunk.shape
                row = jnp.arange(G, dtype=jnp.int32)
                every = jnp.arange(B, dtype=jnp.int32) if rows is None else rows
                row = (every[:, None] * G + row[None, :]).reshape(-1)
                inside = (slot >= start) & (slot < start + S)
                index = jnp.repeat(jnp.where(inside, slot - start, S), G)
                # One axis of rows and heads: with B = 1 the axis of size 1 would cost two copies.
                flat = chunk.reshape(B * G, S, K)
                flat = flat.at[row, index].set(x.reshape(-1, K).astype(chunk.dtype), mode="drop")
                written.append(flat.reshape(chunk.shape))
                start += S
            return tuple(written)

        return LayerCache(key=place(self.key, key), value=place(self.value, value))


def ring_index(first, end, slots):
    """Row index [B, S] of the token in each slot, and whether there is one; tokens first..end-1 of
    each row are 0.. of the cache, and token p lies in slot p % slots."""
    slot_S = jnp.arange(slots, dtype=jnp.int32)[None, :]
    last_B1 = (end - first)[:, None] - 1
    position_BS = last_B1 - (last_B1 - slot_S) % slots
    return first[:, None] + position_BS, position_BS >= 0


@flax.struct.dataclass
class StepCache(RowCache):
    """Cache of a stack of layers for one-token steps; position p of a row lies in slot p % slots.

    layers: tuple of LayerCache; lengths: int32 [B], tokens written so far per row. With a sliding
    window the slots are those of the window, and old ones are overwritten. pinned: slots in front
    of those, whose tokens stay and are not counted.
    """

    layers: Any
    lengths: Any
    pinned: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def create(cls, num_layers, batch, num_kv_heads, slots, head_dim, dtype) -> "StepCache":
        layer = LayerCache.create(batch, num_kv_heads, slots, head_dim, dtype)
        return cls(layers=(layer,) * num_layers, lengths=jnp.zeros((batch,), jnp.int32))

    @classmethod
    def from_prefill(cls, key, value, lengths, slots, dtype, first=None, pinned=0) -> "StepCache":
        """From key and value [L, B, T, G, K] of a full forward pass over right-padded rows.

        first [B]: tokens before it are left out (0); lengths [B]: tokens of the row. pinned: so
        many tokens in front of these, with slots of their own among `slots`.
        """
        first = jnp.zeros_like(lengths) if first is None else first
        layers = tuple(
            LayerCache.from_rows(k, v, first, lengths, slots, dtype, pinned)
            for k, v in zip(key, value, strict=True)
        )
        return cls(layers=layers, lengths=lengths - first, pinned=pinned)

    @property
    def slots(self) -> int:
        return self.layers[0].slots

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, layers, slots, key-value heads, their width, pinned slots."""
        rows, heads, _, width = self.layers[0].key[0].shape
        return rows, len(self.layers), self.slots, heads, width, self.pinned

    def lengths_of(self, rows=None) -> jax.Array:
        """int32 [C]: the lengths of `rows` [C], of all rows if None."""
        return self.lengths if rows is None else jnp.take(self.lengths, rows, mode="clip")

    def next_slot(self, active=None, rows=None) -> jax.Array:
        """int32 [C]: where the next token of `rows` [C] (None: all) goes; outside the cache for
        those not `active` [C]."""
        slot = self.pinned + self.lengths_of(rows) % (self.slots - self.pinned)
        return slot if active is None else jnp.where(active, slot, self.slots)

    def distances(self, rows=None) -> jax.Array:
        """int32 [C, S]: from the next token of `rows` [C] (None: all) to the token in every slot,
        0 in its own; of slots not yet filled it says nothing."""
        length_C1 = self.lengths_of(rows)[:, None]
        slot_S = jnp.arange(self.slots, dtype=jnp.int32)[None, :] - self.pinned
        ring_CS = (length_C1 - slot_S) % (self.slots - self.pinned)
        return jnp.where(slot_S < 0, length_C1 - slot_S, ring_CS)
