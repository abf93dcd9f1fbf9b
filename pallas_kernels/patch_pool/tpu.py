"""The TPU kernels: one walk along a monotone path of (byte tile, patch tile) pairs.

Patches are contiguous in the bytes, so the pairs that share bytes form a staircase: per row at
most N + M - 1 pairs of N byte tiles and M patch tiles, in which neither index ever decreases. A
grid that follows this path copies every block of every operand and result once, forward and
backward: a block stays in VMEM for all its pairs, results of both sides accumulate there, and a
patch longer than a tile is carried from pair to pair. The path is computed from the ids and
prefetched as scalars.

Within a pair, bytes and patches meet in a [patches, bytes] mask of one tile: sums and selections
are products with it on the matrix unit, attention is a masked block of flash attention (Dao et
al., arXiv 2205.14135). A NaN or infinity in a seen byte may therefore reach other patches of its
tile in sums and products; what ignored bytes hold reaches nothing.

Axis letters as in `api`; t and p are the bytes and patches of a tile, C = Q * H.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.patch_pool.rows import shared
from pallas_kernels.patch_pool.tiling import (
    Tiles,
    attention_tiles,
    in_memory,
    pool_tiles,
    tile_path,
)

LANES = 128
TILE_WIDTH = 2048
VMEM_LIMIT = 64 * 2**20
LOWEST = -(2.0**127)
"""Stands for -inf in maxima: finite, so that 0 * LOWEST is 0, and exact in bfloat16."""

DTYPES = ("float32", "bfloat16")


# The path.


def _padded(rows_BT, seen_BT, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Rows and visibility filled up to whole byte tiles."""
    rest = ((0, 0), (0, tiles.byte_tiles * tiles.tile_bytes - tiles.num_bytes))
    return jnp.pad(rows_BT, rest, mode="edge"), jnp.pad(seen_BT, rest)


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a grid step is on the path: its tiles, and whether they are met first or last here."""

    byte_tile: jax.Array
    patch_tile: jax.Array
    first_of_bytes: jax.Array
    first_of_patches: jax.Array
    last_of_bytes: jax.Array
    last_of_patches: jax.Array


def _step(path_ref) -> Step:
    row, step, end = pl.program_id(0), pl.program_id(2), pl.num_programs(2) - 1
    before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, end)

    def tiles(step):
        shape = pl.num_programs(0), pl.num_programs(2)
        return [path_ref[_place_on_path(side, row, step, shape)] for side in range(2)]

    tile = tiles(step)
    first = [(step == 0) | (here != there) for here, there in zip(tile, tiles(before), strict=True)]
    last = [(step == end) | (here != there) for here, there in zip(tile, tiles(after), strict=True)]
    return Step(*tile, *first, *last)


def _place_on_path(side: int, row, step, shape):
    """Index into the path as it is prefetched, flat: the last axis of an array of scalars takes
    whole lanes, of which short rows would waste most. shape: rows, steps."""
    return (side * shape[0] + row) * shape[1] + step


def _walk(
    kernel,
    tiles: Tiles,
    rows: tuple[jax.Array, jax.Array],
    operands,
    results,
    *,
    scratch=(),
    more_scalars=(),
    tile_width=None,
    flops=0,
    interpret=False,
):
    """Runs kernel(path, *more_scalars, codes[1, t], *operands, *results, *scratch) on the path.

    operands are pairs (side, array), results (side, ShapeDtypeStruct). Arrays of side "bytes" and
    "patches" are [B, T or P, X] and cut into tiles of `tile_width` of X (a grid axis between rows
    and steps), those of side "byte_columns" and "patch_columns" [B, X, T or P] and whole in X.
    more_scalars map the padded rows to further arrays, prefetched flat. codes hold the row of a
    seen byte and -1 - row of another. flops: those of one step.
    """
    rows_BT, seen_BT = _padded(*rows, tiles)
    scalars = [tile_path(rows_BT, seen_BT, tiles), *(make(rows_BT) for make in more_scalars)]
    scalars = [x.reshape(-1) for x in scalars]
    operands = [("byte_columns", jnp.where(seen_BT, rows_BT, -1 - rows_BT)[:, None]), *operands]
    both = [*operands, *results]
    width = max((x.shape[2] for side, x in both if side in ("bytes", "patches")), default=1)
    width_tiles = 1 if tile_width is None else pl.cdiv(width, tile_width)
    grid = (rows_BT.shape[0], width_tiles, tiles.steps)

    def spec(side, x):
        axis, length = (0, tiles.tile_bytes) if "byte" in side else (1, tiles.tile_patches)

        def tile(b, s, path):
            return path[_place_on_path(axis, b, s, (grid[0], grid[2]))]

        if side.endswith("columns"):
            block = (None, x.shape[1], length)
            return pl.BlockSpec(block, lambda b, d, s, path, *_: (b, 0, tile(b, s, path)))
        block = (None, length, x.shape[2] if width_tiles == 1 else tile_width)
        return pl.BlockSpec(block, lambda b, d, s, path, *_: (b, tile(b, s, path), d))

    copied = sum(_nbytes(x) for x in scalars)
    for side, x in both:
        copied += _nbytes(x) * (width_tiles if side.endswith("columns") else 1)
    return dispatch.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec(*x) for x in operands],
            out_specs=[spec(*x) for x in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[x for _, x in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * grid[0] * grid[1] * grid[2], transcendentals=0, bytes_accessed=copied
        ),
        interpret=interpret,
    )(*scalars, *(x for _, x in operands))


def _nbytes(x) -> int:
    return x.size * x.dtype.itemsize


# Inside a pair.


def _patch_of_sublane(step: Step, tiles: Tiles, width: int) -> jax.Array:
    patch_pX = lax.broadcasted_iota(jnp.int32, (tiles.tile_patches, width), 0)
    return patch_pX + step.patch_tile * tiles.tile_patches


def _own(rows_1t, step: Step, tiles: Tiles) -> jax.Array:
    """Which bytes belong to which patches of the pair: bool[p, t]."""
    patch_pt = _patch_of_sublane(step, tiles, tiles.tile_bytes)
    return jnp.broadcast_to(rows_1t, patch_pt.shape) == patch_pt


def _rows(codes):
    return jnp.where(codes < 0, -1 - codes, codes)


def _column(row_1t: jax.Array) -> jax.Array:
    """[1, t] -> [t, 1]."""
    return jnp.broadcast_to(row_1t, (8, row_1t.shape[1])).T[:, :1]


def _only(keep_t1, x_tX) -> jax.Array:
    """x where `keep` holds, else 0; NaN and infinity elsewhere vanish."""
    return jnp.where(keep_t1, x_tX, jnp.zeros_like(x_tX))


def _existing(x_pX, step: Step, tiles: Tiles) -> jax.Array:
    """A block of patches with 0 beyond the last patch, where the block has whatever was there."""
    if tiles.num_patches % tiles.tile_patches == 0:
        return x_pX
    return _only(_patch_of_sublane(step, tiles, 1) < tiles.num_patches, x_pX)


def _dot(a, b, contract: tuple[int, int]) -> jax.Array:
    """Product over one axis of each, in float32, for operands of one dtype."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


