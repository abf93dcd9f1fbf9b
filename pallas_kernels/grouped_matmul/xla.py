"""The portable form: a batched product over equal blocks, and a loop over tiles for the rest.

The first C rows of every group form one block [g, C, k], multiplied by the weights where they lie.
Rows beyond C follow in tiles of T rows, one weight slice per tile, in a loop over the tiles in use.
C is one of a few static capacities, taken at run time from the sizes: about the mean for balanced
groups, where the batched product runs nearly as fast as a dense one; 0 for very uneven ones.
No array is larger than rows + groups * T, no work is done for groups times rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.reference import accumulator
from pallas_kernels.grouped_matmul.sequential import one_by_one

# Capacities as multiples of the mean group; 0 leaves all rows to the tiles.
CAPACITIES = (0.0, 1.0, 1.125, 1.25, 1.5)
# What a tile costs besides its rows, in rows: the weight slice is copied and packed once per tile.
ROWS_PER_TILE = 128
LARGEST_TILE = 256


def gmm(lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling) -> jax.Array:
    """See `api.gmm`."""
    del tiling

    def product(lhs, rhs, metadata):
        branches = [
            functools.partial(_gmm, capacity, transpose_rhs, out_dtype)
            for capacity in _capacities(metadata)
        ]
        return lax.switch(_cheapest(metadata), branches, lhs, rhs, metadata)

    return one_by_one(product)(lhs, rhs, metadata)


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling) -> jax.Array:
    """See `api.tgmm`."""
    del tiling

    def product(lhs, dout, metadata):
        branches = [
            functools.partial(_tgmm, capacity, out_dtype) for capacity in _capacities(metadata)
        ]
        return lax.switch(_cheapest(metadata), branches, lhs, dout, metadata)

    return one_by_one(product)(lhs, dout, metadata)


def gradients(lhs, rhs, dout, metadata: GroupMetadata, transpose_rhs) -> tuple:
    """Both gradients of `gmm` at `dout`, which is brought into blocks once for the two."""

    def products(lhs, rhs, dout, metadata):
        branches = [
            functools.partial(_gradients, capacity, transpose_rhs)
            for capacity in _capacities(metadata)
        ]
        return lax.switch(_cheapest(metadata), branches, lhs, rhs, dout, metadata)

    return one_by_one(products)(lhs, rhs, dout, metadata)


def _gradients(capacity, transpose_rhs, lhs, rhs, dout, metadata) -> tuple:
    d_lhs = _gmm(capacity, not transpose_rhs, lhs.dtype, dout, rhs, metadata)
    pair = (dout, lhs) if transpose_rhs else (lhs, dout)
    return d_lhs, _tgmm(capacity, rhs.dtype, *pair, metadata)


def _gmm(capacity, transpose_rhs, out_dtype, lhs, rhs, metadata) -> jax.Array:
    contracted, columns = (2, 1) if transpose_rhs else (1, 2)
    tiles = _Tiles(metadata, capacity)
    if capacity:
        product = _dot(_block(lhs, metadata, capacity), rhs, (((2,), (contracted,)), ((0,), (0,))))
        out = _from_block(product.astype(out_dtype), metadata)
    else:
        out = jnp.zeros((lhs.shape[0], rhs.shape[columns]), out_dtype)

    def multiply_tile(index, out):
        weight = lax.dynamic_index_in_dim(rhs, tiles.groups[index], keepdims=False)
        start, own = tiles.rows(index)
        rows = lax.dynamic_slice_in_dim(lhs, start, tiles.size)
        product = _dot(rows, weight, (((1,), (contracted - 1,)), ((), ())))
        others = lax.dynamic_slice_in_dim(out, start, tiles.size)
        product = jnp.where(own[:, None], product.astype(out_dtype), others)
        return lax.dynamic_update_slice_in_dim(out, product, start, 0)

    return lax.fori_loop(0, tiles.number, multiply_tile, out)


def _from_block(block, metadata) -> jax.Array:
    """Rows [m, n] from blocks [g, C, n], 0 where a row is in no block."""
    num_groups, capacity, num_columns = block.shape
    group = jnp.minimum(metadata.row_groups, np.int32(num_groups - 1))
    position = jnp.arange(metadata.num_rows, dtype=jnp.int32) - metadata.starts[group]
    inside = (position < capacity) & (metadata.row_groups < num_groups)
    source = group * capacity + jnp.clip(position, 0, capacity - 1)
    rows = _take(block.reshape(-1, num_columns), source)
    return jnp.where(inside[:, None], rows, jnp.zeros((), block.dtype))


def _tgmm(capacity, out_dtype, lhs, dout, metadata) -> jax.Array:
    tiles = _Tiles(metadata, capacity)
    if capacity:
        blocks = [_block(x, metadata, capacity) for x in (lhs, dout)]
        out = _dot(*blocks, (((1,), (1,)), ((0,), (0,))))
    else:
        shape = (metadata.num_local_groups, lhs.shape[1], dout.shape[1])
        out = jnp.zeros(shape, accumulator(lhs.dtype))

    def add_tile(index, out):
        start, own = tiles.rows(index)
        rows = [_only(own, lax.dynamic_slice_in_dim(x, start, tiles.size)) for x in (lhs, dout)]
        product = _dot(*rows, (((0,), (0,)), ((), ())))
        return out.at[tiles.groups[index]].add(product, mode="promise_in_bounds")

    return lax.fori_loop(0, tiles.number, add_tile, out).astype(out_dtype)


def _only(own, x) -> jax.Array:
    """x where `own` holds, 0 elsewhere, whatever x holds there."""
    return jnp.where(own[..., None], x, jnp.zeros((), x.dtype))


def _dot(lhs, rhs, numbers) -> jax.Array:
    return lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulator(lhs.dtype))


def _take(x, rows) -> jax.Array:
    return x.at[rows].get(mode="clip")


def _block(x, metadata, capacity: int) -> jax.Array:
    """The first `capacity` rows of every group, 0 behind its last: [g, capacity, width]."""
    slot = jnp.arange(capacity, dtype=jnp.int32)[None]
    return _only(slot < metadata.sizes[:, None], _take(x, metadata.starts[:, None] + slot))


class _Tiles:
    """The rows of every group beyond the first `capacity`, cut into tiles of `size`.

    groups[tile]: the group of each tile. number: how many tiles are in use.
    """

    def __init__(self, metadata: GroupMetadata, capacity: int):
        self.size = _tile_rows(metadata)
        rest = jnp.maximum(metadata.sizes - capacity, 0)
        count = -(-rest // self.size)
        behind = jnp.cumsum(count, dtype=jnp.int32)
        self.number = behind[-1]
        length = metadata.num_rows // self.size + metadata.num_local_groups
        tile = jnp.arange(length, dtype=jnp.int32)
        group = jnp.searchsorted(behind, tile, side="right").astype(jnp.int32)
        self.groups = jnp.minimum(group, np.int32(metadata.num_local_groups - 1))
        done = (tile - (behind - count)[self.groups]) * self.size
        self._first = metadata.starts[self.groups] + capacity + done
        self._behind = (metadata.starts + metadata.sizes)[self.groups]
        self._last_start = metadata.num_rows - self.size

    def rows(self, index) -> tuple[jax.Array, jax.Array]:
        """First row of a slice of `size` rows that holds the tile, and which rows are its own."""
        start = jnp.minimum(self._first[index], np.int32(self._last_start))
        row = start + jnp.arange(self.size, dtype=jnp.int32)
        return start, (row >= self._first[index]) & (row < self._behind[index])


def _mean(metadata: GroupMetadata) -> float:
    return metadata.num_rows / metadata.num_groups


def _capacities(metadata: GroupMetadata) -> tuple[int, ...]:
    def rounded(factor):
        return min(-(-int(factor * _mean(metadata) + 0.5) // 8) * 8, metadata.num_rows)

    return tuple(sorted({rounded(factor) for factor in CAPACITIES}))


def _tile_rows(metadata: GroupMetadata) -> int:
    """A power of two between 16 and LARGEST_TILE, about the mean size of a group."""
    rows = max(16, 1 << int(math.log2(max(_mean(metadata), 1))))
    return min(rows, LARGEST_TILE, metadata.num_rows)


def _cheapest(metadata: GroupMetadata) -> jax.Array:
    """Index of the capacity with the least rows to multiply, tiles weighted by their overhead."""
    tile_rows = _tile_rows(metadata)
    costs = []
    for capacity in _capacities(metadata):
        rest = jnp.maximum(metadata.sizes - capacity, 0)
        tiles = (-(-rest // tile_rows)).sum(dtype=jnp.int32).astype(jnp.float32)
        costs.append(tiles * (tile_rows + ROWS_PER_TILE) + capacity * len(metadata.sizes))
    return jnp.argmin(jnp.stack(costs)).astype(jnp.int32)
