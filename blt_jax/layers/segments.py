"""Documents of packed rows, read off the segment ids: 0 = padding, 1.. = documents."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def index_of_last(flag: Bool[Array, "B T"], none: int = 0) -> Int[Array, "B T"]:
    """Index of the last true position up to and including each position, `none` <= 0 if none."""
    index = jax.lax.broadcasted_iota(jnp.int32, flag.shape, 1)
    return jax.lax.cummax(jnp.where(flag, index, none), axis=1)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the first token of every document (and of the padding)."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every token within its document piece, from 0."""
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    return index - index_of_last(segment_starts(segment_ids))