# Pooling.


def pool_forward(x_BTD, rows, num_patches, mode, interpret=False):
    """Pooled [B, P, D], and what the gradient needs: the number of bytes of every patch, float32
    [B, P], of a mean; how many of them share an extreme, [B, P, D] in x's dtype; None of a sum."""
    batch, num_bytes, width = x_BTD.shape
    tiles = pool_tiles(num_bytes, num_patches)
    tile_width = min(width, TILE_WIDTH)
    out = ("patches", jax.ShapeDtypeStruct((batch, num_patches, width), x_BTD.dtype))
    count = ("patch_columns", jax.ShapeDtypeStruct((batch, 1, num_patches), jnp.float32))
    of_patches = (tiles.tile_patches, tile_width)
    walk = functools.partial(
        _walk,
        tiles=tiles,
        rows=rows,
        operands=[("bytes", x_BTD)],
        tile_width=tile_width,
        interpret=interpret,
    )
    one_product = 2 * tiles.tile_bytes * tiles.tile_patches * tile_width
    if mode in ("max", "min"):
        return walk(
            functools.partial(_extreme_kernel, tiles=tiles, negate=mode == "min"),
            results=[out, out],
            scratch=[of_patches, of_patches, (tiles.tile_patches, 1)],
            more_scalars=[functools.partial(_doublings, tiles=tiles)],
            flops=3 * one_product,
        )
    kernel = functools.partial(_sum_kernel, tiles=tiles)
    if mode == "sum":
        return walk(kernel, results=[out], scratch=[of_patches], flops=one_product)[0], None
    pooled_BPD, count_B1P = walk(
        functools.partial(kernel, mean=True),
        results=[out, count],
        scratch=[of_patches, (tiles.tile_patches, 1)],
        flops=one_product,
    )
    return pooled_BPD, count_B1P[:, 0]


