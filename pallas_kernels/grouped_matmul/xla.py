"""The portable form: equal blocks of all groups in one batched product, tiles for the rest.

The first C rows of every group form one block [g, C, k], multiplied by the weights where they lie.
C is one of a few static capacities, taken at run time from the sizes: about the mean for balanced
groups, 0 for very uneven ones. What lies beyond is cut into tiles of the largest of a few static
sizes, and at the end of each group one tile of the least size that holds what is left: one copy of
the group's weights per tile, and one tile per group up to 2,048 rows. The tiles of one size are
walked by a loop of their own, since control flow inside of a loop would copy the result in every
turn. No array is larger than the operands and the result by more than a few rows per group, and no
work is done for groups times rows.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.reference import accumulator
from pallas_kernels.grouped_matmul.sequential import one_by_one

# Capacities as multiples of the mean group; 0 leaves all rows to the tiles.
CAPACITIES = (0.0, 0.75, 1.03125, 1.0625, 1.125, 1.25)
LEAST_TILE, LARGEST_TILE = 8, 2048


class Costs(NamedTuple):
    """Times over that of a row of a tile, fitted on two cores to weights of 512 x 1024, 512 x 176
    and 128 x 256.

    all_rows: of a block for each row there is, copied in and out. block_row: of each of its rows.
    tile: of a tile besides its rows, a copy of the weights and a fixed time.
    """

    all_rows: float
    block_row: float
    tile: float


def _gmm_costs(k: int, n: int) -> Costs:
    return Costs(all_rows=70 / k + 70 / n, block_row=0.92, tile=65 + 4e6 / (k * n))


def _tgmm_costs(k: int, n: int) -> Costs:
    return Costs(all_rows=0.0, block_row=0.9, tile=25 + 2e6 / (k * n))


def gmm(lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling) -> jax.Array:
    """See `api.gmm`."""
    del tiling

    def product(lhs, rhs, metadata):
        def multiply_block(block):
            rows = block.of(lhs, metadata.tokens)
            return block.rows(_multiply(rows, rhs, transpose_rhs), out_dtype)

        def multiply_tile(tile, out):
            rows = tile.rows(lhs, metadata.tokens)
            rows = _multiply(rows, tile.of_group(rhs), transpose_rhs)
            return tile.put(out, rows.astype(out_dtype))

        rows = _Rows(metadata, _gmm_costs(*rhs.shape[1:]))
        return rows.over_tiles(multiply_tile, rows.from_block(multiply_block))

    return one_by_one(product)(*dispatch.gathered(lhs, rhs), metadata)


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling) -> jax.Array:
    """See `api.tgmm`."""
    del tiling

    def product(lhs, dout, metadata):
        def multiply_block(block):
            return _outer(block.of(lhs, metadata.tokens), block.of(dout))

        def multiply_tile(tile, out):
            own = tile.own_rows(lhs, metadata.tokens), tile.own_rows(dout)
            return tile.add(out, _outer(*own))

        rows = _Rows(metadata, _tgmm_costs(lhs.shape[1], dout.shape[1]))
        return rows.over_tiles(multiply_tile, rows.from_block(multiply_block)).astype(out_dtype)

    return one_by_one(product)(*dispatch.gathered(lhs, dout), metadata)


def _multiply(rows, weight, transpose: bool) -> jax.Array:
    """[..., C, k] by [..., k, n], or [..., n, k] transposed."""
    batch = tuple(range(rows.ndim - 2))
    contracted = ((rows.ndim - 1,), (rows.ndim - 1 if transpose else rows.ndim - 2,))
    return _dot(rows, weight, (contracted, (batch, batch)))


def _outer(lhs, rhs) -> jax.Array:
    """[..., C, k] transposed by [..., C, n]."""
    batch, row = tuple(range(lhs.ndim - 2)), (lhs.ndim - 2,)
    return _dot(lhs, rhs, ((row, row), (batch, batch)))


def _dot(lhs, rhs, numbers) -> jax.Array:
    return lax.dot_general(lhs, rhs, numbers, preferred_element_type=accumulator(lhs.dtype))


def _only(own, x) -> jax.Array:
    """x where `own` holds, 0 elsewhere, whatever x holds there."""
    return jnp.where(own[..., None], x, jnp.zeros((), x.dtype))


class _Block:
    """The first `capacity` rows of every group."""

    def __init__(self, capacity: int, metadata: GroupMetadata):
        self._capacity, self._metadata = capacity, metadata

    def of(self, x, tokens=None) -> jax.Array:
        """[g, capacity, width] from rows [m, width], 0 behind the last of a group; tokens[m]: x
        [T, width] holds these."""
        slot = jnp.arange(self._capacity, dtype=jnp.int32)[None]
        source = self._metadata.starts[:, None] + slot
        if tokens is not None:
            source = tokens.at[source].get(mode="clip")
        rows = x.at[source].get(mode="clip")
        return _only(slot < self._metadata.sizes[:, None], rows)

    def rows(self, block, dtype) -> jax.Array:
        """Rows [m, width] from a block, 0 where a row is in none."""
        num_groups, num_rows = len(self._metadata.sizes), self._metadata.num_rows
        if not self._capacity:
            return jnp.zeros((num_rows, block.shape[2]), dtype)
        group = jnp.minimum(self._metadata.row_groups, np.int32(num_groups - 1))
        position = jnp.arange(num_rows, dtype=jnp.int32) - self._metadata.starts[group]
        inside = (position < self._capacity) & (self._metadata.row_groups < num_groups)
        source = group * self._capacity + jnp.clip(position, 0, self._capacity - 1)
        flat = block.astype(dtype).reshape(-1, block.shape[2])
        return _only(inside, flat.at[source].get(mode="clip"))


class _Tile:
    """Rows of one group, as a slice of `size` rows that may hold rows of others too."""

    def __init__(self, turn, group, begin, end, size: int, num_rows: int):
        self._turn, self._group, self._size = turn, group, size
        self._start = jnp.minimum(begin, np.int32(num_rows - size))
        row = self._start + jnp.arange(size, dtype=jnp.int32)
        self._own = (row >= begin) & (row < end)

    def rows(self, x, tokens=None) -> jax.Array:
        """Rows [size, width] of x [m, width]; tokens[m]: x [T, width] holds these.

        The barrier ties them to their turn of the loop: where all turns would have the same rows
        and weights, XLA would multiply them ahead of the loop, needed or not.
        """
        x, _ = lax.optimization_barrier((x, self._turn))
        if tokens is None:
            return self._cut(x)
        return x.at[self._cut(tokens)].get(mode="promise_in_bounds")

    def _cut(self, x) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self._start, self._size)

    def own_rows(self, x, tokens=None) -> jax.Array:
        """`rows`, 0 where they are another group's."""
        return _only(self._own, self.rows(x, tokens))

    def of_group(self, x) -> jax.Array:
        """The group's slice of x [g, ...]."""
        return lax.dynamic_index_in_dim(x, self._group, keepdims=False)

    def put(self, out, rows) -> jax.Array:
        """out [m, width] with the group's own of `rows`."""
        rows = jnp.where(self._own[:, None], rows, self._cut(out))
        return lax.dynamic_update_slice_in_dim(out, rows, self._start, 0)

    def add(self, out, product) -> jax.Array:
        """out [g, ...] with `product` added to the group's slice.

        The slice keeps its axis: XLA adds in place then, and copies the slice first otherwise.
        """
        product = lax.dynamic_slice_in_dim(out, self._group, 1) + product[None]
        return lax.dynamic_update_slice_in_dim(out, product, self._group, 0)


