"""Which patch each byte belongs to, in the form the implementations work on.

`rows_BT` is never decreasing and within 0..P-1 everywhere: a byte that is not seen takes the row
before it. `seen_BT` says which bytes count.
"""

import jax
import jax.numpy as jnp
from jax import lax


def sorted_rows(ids_BT: jax.Array, num_patches: int) -> tuple[jax.Array, jax.Array]:
    """rows_BT and seen_BT of patch ids."""
    seen_BT = (ids_BT >= 0) & (ids_BT < num_patches)
    return lax.cummax(jnp.where(seen_BT, ids_BT, 0), axis=1), seen_BT


def shifted_rows(
    rows_BT, seen_BT, shift, num_patches, segment_ids_BT, patch_segment_ids_BP
) -> tuple[jax.Array, jax.Array]:
    """Rows of the patch `shift` after each byte's own (before it if negative), and which exist.

    With segments, only patches of the byte's own segment are seen.
    """
    shifted_BT = rows_BT + shift
    seen_BT = seen_BT & (shifted_BT >= 0) & (shifted_BT < num_patches)
    rows_BT = jnp.clip(shifted_BT, 0, num_patches - 1)
    if segment_ids_BT is not None:
        seen_BT &= segment_ids_BT == take(patch_segment_ids_BP, rows_BT)
    return rows_BT, seen_BT


def take(x_BP: jax.Array, rows_BT: jax.Array) -> jax.Array:
    """x[b, rows[b, t]] for x[B, P, ...]; rows are a batch axis of the gather."""

    def take_row(x_P, rows_T):
        return x_P.at[rows_T].get(indices_are_sorted=True, mode="promise_in_bounds")

    return jax.vmap(take_row)(x_BP, rows_BT)


def tie_dtype(dtype) -> jnp.dtype:
    """The dtype of how many bytes share an extreme: float16 ends at 65,504."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def shared(g_BPX: jax.Array, weight_BPX: jax.Array) -> jax.Array:
    """The part of g that each of `weight` bytes gets, in g's dtype."""
    wide = tie_dtype(g_BPX.dtype)
    weight_BPX = jnp.maximum(weight_BPX, jnp.ones((), weight_BPX.dtype)).astype(wide)
    return (g_BPX.astype(wide) / weight_BPX).astype(g_BPX.dtype)