def _sum_kernel(path_ref, codes_ref, x_ref, out_ref, *refs, tiles: Tiles, mean=False):
    count_ref, sum_ref, size_ref = refs if mean else (None, *refs, None)
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles)

    @pl.when(step.first_of_patches)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if mean:
            count_ref[...] = jnp.zeros_like(count_ref)
            size_ref[...] = jnp.zeros_like(size_ref)

    x_tD = _only(_column(codes_ref[...]) >= 0, x_ref[...])
    sum_ref[...] += _dot(own_pt.astype(x_tD.dtype), x_tD, (1, 0))
    if mean:
        own_pt = own_pt.astype(jnp.float32)
        count_ref[...] += _dot(jnp.ones((1, tiles.tile_bytes), jnp.float32), own_pt, (1, 1))
        size_ref[...] += own_pt.sum(axis=1, keepdims=True)

    @pl.when(step.last_of_patches)
    def _():
        pooled_pD = sum_ref[...]
        if mean:
            pooled_pD = pooled_pD / jnp.maximum(size_ref[...], 1.0)
        out_ref[...] = pooled_pD.astype(out_ref.dtype)


def _doublings(rows_BT, tiles: Tiles) -> jax.Array:
    """int32[B, byte tiles]: doublings that cover the longest run of a patch within each tile."""
    rows_BNt = rows_BT.reshape(len(rows_BT), tiles.byte_tiles, tiles.tile_bytes)
    place_BNt = lax.broadcasted_iota(jnp.int32, rows_BNt.shape, 2)
    starts_BNt = jnp.pad(rows_BNt[:, :, 1:] != rows_BNt[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    since_BNt = place_BNt - lax.cummax(jnp.where(starts_BNt, place_BNt, 0), axis=2)
    return 32 - lax.clz(since_BNt.max(2))


def _extreme_kernel(
    path_ref, doublings_ref, codes_ref, x_ref, out_ref, ties_ref, best_ref, count_ref, seen_ref,
    *, tiles: Tiles, negate
):  # fmt: skip
    step = _step(path_ref)
    codes_t1 = _column(codes_ref[...])
    own_pt = _own(codes_ref[...], step, tiles)
    sign = -1.0 if negate else 1.0

    @pl.when(step.first_of_patches)
    def _():
        best_ref[...] = jnp.full_like(best_ref, LOWEST)
        count_ref[...] = jnp.zeros_like(count_ref)
        seen_ref[...] = jnp.zeros_like(seen_ref)

    x_tD = jnp.clip(x_ref[...].astype(jnp.float32) * sign, LOWEST, -LOWEST)
    x_tD = jnp.where(codes_t1 >= 0, x_tD, LOWEST)
    doublings = doublings_ref[pl.program_id(0) * tiles.byte_tiles + step.byte_tile]
    run_tD = _run_maxima(x_tD, _rows(codes_t1), doublings)

    # Of every run only its last byte, which holds the maximum, enters the product.
    member_pt = _own(_rows(codes_ref[...]), step, tiles)
    exact = x_ref.dtype
    tile_pD = _dot(member_pt.astype(exact), run_tD.astype(exact), (1, 0))
    met_p1 = member_pt.astype(jnp.float32).max(axis=1, keepdims=True) > 0
    tile_pD = jnp.where(met_p1, tile_pD, LOWEST)
    reached_tD = x_tD == _dot(member_pt.astype(exact), tile_pD.astype(exact), (0, 0))
    reached_tD = _only(codes_t1 >= 0, reached_tD.astype(exact))
    ties_pD = _dot(own_pt.astype(exact), reached_tD, (1, 0))

    best_pD = best_ref[...]
    kept_pD = jnp.where(best_pD < tile_pD, 0.0, count_ref[...])
    count_ref[...] = kept_pD + jnp.where(tile_pD < best_pD, 0.0, ties_pD)
    best_ref[...] = jnp.maximum(best_pD, tile_pD)
    seen_ref[...] += own_pt.astype(jnp.float32).sum(axis=1, keepdims=True)

    @pl.when(step.last_of_patches)
    def _():
        best_pD = best_ref[...]
        best_pD = jnp.where(best_pD <= LOWEST, -jnp.inf, best_pD)
        best_pD = jnp.where(best_pD >= -LOWEST, jnp.inf, best_pD) * sign
        out_ref[...] = jnp.where(seen_ref[...] > 0, best_pD, 0.0).astype(out_ref.dtype)
        ties_ref[...] = count_ref[...].astype(ties_ref.dtype)


def _run_maxima(x_tD, rows_t1, doublings) -> jax.Array:
    """The maximum of every run of equal rows at the run's last byte, 0 at other bytes."""
    tile_bytes = x_tD.shape[0]
    place_t1 = lax.broadcasted_iota(jnp.int32, rows_t1.shape, 0)

    def double(level, x_tD):
        reach = jnp.left_shift(jnp.int32(1), level)
        same_t1 = (place_t1 >= reach) & (pltpu.roll(rows_t1, reach, 0) == rows_t1)
        return jnp.where(same_t1, jnp.maximum(x_tD, pltpu.roll(x_tD, reach, 0)), x_tD)

    x_tD = lax.fori_loop(0, doublings, double, x_tD)
    next_t1 = pltpu.roll(rows_t1, tile_bytes - 1, 0)
    return _only((next_t1 != rows_t1) | (place_t1 == tile_bytes - 1), x_tD)


def pool_backward(x_BTD, out_BPD, weight, g_BPD, rows, mode, interpret=False):
    """dx[B, T, D] in g's dtype; x and out matter for extremes only."""
    batch, num_patches, width = g_BPD.shape
    num_bytes = rows[0].shape[1]
    tiles = pool_tiles(num_bytes, num_patches)
    if mode == "mean":
        g_BPD = shared(g_BPD, weight[..., None])
    operands = [("patches", g_BPD)]
    if mode in ("max", "min"):
        operands += [("bytes", x_BTD), ("patches", out_BPD), ("patches", weight)]
    return _walk(
        functools.partial(_pool_backward_kernel, tiles=tiles),
        tiles,
        rows,
        operands,
        [("bytes", jax.ShapeDtypeStruct((batch, num_bytes, width), g_BPD.dtype))],
        tile_width=min(width, TILE_WIDTH),
        flops=2 * len(operands) * tiles.tile_bytes * tiles.tile_patches * min(width, TILE_WIDTH),
        interpret=interpret,
    )[0]


def _pool_backward_kernel(path_ref, codes_ref, g_ref, *refs, tiles: Tiles):
    *extreme_refs, dx_ref = refs
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles).astype(g_ref.dtype)

    def of_bytes(x_pD):
        return _dot(own_pt, _existing(x_pD, step, tiles), (0, 0))

    @pl.when(step.first_of_bytes)
    def _():
        dx_ref[...] = jnp.zeros_like(dx_ref)

    if not extreme_refs:
        dx_ref[...] += of_bytes(g_ref[...]).astype(dx_ref.dtype)
        return
    x_ref, out_ref, ties_ref = extreme_refs
    share_pD = g_ref[...].astype(jnp.float32) / jnp.maximum(ties_ref[...].astype(jnp.float32), 1.0)
    reached_tD = x_ref[...].astype(jnp.float32) == of_bytes(out_ref[...])
    share_tD = of_bytes(share_pD.astype(g_ref.dtype))
    # Bytes of other tiles' patches get 0 here whatever they compare equal to.
    dx_ref[...] += _only(reached_tD, share_tD).astype(dx_ref.dtype)


# Attention. Heads are met in groups that fill whole lanes; the lanes of vector v, group g start at
# v * H * K + g * group width, and column c = v * H + h of the statistics is that head's.


def _groups(heads: int, head_dim: int) -> tuple[int, int]:
    """Number of groups of heads, heads per group."""
    if head_dim % LANES == 0:
        return heads, 1
    if LANES % head_dim == 0 and heads % (LANES // head_dim) == 0:
        return heads * head_dim // LANES, LANES // head_dim
    return 1, heads


@dataclasses.dataclass(frozen=True)
class Heads:
    """Vectors per patch, heads, width of a head."""

    vectors: int
    heads: int
    head_dim: int

    def each_group(self, body) -> None:
        """body(g) for every group of heads."""
        groups, _ = _groups(self.heads, self.head_dim)
        if groups == 1:
            body(0)
        else:
            lax.fori_loop(0, groups, lambda g, _: body(g), None)

    def lanes(self, group, vector=0):
        """The lanes of a group of heads."""
        groups, per_group = _groups(self.heads, self.head_dim)
        width = self.head_dim * per_group
        if groups == 1:
            return slice(vector * width, (vector + 1) * width)
        start = vector * self.heads * self.head_dim + group * width
        return pl.ds(pl.multiple_of(start, LANES), width)

    def of_group(self, group):
        """(head, its lanes within the group) for every head of a group."""
        _, per_group = _groups(self.heads, self.head_dim)
        for i in range(per_group):
            lanes = slice(i * self.head_dim, (i + 1) * self.head_dim)
            yield group * per_group + i, lanes


def _get_column(x_pC, column) -> jax.Array:
    lane_pC = lax.broadcasted_iota(jnp.int32, x_pC.shape, 1)
    return jnp.where(lane_pC == column, x_pC, 0.0).sum(axis=1, keepdims=True)


def _set_column(ref, column, x_p1) -> None:
    x_pC = ref[...]
    lane_pC = lax.broadcasted_iota(jnp.int32, x_pC.shape, 1)
    ref[...] = jnp.where(lane_pC == column, x_p1, x_pC)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x == -jnp.inf, 0.0, x)


def _like(side: str, x_BXY, dtype=None):
    return side, jax.ShapeDtypeStruct(x_BXY.shape, dtype or x_BXY.dtype)


def _score_flops(tiles: Tiles, heads: Heads, products: int) -> int:
    lanes = heads.vectors * heads.heads * heads.head_dim
    return 2 * products * tiles.tile_bytes * tiles.tile_patches * lanes


def patch_forward(q_BPQHK, key_BTHK, value_BTHK, rows, scale, dtype, interpret=False):
    """Output [B, P, Q, H, K] in `dtype` and log-sum-exp float32 [B, P, Q, H] of patch_attention;
    the latter is -inf where nothing is seen."""
    q, key, value = map(_flat, (q_BPQHK, key_BTHK, value_BTHK))
    batch, num_patches, *of_vectors = q_BPQHK.shape
    heads = Heads(*of_vectors)
    of_byte = in_memory(key, (key.dtype, value.dtype))
    of_patch = in_memory(q, (q.dtype, dtype), sums=1)
    tiles = attention_tiles(key.shape[1], num_patches, of_byte, of_patch)
    columns = heads.vectors * heads.heads
    statistics = ("patches", jax.ShapeDtypeStruct((batch, num_patches, columns), jnp.float32))
    out, lse = _walk(
        functools.partial(_patch_forward_kernel, tiles=tiles, heads=heads, scale=scale),
        tiles,
        rows,
        [("patches", q), ("bytes", key), ("bytes", value)],
        [_like("patches", q, dtype), statistics],
        scratch=[(tiles.tile_patches, q.shape[2]), *[(tiles.tile_patches, columns)] * 2],
        flops=_score_flops(tiles, heads, 2),
        interpret=interpret,
    )
    return out.reshape(q_BPQHK.shape), lse.reshape(q_BPQHK.shape[:-1])


def _patch_forward_kernel(
    path_ref, codes_ref, q_ref, key_ref, value_ref, out_ref, lse_ref, sum_ref, max_ref, total_ref,
    *, tiles: Tiles, heads: Heads, scale
):  # fmt: skip
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles)
    seen_t1 = _column(codes_ref[...]) >= 0

    @pl.when(step.first_of_patches)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

    def group(g):
        key_tX = key_ref[:, heads.lanes(g)]
        value_tX = _only(seen_t1, value_ref[:, heads.lanes(g)])
        for v in range(heads.vectors):
            q_pX, sum_pX = q_ref[:, heads.lanes(g, v)], sum_ref[:, heads.lanes(g, v)]
            sums = []
            for h, lanes in heads.of_group(g):
                column = v * heads.heads + h
                score_pt = _dot(q_pX[:, lanes], key_tX[:, lanes], (1, 1)) * scale
                score_pt = jnp.where(own_pt, score_pt, -jnp.inf)
                before_p1 = _get_column(max_ref[...], column)
                max_p1 = jnp.maximum(before_p1, score_pt.max(axis=1, keepdims=True))
                weight_pt = jnp.exp(score_pt - _finite(max_p1))
                kept_p1 = jnp.exp(before_p1 - _finite(max_p1))
                total_p1 = _get_column(total_ref[...], column) * kept_p1
                _set_column(max_ref, column, max_p1)
                _set_column(total_ref, column, total_p1 + weight_pt.sum(axis=1, keepdims=True))
                added_pK = _dot(weight_pt.astype(value_tX.dtype), value_tX[:, lanes], (1, 0))
                sums.append(sum_pX[:, lanes] * kept_p1 + added_pK)
            sum_ref[:, heads.lanes(g, v)] = jnp.concatenate(sums, axis=1)

    heads.each_group(group)

    @pl.when(step.last_of_patches)
    def _():
        lse_ref[...] = max_ref[...] + jnp.log(total_ref[...])

        def finish(g):
            for v in range(heads.vectors):
                sum_pX, outs = sum_ref[:, heads.lanes(g, v)], []
                for h, lanes in heads.of_group(g):
                    total_p1 = _get_column(total_ref[...], v * heads.heads + h)
                    outs.append(sum_pX[:, lanes] / jnp.where(total_p1 > 0, total_p1, 1.0))
                out_ref[:, heads.lanes(g, v)] = jnp.concatenate(outs, 1).astype(out_ref.dtype)

        heads.each_group(finish)


