"""Where the rows of every group lie, and which (group, row tile) pairs a kernel visits.

Rows outside all local groups belong to two margins, one before the first local group and one after
the last: a kernel visits the tiles of the margins too, and writes zeros there. A tile shared by
several groups is visited once per group, one visit after the other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupMetadata:
    """The layout of one routing, shared by every `gmm` and `tgmm` over the same rows.

    starts[g], sizes[g]: first row and number of rows of every local group.
    row_groups[m]: the local group of every row, g for rows outside all local groups.
    bounds[g + 3]: the rows of extended group e are bounds[e] .. bounds[e + 1] - 1; groups 0 and
        g + 1 are the margins, local group i is i + 1.
    visit_groups[v], visit_tiles[v], num_visits[1]: the pairs of an extended group and a tile that
        `gmm` walks, v = tiles + g + 1 at most. What lies behind num_visits repeats the last pair.
    visit_weights[v]: the local group whose weights a visit needs; a margin names those of the
        visit beside it, so that none are copied for it.
    update_groups[u], update_tiles[u], num_updates[1]: the pairs `tgmm` walks, u = tiles + g - 1
        at most and at least g: local groups only, an empty one is visited once.
    tokens[m], inverse[T, K]: where lhs holds tokens, the token of every row, and the rows of every
        token; None where it holds the rows.
    """

    starts: Any
    sizes: Any
    row_groups: Any
    bounds: Any
    visit_groups: Any
    visit_tiles: Any
    visit_weights: Any
    num_visits: Any
    update_groups: Any
    update_tiles: Any
    num_updates: Any
    num_rows: int = dataclasses.field(metadata=dict(static=True))
    tile_rows: int = dataclasses.field(metadata=dict(static=True))
    num_groups: int = dataclasses.field(metadata=dict(static=True))
    tokens: Any = None
    inverse: Any = None

    @property
    def num_local_groups(self) -> int:
        return self.starts.shape[0]

    def of_tokens(self, order: jax.Array, inverse: jax.Array) -> "GroupMetadata":
        """The same layout for an lhs of tokens; order, inverse: of `routing.Routing`."""
        tokens = order // np.int32(inverse.shape[1])
        return dataclasses.replace(self, tokens=tokens, inverse=inverse)

    def of_rows(self) -> "GroupMetadata":
        """The same layout for an lhs of rows."""
        return dataclasses.replace(self, tokens=None, inverse=None)

    def rows_of(self, lhs: jax.Array) -> jax.Array:
        """The rows [m, k], for products that cannot gather by themselves."""
        return lhs if self.tokens is None else lhs.at[self.tokens].get(mode="promise_in_bounds")


def make(group_sizes, num_rows, group_offset, num_local_groups, tile_rows) -> GroupMetadata:
    """See `api.make_group_metadata`, which checks the arguments."""
    _debug_checks(group_sizes, num_rows)
    ends = _ends(group_sizes, num_rows)
    num_groups = ends.shape[0]
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    if group_offset is not None or num_local_groups != num_groups:
        first = jnp.zeros((), jnp.int32) if group_offset is None else group_offset
        first = _clipped(first, num_groups - num_local_groups)
        starts = lax.dynamic_slice_in_dim(starts, first, num_local_groups)
        ends = lax.dynamic_slice_in_dim(ends, first, num_local_groups)
    row_groups = _row_groups(starts, ends, num_rows)
    num_tiles = -(-num_rows // tile_rows)
    zero, last = jnp.zeros(1, jnp.int32), jnp.full(1, num_rows, jnp.int32)
    bounds = jnp.concatenate([zero, starts, ends[-1:], last])
    visits = _visits(
        bounds[:-1],
        bounds[1:],
        tile_rows,
        num_tiles + num_local_groups + 1,
        visit_empty=False,
    )
    updates = _visits(
        starts, ends, tile_rows, max(num_tiles, 1) + num_local_groups - 1, visit_empty=True
    )
    return GroupMetadata(
        starts=starts,
        sizes=ends - starts,
        row_groups=row_groups,
        bounds=bounds,
        visit_groups=visits[0],
        visit_tiles=visits[1],
        visit_weights=_weights(visits[0], ends > starts),
        num_visits=visits[2],
        update_groups=updates[0],
        update_tiles=jnp.minimum(updates[1], num_tiles - 1),
        num_updates=updates[2],
        num_rows=num_rows,
        tile_rows=tile_rows,
        num_groups=num_groups,
    )


def _debug_checks(group_sizes: jax.Array, num_rows: int) -> None:
    """Errors under `checkify`, nothing otherwise."""
    total = group_sizes.astype(jnp.float32).sum()
    checkify.debug_check((group_sizes >= 0).all(), "group_sizes holds a negative size")
    checkify.debug_check(
        total <= num_rows,
        "group_sizes add up to {total}; at most {num_rows} rows exist",
        total=total,
        num_rows=jnp.asarray(num_rows, jnp.int32),
    )


def _ends(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """Row behind each group; negative sizes count as 0, rows past the last are cut off."""
    # Saturating, so that the sum cannot overflow.
    return lax.associative_scan(
        lambda a, b: jnp.minimum(a + b, np.int32(num_rows)), _clipped(group_sizes, num_rows)
    )


def _clipped(x: jax.Array, most: int) -> jax.Array:
    """x between 0 and `most` as int32, compared in its own dtype, narrower or wider."""
    info = np.iinfo(x.dtype)
    if info.max > most:
        x = jnp.minimum(x, np.asarray(most, x.dtype))
    if info.min < 0:
        x = jnp.maximum(x, np.asarray(0, x.dtype))
    return x.astype(jnp.int32)


def _row_groups(starts: jax.Array, ends: jax.Array, num_rows: int) -> jax.Array:
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
    return jnp.where(rows < starts[0], np.int32(starts.shape[0]), group)


def _visits(starts, ends, tile_rows: int, length: int, visit_empty: bool):
    """Pairs (group, tile), group by group and tiles ascending, and their number."""
    first = starts // tile_rows
    count = jnp.where(ends > starts, -(-ends // tile_rows) - first, np.int32(visit_empty))
    behind = jnp.cumsum(count, dtype=jnp.int32)
    visit = jnp.minimum(jnp.arange(length, dtype=jnp.int32), behind[-1] - 1)
    group = jnp.searchsorted(behind, visit, side="right").astype(jnp.int32)
    tile = first[group] + visit - (behind - count)[group]
    return group, tile, behind[-1:]


def _weights(visit_groups: jax.Array, filled: jax.Array) -> jax.Array:
    """The local group of every visit; that of a neighbour for the margins."""
    num_groups = filled.shape[0]
    local = jnp.where(visit_groups > num_groups, np.int32(0), visit_groups) - 1
    first = jnp.argmax(filled).astype(jnp.int32)
    return jnp.maximum(lax.cummax(local), first)
