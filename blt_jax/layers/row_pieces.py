"""Rows cut into pieces that lie on different devices: what a piece needs of those before it.

Context parallelism divides every row into pieces of equal size along the length. A row of tokens
is divided where it falls. A row of patches is cut between patches: every piece then holds whole
patches, its tokens come first and padding fills it up (`data.packing`).

Axis letters: C pieces held here, M tokens of a piece.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def split(x: jax.Array, pieces: int) -> jax.Array:
    """[B, C M, ...] as [B, C, M, ...]."""
    return x.reshape(x.shape[0], pieces, x.shape[1] // pieces, *x.shape[2:])


def last_tokens(
    x: jax.Array, real: Bool[Array, "B C M"] | None, size: int
) -> tuple[jax.Array, Bool[Array, "B C W"]]:
    """The last `size` tokens of every piece of x [B, C, M, ...], and which of them there are.

    real: the tokens that count, which come first in every piece; None: all.
    """
    B, C, M = x.shape[:3]
    count = jnp.full((B, C), M, jnp.int32) if real is None else real.sum(-1, dtype=jnp.int32)
    index = count[..., None] - size + jnp.arange(size, dtype=jnp.int32)[None, None, :]
    at = jnp.clip(index, 0, M - 1).reshape(B, C, size, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, at, axis=2), index >= 0


def from_previous(x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """x [B, C, ...] of the piece before each one, 0 for the first piece of a row.

    axes: mesh axes over which the pieces of a row are divided, inside `shard_by_names`.
    """
    first = jnp.zeros_like(x[:, :1])
    if axes:
        devices = math.prod(lax.axis_size(axis) for axis in axes)
        first = lax.ppermute(x[:, -1:], axes, [(i, i + 1) for i in range(devices - 1)])
    return jnp.concatenate([first, x[:, :-1]], axis=1)


def with_previous_tokens(
    tokens: Int[Array, "B N"], segment_ids: Int[Array, "B N"], pieces: int, size: int
) -> Int[Array, "B C W"]:
    """The tokens of every piece [B, C, size + M] after the last `size` of the piece before it."""
    x, real = split(tokens, pieces), split(segment_ids, pieces) > 0
    last, there = last_tokens(x, real, size)
    return jnp.concatenate([from_previous(jnp.where(there, last, 0)), x], axis=2)


def check_divisible(length: int, pieces: int, devices: int) -> None:
    """ValueError unless `length` divides into `pieces`, and these over `devices`."""
    if length % pieces:
        raise ValueError(f"rows of {length} cannot be divided into {pieces} pieces")
    if pieces % devices:
        raise ValueError(
            f"rows cut into {pieces} pieces cannot be divided over {devices} devices of the "
            "context axis: row_pieces must be a multiple of them"
        )