def patch_backward(
    q_BPQHK, key_BTHK, value_BTHK, rows, out_BPQHK, lse_BPQH, g_BPQHK, scale, dtype, interpret=False
):
    """dq, dkey, dvalue of patch_attention in `dtype`."""
    q, key, value, out, g = map(_flat, (q_BPQHK, key_BTHK, value_BTHK, out_BPQHK, g_BPQHK))
    lse = lse_BPQH.reshape(*lse_BPQH.shape[:2], -1)
    heads = Heads(*q_BPQHK.shape[2:])
    of_byte = in_memory(key, (key.dtype, value.dtype, dtype, dtype), sums=2)
    of_patch = in_memory(q, (q.dtype, out.dtype, g.dtype, dtype), sums=1)
    tiles = attention_tiles(key.shape[1], q.shape[1], of_byte, of_patch)
    of_bytes = (tiles.tile_bytes, key.shape[2])
    d_q, d_key, d_value = _walk(
        functools.partial(_patch_backward_kernel, tiles=tiles, heads=heads, scale=scale),
        tiles,
        rows,
        [*(("patches", x) for x in (q, out, lse, g)), ("bytes", key), ("bytes", value)],
        [_like("patches", q, dtype), _like("bytes", key, dtype), _like("bytes", value, dtype)],
        scratch=[(tiles.tile_patches, q.shape[2]), of_bytes, of_bytes],
        flops=_score_flops(tiles, heads, 5),
        interpret=interpret,
    )
    return (
        d_q.reshape(q_BPQHK.shape),
        d_key.reshape(key_BTHK.shape),
        d_value.reshape(value_BTHK.shape),
    )


