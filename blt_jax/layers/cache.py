"""Key-value cache of a stack of attention layers."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) and values of all layers; position p of a row lies in slot p % S.

    key, value: [L, B, G, S, K]; lengths: int32 [B], tokens written so far per row. With a sliding
    window, S = window and old slots are overwritten; otherwise S is the capacity.
    """

    key: Any
    value: Any
    lengths: Any

    @classmethod
    def create(cls, num_layers, batch, num_kv_heads, slots, head_dim, dtype) -> "KVCache":
        shape = (num_layers, batch, num_kv_heads, slots, head_dim)
        return cls(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def slots(self) -> int:
        return self.key.shape[3]

    def append(self, key, value, active=None) -> "KVCache":
        """Writes one token per row, key and value [L, B, 1, G, K]; rows not `active` [B] keep."""
        active = jnp.ones_like(self.lengths, bool) if active is None else active
        rows = jnp.arange(self.lengths.shape[0])
        slot = jnp.where(active, self.lengths % self.slots, self.slots)  # out of range: dropped
        new_key = jnp.transpose(key[:, :, 0], (1, 0, 2, 3)).astype(self.key.dtype)
        new_value = jnp.transpose(value[:, :, 0], (1, 0, 2, 3)).astype(self.value.dtype)
        return KVCache(
            key=self.key.at[:, rows, :, slot].set(new_key, mode="drop"),
            value=self.value.at[:, rows, :, slot].set(new_value, mode="drop"),
            lengths=self.lengths + active.astype(jnp.int32),
        )

    @classmethod
    def from_prefill(cls, key, value, lengths, slots, dtype) -> "KVCache":
        """From right-padded key and value [L, B, T, G, K] of a full forward pass."""
        T = key.shape[2]
        slot_S = jnp.arange(slots)[None, :]
        # The last position of each row that falls in a slot; negative where there is none.
        position_BS = (lengths[:, None] - 1) - (lengths[:, None] - 1 - slot_S) % slots
        index = jnp.clip(position_BS, 0, T - 1)[None, :, :, None, None]
        filled = (position_BS >= 0)[None, :, :, None, None]

        def place(x):
            x = jnp.where(filled, jnp.take_along_axis(x, index, axis=2), 0).astype(dtype)
            return jnp.swapaxes(x, 2, 3)

        return cls(key=place(key), value=place(value), lengths=lengths)

    def valid(self) -> jax.Array:
        """bool [B, S]: slots that hold a token."""
        return jnp.arange(self.slots)[None, :] < jnp.minimum(self.lengths, self.slots)[:, None]

    def take_rows(self, indices) -> "KVCache":
        """The cache of rows `indices` [B'], for beams and compaction."""
        return KVCache(self.key[:, indices], self.value[:, indices], self.lengths[indices])