class _Rows:
    """The rows of all local groups: a block of the cheapest capacity, and tiles."""

    def __init__(self, metadata: GroupMetadata, costs: Costs):
        self._metadata, self._sizes = metadata, _tile_sizes(metadata)
        capacities = _capacities(metadata)
        cost = jnp.stack([self._cost(capacity, costs) for capacity in capacities])
        self._choice = jnp.argmin(cost).astype(jnp.int32)
        self._rest = self._beyond(jnp.asarray(capacities, jnp.int32)[self._choice])

    def _beyond(self, capacity) -> jax.Array:
        return jnp.maximum(self._metadata.sizes - capacity, 0)

    def _cost(self, capacity: int, costs: Costs) -> jax.Array:
        rest, step, largest = self._beyond(capacity), self._sizes[0], self._sizes[-1]
        rows = step * (-(-rest // step)).sum(dtype=jnp.int32).astype(jnp.float32)
        tiles = (-(-rest // largest)).sum(dtype=jnp.int32).astype(jnp.float32)
        block = costs.all_rows * self._metadata.num_rows + costs.block_row * capacity * len(rest)
        return (block if capacity else 0.0) + rows + costs.tile * tiles

    def from_block(self, product: Callable[[_Block], jax.Array]) -> jax.Array:
        """`product(block)` of the capacity in use."""
        blocks = [_Block(capacity, self._metadata) for capacity in _capacities(self._metadata)]
        return lax.switch(self._choice, [functools.partial(product, block) for block in blocks])

    def over_tiles(self, body: Callable[[_Tile, jax.Array], jax.Array], out) -> jax.Array:
        """The carry after `body(tile, carry)` for all tiles."""
        metadata, sizes = self._metadata, self._sizes
        largest, ends = sizes[-1], metadata.starts + metadata.sizes

        def walk(size, groups, begins, first, last, out):
            def step(index, out):
                group = groups[index]
                tile = _Tile(index, group, begins[index], ends[group], size, metadata.num_rows)
                return body(tile, out)

            return lax.fori_loop(first, last, step, out)

        begins = behind = ends - self._rest
        if largest < metadata.num_rows:
            whole = self._rest // largest
            last, behind = jnp.cumsum(whole, dtype=jnp.int32), begins + whole * largest
            tile = jnp.arange(metadata.num_rows // largest, dtype=jnp.int32)
            groups = jnp.searchsorted(last, tile, side="right").astype(jnp.int32)
            groups = jnp.minimum(groups, np.int32(metadata.num_local_groups - 1))
            starts = begins[groups] + (tile - (last - whole)[groups]) * largest
            out = walk(largest, groups, starts, 0, last[-1], out)

        # What is left of the groups behind their whole tiles, groups with the same size in a row.
        kind = jnp.searchsorted(np.asarray(sizes, np.int32), ends - behind, side="left")
        kind = jnp.where(ends > behind, kind.astype(jnp.int32), np.int32(len(sizes)))
        groups = jnp.argsort(kind).astype(jnp.int32)
        bounds = jnp.searchsorted(kind[groups], np.arange(len(sizes) + 1, dtype=np.int32))
        for index, size in enumerate(sizes):
            out = walk(size, groups, behind[groups], bounds[index], bounds[index + 1], out)
        return out


def _mean(metadata: GroupMetadata) -> float:
    return metadata.num_rows / metadata.num_groups


def _capacities(metadata: GroupMetadata) -> tuple[int, ...]:
    def rounded(factor):
        return min(-(-int(factor * _mean(metadata) + 0.5) // 8) * 8, metadata.num_rows)

    return tuple(sorted({rounded(factor) for factor in CAPACITIES}))


def _tile_sizes(metadata: GroupMetadata) -> tuple[int, ...]:
    """Steps to about the mean size of a group, where most lie, steps of twice that to twice the
    mean, and growing by a quarter from there."""
    largest = min(metadata.num_rows, LARGEST_TILE)
    middle = min(max(2 << round(math.log2(max(_mean(metadata), 1))), LEAST_TILE), largest)
    step = max(middle // 16, LEAST_TILE)
    sizes = [*range(step, middle // 2, step), *range(middle // 2, middle, 2 * step)]
    size = middle
    while size < largest:
        sizes.append(size)
        size += size // 4
    return tuple(sorted({*sizes, largest}))