def _patch_backward_kernel(
    path_ref, codes_ref, q_ref, out_ref, lse_ref, g_ref, key_ref, value_ref,
    d_q_ref, d_key_ref, d_value_ref, d_q_sum_ref, d_key_sum_ref, d_value_sum_ref,
    *, tiles: Tiles, heads: Heads, scale
):  # fmt: skip
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles)
    seen_t1 = _column(codes_ref[...]) >= 0

    @pl.when(step.first_of_patches)
    def _():
        d_q_sum_ref[...] = jnp.zeros_like(d_q_sum_ref)

    @pl.when(step.first_of_bytes)
    def _():
        d_key_sum_ref[...] = jnp.zeros_like(d_key_sum_ref)
        d_value_sum_ref[...] = jnp.zeros_like(d_value_sum_ref)

    def group(g):
        key_tX = _only(seen_t1, key_ref[:, heads.lanes(g)])
        value_tX = _only(seen_t1, value_ref[:, heads.lanes(g)])
        for v in range(heads.vectors):
            q_pX = _existing(q_ref[:, heads.lanes(g, v)], step, tiles)
            g_pX = _existing(g_ref[:, heads.lanes(g, v)], step, tiles)
            out_pX = out_ref[:, heads.lanes(g, v)]
            d_qs, d_keys, d_values = [], [], []
            for h, lanes in heads.of_group(g):
                q_pK, g_pK = q_pX[:, lanes], g_pX[:, lanes]
                mean_p1 = (g_pK.astype(jnp.float32) * out_pX[:, lanes].astype(jnp.float32)).sum(
                    axis=1, keepdims=True
                )
                lse_p1 = _get_column(lse_ref[...], v * heads.heads + h)
                score_pt = _dot(q_pK, key_tX[:, lanes], (1, 1)) * scale
                weight_pt = jnp.where(own_pt, jnp.exp(score_pt - lse_p1), 0.0)
                d_weight_pt = _dot(g_pK, value_tX[:, lanes], (1, 1))
                d_score_pt = jnp.where(own_pt, weight_pt * (d_weight_pt - mean_p1) * scale, 0.0)
                weight_pt, d_score_pt = (x.astype(q_pK.dtype) for x in (weight_pt, d_score_pt))
                d_qs.append(_dot(d_score_pt, key_tX[:, lanes], (1, 0)))
                d_keys.append(_dot(d_score_pt, q_pK, (0, 0)))
                d_values.append(_dot(weight_pt, g_pK, (0, 0)))
            d_q_sum_ref[:, heads.lanes(g, v)] += jnp.concatenate(d_qs, axis=1)
            d_key_sum_ref[:, heads.lanes(g)] += jnp.concatenate(d_keys, axis=1)
            d_value_sum_ref[:, heads.lanes(g)] += jnp.concatenate(d_values, axis=1)

    heads.each_group(group)

    @pl.when(step.last_of_patches)
    def _():
        d_q_ref[...] = d_q_sum_ref[...].astype(d_q_ref.dtype)

    @pl.when(step.last_of_bytes)
    def _():
        d_key_ref[...] = d_key_sum_ref[...].astype(d_key_ref.dtype)
        d_value_ref[...] = d_value_sum_ref[...].astype(d_value_ref.dtype)


