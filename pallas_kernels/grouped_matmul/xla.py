"""The portable form: a batched product over equal blocks, and a loop over tiles for the rest.

The first C rows of every group form one block [g, C, k], multiplied by the weights where they lie.
Rows beyond C follow in tiles of T rows, one weight slice per tile, in a loop over the tiles in use.
C is one of a few static capacities, taken at run time from the sizes: about the mean for balanced
groups, where the batched product runs nearly as fast as a dense one; 0 for very uneven ones.
No array is larger than rows + groups * T, no work is done for groups times rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.reference import accumulator

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


def one_by_one(function):
    """`function`, which `vmap` runs once per element: branches and loops keep their bounds."""
    return jax.custom_batching.sequential_vmap(function)


def _gmm(capacity, transpose_rhs, out_dtype, lhs, rhs, metadata) -> jax.Array:
    starts, sizes = metadata.starts, metadata.sizes
    contract = (1, 1 if transpose_rhs else 0)
    num_columns = rhs.shape[1 if transpose_rhs else 2]
    group = jnp.minimum(metadata.row_groups, np.int32(starts.shape[0] - 1))
    position = jnp.arange(lhs.shape[0], dtype=jnp.int32) - starts[group]
    tile_rows = _tile_rows(metadata)
    tiles = _Tiles(starts, sizes, capacity, tile_rows, metadata.num_rows)

    def multiply_tile(index, out):
        weight = lax.dynamic_index_in_dim(rhs, tiles.groups[index], keepdims=False)
        rows = _tile(lhs, tiles.starts[index], tile_rows)
        product = _dot(rows, weight, ((contract[:1], contract[1:]), ((), ())))
        return lax.dynamic_update_index_in_dim(out, product.astype(out_dtype), index, 0)

    out = lax.empty((len(tiles.groups), tile_rows, num_columns), out_dtype)
    out = lax.fori_loop(0, tiles.number, multiply_tile, out).reshape(-1, num_columns)
    source = jnp.maximum(tiles.first[group] * tile_rows + position - capacity, 0)
    out = _take(out, source)
    if capacity:
        block = _take(lhs, _block_rows(starts, capacity))
        numbers = ((2,), (contract[1] + 1,)), ((0,), (0,))
        product = _dot(block, rhs, numbers).astype(out_dtype).reshape(-1, num_columns)
        in_block = position < capacity
        source = group * capacity + jnp.clip(position, 0, capacity - 1)
        out = jnp.where(in_block[:, None], _take(product, source), out)
    return jnp.where((metadata.row_groups < starts.shape[0])[:, None], out, jnp.zeros((), out_dtype))


def _tgmm(capacity, out_dtype, lhs, dout, metadata) -> jax.Array:
    starts, sizes = metadata.starts, metadata.sizes
    shape = (starts.shape[0], lhs.shape[1], dout.shape[1])
    tile_rows = _tile_rows(metadata)
    tiles = _Tiles(starts, sizes, capacity, tile_rows, metadata.num_rows)

    if capacity:
        own = (jnp.arange(capacity, dtype=jnp.int32) < sizes[:, None])[..., None]
        rows = _block_rows(starts, capacity)
        blocks = [jnp.where(own, _take(x, rows), jnp.zeros((), x.dtype)) for x in (lhs, dout)]
        out = _dot(*blocks, (((1,), (1,)), ((0,), (0,))))
    else:
        out = jnp.zeros(shape, accumulator(lhs.dtype))

    def add_tile(index, out):
        own = (jnp.arange(tile_rows, dtype=jnp.int32) < tiles.rows[index])[:, None]
        rows = [
            jnp.where(own, _tile(x, tiles.starts[index], tile_rows), jnp.zeros((), x.dtype))
            for x in (lhs, dout)
        ]
        product = _dot(*rows, (((0,), (0,)), ((), ())))
        return out.at[tiles.groups[index]].add(product, mode="promise_in_bounds")

    return lax.fori_loop(0, tiles.number, add_tile, out).astype(out_dtype)


def _dot(lhs, rhs, numbers) -> jax.Array:
    return lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulator(lhs.dtype))


def _take(x, rows) -> jax.Array:
    return x.at[rows].get(mode="clip")


def _block_rows(starts, capacity: int) -> jax.Array:
    return starts[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]


def _tile(x, start, tile_rows: int) -> jax.Array:
    return _take(x, start + jnp.arange(tile_rows, dtype=jnp.int32))


class _Tiles:
    """The rows of every group beyond the first `capacity`, cut into tiles of `tile_rows`.

    groups, starts, rows[tile]: the group, first row and number of rows of each tile.
    first[g]: the first tile of each group. number: how many tiles are in use.
    """

    def __init__(self, starts, sizes, capacity: int, tile_rows: int, num_rows: int):
        rest = jnp.maximum(sizes - capacity, 0)
        count = -(-rest // tile_rows)
        behind = jnp.cumsum(count, dtype=jnp.int32)
        self.first = behind - count
        self.number = behind[-1]
        length = num_rows // tile_rows + len(starts)
        tile = jnp.arange(length, dtype=jnp.int32)
        group = jnp.searchsorted(behind, tile, side="right").astype(jnp.int32)
        self.groups = jnp.minimum(group, np.int32(len(starts) - 1))
        done = (tile - self.first[self.groups]) * tile_rows
        self.starts = starts[self.groups] + capacity + done
        self.rows = rest[self.groups] - done


def _mean(metadata: GroupMetadata) -> float:
    return metadata.num_rows / metadata.num_groups


def _capacities(metadata: GroupMetadata) -> tuple[int, ...]:
    def rounded(factor):
        return min(-(-int(factor * _mean(metadata) + 0.5) // 8) * 8, metadata.num_rows)

    return tuple(sorted({rounded(factor) for factor in CAPACITIES}))


def _tile_rows(metadata: GroupMetadata) -> int:
    """A power of two between 16 and LARGEST_TILE, about the mean size of a group."""
    return min(max(16, 1 << int(np.log2(_mean(metadata)))), LARGEST_TILE)


def _cheapest(metadata: GroupMetadata) -> jax.Array:
    """Index of the capacity with the least rows to multiply, tiles weighted by their overhead."""
    tile_rows = _tile_rows(metadata)
    costs = []
    for capacity in _capacities(metadata):
        rest = jnp.maximum(metadata.sizes - capacity, 0)
        tiles = (-(-rest // tile_rows)).sum(dtype=jnp.int32).astype(jnp.float32)
        costs.append(tiles * (tile_rows + ROWS_PER_TILE) + capacity * len(metadata.sizes))
    return jnp.argmin(jnp.stack(costs)).astype(jnp.int32)