def gather_forward(q_BTHK, key_BPQHK, value_BPQHK, rows, scale, dtype, interpret=False):
    """Output [B, T, H, K] in `dtype` and log-sum-exp float32 [B, T, H] of patch_gather_attention;
    the latter is -inf where nothing is seen."""
    q, key, value = map(_flat, (q_BTHK, key_BPQHK, value_BPQHK))
    heads = Heads(*key_BPQHK.shape[2:])
    of_byte = in_memory(q, (q.dtype, dtype))
    of_patch = in_memory(key, (key.dtype, value.dtype))
    tiles = attention_tiles(q.shape[1], key.shape[1], of_byte, of_patch)
    padded = tiles.byte_tiles * tiles.tile_bytes
    statistics = jax.ShapeDtypeStruct((q.shape[0], heads.heads, padded), jnp.float32)
    out, lse_BHT = _walk(
        functools.partial(_gather_forward_kernel, tiles=tiles, heads=heads, scale=scale),
        tiles,
        rows,
        [("bytes", q), ("patches", key), ("patches", value)],
        [_like("bytes", q, dtype), ("byte_columns", statistics)],
        flops=_score_flops(tiles, heads, 2),
        interpret=interpret,
    )
    return out.reshape(q_BTHK.shape), lse_BHT[:, :, : tiles.num_bytes].swapaxes(1, 2)


def _gather_forward_kernel(
    path_ref, codes_ref, q_ref, key_ref, value_ref, out_ref, lse_ref,
    *, tiles: Tiles, heads: Heads, scale
):  # fmt: skip
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles)

    @pl.when(step.first_of_bytes)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        lse_ref[...] = jnp.full_like(lse_ref, -jnp.inf)

    def group(g):
        q_tX = q_ref[:, heads.lanes(g)]
        keys = [key_ref[:, heads.lanes(g, v)] for v in range(heads.vectors)]
        values = [
            _existing(value_ref[:, heads.lanes(g, v)], step, tiles) for v in range(heads.vectors)
        ]
        outs = []
        for h, lanes in heads.of_group(g):
            scores = [_dot(key_pX[:, lanes], q_tX[:, lanes], (1, 1)) * scale for key_pX in keys]
            scores = [jnp.where(own_pt, score_pt, -jnp.inf) for score_pt in scores]
            max_1t = functools.reduce(jnp.maximum, scores).max(axis=0, keepdims=True)
            weights = [jnp.exp(score_pt - _finite(max_1t)) for score_pt in scores]
            total_1t = functools.reduce(jnp.add, weights).sum(axis=0, keepdims=True)
            share_1t = 1.0 / jnp.where(total_1t > 0, total_1t, 1.0)
            outs.append(
                sum(
                    _dot((weight_pt * share_1t).astype(value_pX.dtype), value_pX[:, lanes], (0, 0))
                    for weight_pt, value_pX in zip(weights, values, strict=True)
                )
            )
            # Every byte meets its patch in one pair; the others add 0.
            row = pl.ds(h, 1)
            lse_1t = max_1t + jnp.log(jnp.where(total_1t > 0, total_1t, 1.0))
            lse_ref[row, :] = jnp.where(total_1t > 0, lse_1t, lse_ref[row, :])
        out_ref[:, heads.lanes(g)] += jnp.concatenate(outs, axis=1).astype(out_ref.dtype)

    heads.each_group(group)


def gather_backward(
    q_BTHK, key_BPQHK, value_BPQHK, rows, out_BTHK, lse_BTH, g_BTHK, scale, dtype, interpret=False
):
    """dq, dkey, dvalue of patch_gather_attention in `dtype`."""
    q, key, value, out, g = map(_flat, (q_BTHK, key_BPQHK, value_BPQHK, out_BTHK, g_BTHK))
    heads = Heads(*key_BPQHK.shape[2:])
    of_byte = in_memory(q, (q.dtype, out.dtype, g.dtype, dtype))
    of_patch = in_memory(key, (key.dtype, value.dtype, dtype, dtype), sums=2)
    tiles = attention_tiles(q.shape[1], key.shape[1], of_byte, of_patch)
    of_patches = (tiles.tile_patches, key.shape[2])
    rest = tiles.byte_tiles * tiles.tile_bytes - tiles.num_bytes
    lse = ("byte_columns", jnp.pad(lse_BTH.swapaxes(1, 2), ((0, 0), (0, 0), (0, rest))))
    d_q, d_key, d_value = _walk(
        functools.partial(_gather_backward_kernel, tiles=tiles, heads=heads, scale=scale),
        tiles,
        rows,
        [*(("bytes", x) for x in (q, out, g)), lse, ("patches", key), ("patches", value)],
        [_like("bytes", q, dtype), _like("patches", key, dtype), _like("patches", value, dtype)],
        scratch=[of_patches, of_patches],
        flops=_score_flops(tiles, heads, 5),
        interpret=interpret,
    )
    return (
        d_q.reshape(q_BTHK.shape),
        d_key.reshape(key_BPQHK.shape),
        d_value.reshape(value_BPQHK.shape),
    )


def _gather_backward_kernel(
    path_ref, codes_ref, q_ref, out_ref, g_ref, lse_ref, key_ref, value_ref,
    d_q_ref, d_key_ref, d_value_ref, d_key_sum_ref, d_value_sum_ref,
    *, tiles: Tiles, heads: Heads, scale
):  # fmt: skip
    step = _step(path_ref)
    own_pt = _own(codes_ref[...], step, tiles)
    seen_t1 = _column(codes_ref[...]) >= 0

    @pl.when(step.first_of_bytes)
    def _():
        d_q_ref[...] = jnp.zeros_like(d_q_ref)

    @pl.when(step.first_of_patches)
    def _():
        d_key_sum_ref[...] = jnp.zeros_like(d_key_sum_ref)
        d_value_sum_ref[...] = jnp.zeros_like(d_value_sum_ref)

    def group(g):
        q_tX, g_tX, out_tX = (
            _only(seen_t1, ref[:, heads.lanes(g)]) for ref in (q_ref, g_ref, out_ref)
        )
        product_tX = g_tX.astype(jnp.float32) * out_tX.astype(jnp.float32)
        ones_1K = jnp.ones((1, heads.head_dim), jnp.float32)
        d_qs = [0.0 for _ in heads.of_group(g)]
        for v in range(heads.vectors):
            key_pX, value_pX = (
                _existing(ref[:, heads.lanes(g, v)], step, tiles) for ref in (key_ref, value_ref)
            )
            d_keys, d_values = [], []
            for i, (h, lanes) in enumerate(heads.of_group(g)):
                q_tK, g_tK, key_pK = q_tX[:, lanes], g_tX[:, lanes], key_pX[:, lanes]
                mean_1t = _dot(ones_1K, product_tX[:, lanes], (1, 1))
                score_pt = _dot(key_pK, q_tK, (1, 1)) * scale
                weight_pt = jnp.where(own_pt, jnp.exp(score_pt - lse_ref[pl.ds(h, 1), :]), 0.0)
                d_weight_pt = _dot(value_pX[:, lanes], g_tK, (1, 1))
                d_score_pt = jnp.where(own_pt, weight_pt * (d_weight_pt - mean_1t) * scale, 0.0)
                weight_pt, d_score_pt = (x.astype(q_tK.dtype) for x in (weight_pt, d_score_pt))
                d_qs[i] += _dot(d_score_pt, key_pK, (0, 0))
                d_keys.append(_dot(d_score_pt, q_tK, (1, 0)))
                d_values.append(_dot(weight_pt, g_tK, (1, 0)))
            d_key_sum_ref[:, heads.lanes(g, v)] += jnp.concatenate(d_keys, axis=1)
            d_value_sum_ref[:, heads.lanes(g, v)] += jnp.concatenate(d_values, axis=1)
        d_q_ref[:, heads.lanes(g)] += jnp.concatenate(d_qs, axis=1).astype(d_q_ref.dtype)

    heads.each_group(group)

    @pl.when(step.last_of_patches)
    def _():
        d_key_ref[...] = d_key_sum_ref[...].astype(d_key_ref.dtype)
        d_value_ref[...] = d_value_sum_ref[...].astype(d_value_ref.dtype)
