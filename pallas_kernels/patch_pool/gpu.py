"""The GPU kernels (Pallas Triton): one program per patch and block of its width.

The bytes of a patch are contiguous, so a program reads and writes one run of rows, in chunks of
CHUNK rows with loads masked beyond the run. Every byte belongs to exactly one patch, ignored ones
to the patch before them: no two programs write the same element, and nothing is atomic. A patch of
any length is one loop; the time of a call is at least that of its longest patch.

Axis letters as in `api`; c are the bytes of a chunk, h and k the heads and lanes of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.patch_pool.rows import tie_dtype

CHUNK = 8
POOL_LANES = 1024
ATTENTION_LANES = 256


def _starts(rows, num_patches: int) -> tuple[jax.Array, jax.Array]:
    """First byte of every patch's run, int32[B, P + 1], and which bytes are seen, int32[B, T]."""
    rows_BT, seen_BT = rows

    def count(rows_T):
        ones = jnp.ones_like(rows_T)
        return jax.ops.segment_sum(ones, rows_T, num_patches, indices_are_sorted=True)

    ends_BP = jnp.cumsum(jax.vmap(count)(rows_BT), axis=1, dtype=jnp.int32)
    return jnp.pad(ends_BP, ((0, 0), (1, 0))), seen_BT.astype(jnp.int32)


def _call(kernel, grid, operands, results, lanes: int, interpret: bool):
    """All arrays stay in memory; the kernel loads and stores what it needs."""
    nbytes = sum(x.size * x.dtype.itemsize for x in (*operands, *results))
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=results,
        # With half as many the gradients of attention spill registers at four vectors per patch.
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(8, lanes // 64))),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=nbytes),
        interpret=interpret,
    )(*operands)


def _power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def _run(starts_ref, patch, row):
    """First byte of the patch's run and the byte after its last."""
    return plgpu.load(starts_ref.at[row, patch]), plgpu.load(starts_ref.at[row, patch + 1])


def _over_chunks(begin, end, body, carry):
    """carry = body(byte_c, carry) for the chunks of CHUNK bytes from `begin` to `end`."""

    def chunk(i, carry):
        return body(begin + i * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32), carry)

    return lax.fori_loop(0, (end - begin + CHUNK - 1) // CHUNK, chunk, carry)


# Pooling.


def _pool_block(width: int) -> int:
    """Lanes per program: a power of two, if possible one that divides the width."""
    divisor = width & -width
    block = divisor if divisor >= 128 else _power_of_two(width)
    return min(block, POOL_LANES)


def pool_forward(x_BTD, rows, num_patches, mode, interpret=False):
    """See `tpu.pool_forward`."""
    batch, _, width = x_BTD.shape
    block = _pool_block(width)
    out = jax.ShapeDtypeStruct((batch, num_patches, width), x_BTD.dtype)
    count = jax.ShapeDtypeStruct((batch, num_patches), jnp.float32)
    ties = jax.ShapeDtypeStruct(out.shape, tie_dtype(out.dtype))
    results = {"sum": [out], "mean": [out, count], "max": [out, ties], "min": [out, ties]}[mode]
    found = _call(
        functools.partial(_pool_forward_kernel, width=width, block=block, mode=mode),
        (num_patches, pl.cdiv(width, block), batch),
        [x_BTD, *_starts(rows, num_patches)],
        results,
        block,
        interpret,
    )
    return found[0], (found[1] if mode != "sum" else None)


def _pool_lanes(width, block):
    lane_d = pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    return lane_d, lane_d < width


def _grid_of_rows(byte_c, lane_d, lane_ok_d, rows_ok_c):
    """Indices and mask of a [chunk, block] tile."""
    shape = (byte_c.shape[0], lane_d.shape[0])
    byte_cd = jnp.broadcast_to(byte_c[:, None], shape)
    lane_cd = jnp.broadcast_to(lane_d[None, :], shape)
    mask_cd = jnp.broadcast_to(rows_ok_c[:, None], shape) & jnp.broadcast_to(
        lane_ok_d[None, :], shape
    )
    return byte_cd, lane_cd, mask_cd


def _seen(seen_ref, row, byte_c, end):
    inside_c = byte_c < end
    seen_c = plgpu.load(seen_ref.at[row, byte_c], mask=inside_c, other=0)
    return inside_c & (seen_c != 0)


def _pool_forward_kernel(
    x_ref, starts_ref, seen_ref, out_ref, *weight_ref, width: int, block: int, mode: str
):
    patch, row = pl.program_id(0), pl.program_id(2)
    lane_d, lane_ok_d = _pool_lanes(width, block)
    begin, end = _run(starts_ref, patch, row)
    extreme, sign = mode in ("max", "min"), -1.0 if mode == "min" else 1.0
    neutral = -jnp.inf if extreme else 0.0

    def chunk(byte_c, carry):
        pooled_d, ties_d, count = carry
        seen_c = _seen(seen_ref, row, byte_c, end)
        byte_cd, lane_cd, mask_cd = _grid_of_rows(byte_c, lane_d, lane_ok_d, seen_c)
        x_cd = plgpu.load(x_ref.at[row, byte_cd, lane_cd], mask=mask_cd, other=0)
        x_cd = jnp.where(mask_cd, x_cd.astype(jnp.float32) * sign, neutral)
        count = count + seen_c.astype(jnp.float32).sum()
        if not extreme:
            return pooled_d + x_cd.sum(axis=0), ties_d, count
        best_d = jnp.maximum(pooled_d, x_cd.max(axis=0))
        reached_cd = mask_cd & (x_cd == jnp.broadcast_to(best_d[None], x_cd.shape))
        ties_d = jnp.where(best_d == pooled_d, ties_d, 0.0)
        return best_d, ties_d + reached_cd.astype(jnp.float32).sum(axis=0), count

    start = (
        jnp.full((block,), neutral, jnp.float32),
        jnp.zeros((block,), jnp.float32),
        jnp.float32(0),
    )
    pooled_d, ties_d, count = _over_chunks(begin, end, chunk, start)
    if mode == "mean":
        pooled_d = pooled_d / jnp.maximum(count, 1.0)
        plgpu.store(weight_ref[0].at[row, patch], count)
    if extreme:
        pooled_d = jnp.where(count > 0, pooled_d * sign, 0.0)
        ties = ties_d.astype(weight_ref[0].dtype)
        plgpu.store(weight_ref[0].at[row, patch, lane_d], ties, mask=lane_ok_d)
    plgpu.store(out_ref.at[row, patch, lane_d], pooled_d.astype(out_ref.dtype), mask=lane_ok_d)


def pool_backward(x_BTD, out_BPD, weight, g_BPD, rows, mode, interpret=False):
    """See `tpu.pool_backward`."""
    batch, num_patches, width = g_BPD.shape
    block = _pool_block(width)
    operands = [g_BPD, *_starts(rows, num_patches)]
    if weight is not None:
        operands.append(weight)
    if mode in ("max", "min"):
        operands += [x_BTD, out_BPD]
    return _call(
        functools.partial(_pool_backward_kernel, width=width, block=block, mode=mode),
        (num_patches, pl.cdiv(width, block), batch),
        operands,
        [jax.ShapeDtypeStruct((batch, rows[0].shape[1], width), g_BPD.dtype)],
        block,
        interpret,
    )[0]


def _pool_backward_kernel(g_ref, starts_ref, seen_ref, *refs, width: int, block: int, mode: str):
    *more_refs, dx_ref = refs
    patch, row = pl.program_id(0), pl.program_id(2)
    lane_d, lane_ok_d = _pool_lanes(width, block)
    begin, end = _run(starts_ref, patch, row)

    def of_patch(ref):
        return plgpu.load(ref.at[row, patch, lane_d], mask=lane_ok_d, other=0).astype(jnp.float32)

    share_d = of_patch(g_ref)
    if mode == "mean":
        share_d = share_d / jnp.maximum(plgpu.load(more_refs[0].at[row, patch]), 1.0)
    if mode in ("max", "min"):
        ties_ref, x_ref, out_ref = more_refs
        share_d = share_d / jnp.maximum(of_patch(ties_ref), 1.0)
        best_d = of_patch(out_ref)

    def chunk(byte_c, carry):
        seen_c = _seen(seen_ref, row, byte_c, end)
        byte_cd, lane_cd, keep_cd = _grid_of_rows(byte_c, lane_d, lane_ok_d, seen_c)
        if mode in ("max", "min"):
            x_cd = plgpu.load(x_ref.at[row, byte_cd, lane_cd], mask=keep_cd, other=0)
            keep_cd &= x_cd.astype(jnp.float32) == jnp.broadcast_to(best_d[None], x_cd.shape)
        dx_cd = jnp.where(keep_cd, jnp.broadcast_to(share_d[None], keep_cd.shape), 0.0)
        *_, inside_cd = _grid_of_rows(byte_c, lane_d, lane_ok_d, byte_c < end)
        at = dx_ref.at[row, byte_cd, lane_cd]
        plgpu.store(at, dx_cd.astype(dx_ref.dtype), mask=inside_cd)
        return carry

    _over_chunks(begin, end, chunk, jnp.int32(0))


# Attention: a program has a block of heads, [h, k] for a vector of the patch, [c, h, k] for bytes.


class _Block:
    """The heads and lanes of a program, and loads and stores of them."""

    def __init__(self, heads: int, head_dim: int, block_heads: int):
        lanes = _power_of_two(head_dim)
        self.shape = (block_heads, lanes)
        self.patch, self.row = pl.program_id(0), pl.program_id(2)
        self.head_h = pl.program_id(1) * block_heads + jnp.arange(block_heads, dtype=jnp.int32)
        self.head_ok_h = self.head_h < heads
        self.lane_k = jnp.arange(lanes, dtype=jnp.int32)
        self.lane_ok_k = self.lane_k < head_dim

    def _index(self, rows_c=None, with_lanes=True):
        """Index arrays (byte, head, lane) and the mask of heads and lanes, as far as asked for."""
        shape = (() if rows_c is None else rows_c.shape) + self.shape[: 2 if with_lanes else 1]
        head_axis = 0 if rows_c is None else 1

        def spread(x, axis):
            return jnp.broadcast_to(lax.expand_dims(x, set(range(len(shape))) - {axis}), shape)

        indices = [] if rows_c is None else [spread(rows_c, 0)]
        indices.append(spread(self.head_h, head_axis))
        mask = spread(self.head_ok_h, head_axis)
        if with_lanes:
            indices.append(spread(self.lane_k, head_axis + 1))
            mask &= spread(self.lane_ok_k, head_axis + 1)
        return indices, mask, spread

    def load_vector(self, ref, vector, with_lanes=True):
        """ref[row, patch, vector, h, k] or, without lanes, ref[row, patch, vector, h]."""
        indices, mask, _ = self._index(with_lanes=with_lanes)
        at = ref.at[(self.row, self.patch, vector, *indices)]
        return plgpu.load(at, mask=mask, other=0).astype(jnp.float32)

    def store_vector(self, ref, vector, x, with_lanes=True):
        indices, mask, _ = self._index(with_lanes=with_lanes)
        at = ref.at[(self.row, self.patch, vector, *indices)]
        plgpu.store(at, x.astype(ref.dtype), mask=mask)

    def load_bytes(self, ref, byte_c, rows_ok_c, with_lanes=True):
        """ref[row, c, h, k] or ref[row, c, h]; 0 where a row is not wanted."""
        indices, mask, spread = self._index(byte_c, with_lanes)
        at = ref.at[(self.row, *indices)]
        return plgpu.load(at, mask=mask & spread(rows_ok_c, 0), other=0).astype(jnp.float32)

    def store_bytes(self, ref, byte_c, rows_ok_c, x, with_lanes=True):
        indices, mask, spread = self._index(byte_c, with_lanes)
        at = ref.at[(self.row, *indices)]
        plgpu.store(at, x.astype(ref.dtype), mask=mask & spread(rows_ok_c, 0))

    def store_seen(self, ref, byte_c, end, seen_c, x_chk):
        """x at the bytes that are seen; 0 at the others, whatever their patch holds."""
        seen_chk = jnp.broadcast_to(seen_c[:, None, None], x_chk.shape)
        self.store_bytes(ref, byte_c, byte_c < end, jnp.where(seen_chk, x_chk, 0.0))


def _scores(bytes_chk, vector_hk) -> jax.Array:
    """[c, h]"""
    return (bytes_chk * jnp.broadcast_to(vector_hk[None], bytes_chk.shape)).sum(axis=2)


def _weighted(weight_ch, x) -> jax.Array:
    """weight[c, h] times x[c, h, k] or x[h, k]: [c, h, k]."""
    shape = (*weight_ch.shape, x.shape[-1])
    weight_chk = jnp.broadcast_to(weight_ch[:, :, None], shape)
    return weight_chk * jnp.broadcast_to(x if x.ndim == 3 else x[None], shape)


def _rows_of(x_h, like_ch):
    return jnp.broadcast_to(x_h[None], like_ch.shape)


def _spread_seen(seen_c, heads: int):
    return jnp.broadcast_to(seen_c[:, None], (seen_c.shape[0], heads))


def _finite(x):
    return jnp.where(x == -jnp.inf, 0.0, x)


def _attend(kernel, arrays, rows, vectors_shape, results, scale, interpret):
    batch, num_patches, vectors, heads, head_dim = vectors_shape
    lanes = _power_of_two(head_dim)
    block_heads = min(_power_of_two(heads), max(1, ATTENTION_LANES // lanes))
    return _call(
        functools.partial(
            kernel,
            make_block=functools.partial(_Block, heads, head_dim, block_heads),
            vectors=vectors,
            scale=scale,
        ),
        (num_patches, math.ceil(heads / block_heads), batch),
        [*_starts(rows, num_patches), *arrays],
        results,
        block_heads * lanes,
        interpret,
    )


def patch_forward(q_BPQHK, key_BTHK, value_BTHK, rows, scale, dtype, interpret=False):
    """See `tpu.patch_forward`."""
    return _attend(
        _patch_forward_kernel,
        [q_BPQHK, key_BTHK, value_BTHK],
        rows,
        q_BPQHK.shape,
        [
            jax.ShapeDtypeStruct(q_BPQHK.shape, dtype),
            jax.ShapeDtypeStruct(q_BPQHK.shape[:-1], jnp.float32),
        ],
        scale,
        interpret,
    )


def _patch_forward_kernel(
    starts_ref, seen_ref, q_ref, key_ref, value_ref, out_ref, lse_ref,
    *, make_block, vectors: int, scale
):  # fmt: skip
    block = make_block()
    begin, end = _run(starts_ref, block.patch, block.row)
    qs = [block.load_vector(q_ref, v) * scale for v in range(vectors)]

    def chunk(byte_c, carry):
        seen_c = _seen(seen_ref, block.row, byte_c, end)
        key_chk = block.load_bytes(key_ref, byte_c, seen_c)
        value_chk = block.load_bytes(value_ref, byte_c, seen_c)
        seen_ch = _spread_seen(seen_c, block.shape[0])
        found = []
        for q_hk, (max_h, total_h, sum_hk) in zip(qs, carry, strict=True):
            score_ch = jnp.where(seen_ch, _scores(key_chk, q_hk), -jnp.inf)
            new_h = jnp.maximum(max_h, score_ch.max(axis=0))
            kept_h = jnp.exp(max_h - _finite(new_h))
            weight_ch = jnp.exp(score_ch - _rows_of(_finite(new_h), score_ch))
            kept_hk = jnp.broadcast_to(kept_h[:, None], sum_hk.shape)
            sum_hk = sum_hk * kept_hk + _weighted(weight_ch, value_chk).sum(axis=0)
            found.append((new_h, total_h * kept_h + weight_ch.sum(axis=0), sum_hk))
        return tuple(found)

    nothing = (
        jnp.full(block.shape[:1], -jnp.inf, jnp.float32),
        jnp.zeros(block.shape[:1], jnp.float32),
        jnp.zeros(block.shape, jnp.float32),
    )
    found = _over_chunks(begin, end, chunk, (nothing,) * vectors)
    for v, (max_h, total_h, sum_hk) in enumerate(found):
        some_h = jnp.where(total_h > 0, total_h, 1.0)
        block.store_vector(out_ref, v, sum_hk / jnp.broadcast_to(some_h[:, None], sum_hk.shape))
        block.store_vector(lse_ref, v, max_h + jnp.log(some_h), with_lanes=False)


def patch_backward(
    q_BPQHK, key_BTHK, value_BTHK, rows, out_BPQHK, lse_BPQH, g_BPQHK, scale, dtype, interpret=False
):
    """See `tpu.patch_backward`."""
    return _attend(
        _patch_backward_kernel,
        [q_BPQHK, key_BTHK, value_BTHK, out_BPQHK, lse_BPQH, g_BPQHK],
        rows,
        q_BPQHK.shape,
        [jax.ShapeDtypeStruct(x.shape, dtype) for x in (q_BPQHK, key_BTHK, value_BTHK)],
        scale,
        interpret,
    )


def _patch_backward_kernel(
    starts_ref, seen_ref, q_ref, key_ref, value_ref, out_ref, lse_ref, g_ref,
    d_q_ref, d_key_ref, d_value_ref, *, make_block, vectors: int, scale
):  # fmt: skip
    block = make_block()
    begin, end = _run(starts_ref, block.patch, block.row)
    qs = [block.load_vector(q_ref, v) for v in range(vectors)]
    gs = [block.load_vector(g_ref, v) for v in range(vectors)]
    means = [(g * block.load_vector(out_ref, v)).sum(axis=1) for v, g in enumerate(gs)]
    lses = [_finite(block.load_vector(lse_ref, v, with_lanes=False)) for v in range(vectors)]

    def chunk(byte_c, d_qs):
        seen_c = _seen(seen_ref, block.row, byte_c, end)
        key_chk = block.load_bytes(key_ref, byte_c, seen_c)
        value_chk = block.load_bytes(value_ref, byte_c, seen_c)
        seen_ch = _spread_seen(seen_c, block.shape[0])
        d_key_chk, d_value_chk = jnp.zeros_like(key_chk), jnp.zeros_like(value_chk)
        found = []
        for q_hk, g_hk, mean_h, lse_h, d_q_hk in zip(qs, gs, means, lses, d_qs, strict=True):
            score_ch = _scores(key_chk, q_hk) * scale
            weight_ch = jnp.where(seen_ch, jnp.exp(score_ch - _rows_of(lse_h, score_ch)), 0.0)
            d_weight_ch = _scores(value_chk, g_hk)
            d_score_ch = weight_ch * (d_weight_ch - _rows_of(mean_h, score_ch)) * scale
            d_score_ch = jnp.where(seen_ch, d_score_ch, 0.0)
            found.append(d_q_hk + _weighted(d_score_ch, key_chk).sum(axis=0))
            d_key_chk += _weighted(d_score_ch, q_hk)
            d_value_chk += _weighted(weight_ch, g_hk)
        block.store_seen(d_key_ref, byte_c, end, seen_c, d_key_chk)
        block.store_seen(d_value_ref, byte_c, end, seen_c, d_value_chk)
        return tuple(found)

    zeros = tuple(jnp.zeros(block.shape, jnp.float32) for _ in range(vectors))
    for v, d_q_hk in enumerate(_over_chunks(begin, end, chunk, zeros)):
        block.store_vector(d_q_ref, v, d_q_hk)


def gather_forward(q_BTHK, key_BPQHK, value_BPQHK, rows, scale, dtype, interpret=False):
    """See `tpu.gather_forward`."""
    return _attend(
        _gather_forward_kernel,
        [q_BTHK, key_BPQHK, value_BPQHK],
        rows,
        key_BPQHK.shape,
        [
            jax.ShapeDtypeStruct(q_BTHK.shape, dtype),
            jax.ShapeDtypeStruct(q_BTHK.shape[:-1], jnp.float32),
        ],
        scale,
        interpret,
    )


def _gather_forward_kernel(
    starts_ref, seen_ref, q_ref, key_ref, value_ref, out_ref, lse_ref,
    *, make_block, vectors: int, scale
):  # fmt: skip
    block = make_block()
    begin, end = _run(starts_ref, block.patch, block.row)
    keys = [block.load_vector(key_ref, v) * scale for v in range(vectors)]
    values = [block.load_vector(value_ref, v) for v in range(vectors)]

    def chunk(byte_c, carry):
        seen_c = _seen(seen_ref, block.row, byte_c, end)
        q_chk = block.load_bytes(q_ref, byte_c, seen_c)
        scores = [_scores(q_chk, key_hk) for key_hk in keys]
        max_ch = functools.reduce(jnp.maximum, scores)
        weights = [jnp.exp(score_ch - max_ch) for score_ch in scores]
        total_ch = functools.reduce(jnp.add, weights)
        seen_ch = _spread_seen(seen_c, block.shape[0])
        out_chk = jnp.zeros_like(q_chk)
        for weight_ch, value_hk in zip(weights, values, strict=True):
            out_chk += _weighted(jnp.where(seen_ch, weight_ch / total_ch, 0.0), value_hk)
        lse_ch = jnp.where(seen_ch, max_ch + jnp.log(total_ch), -jnp.inf)
        block.store_seen(out_ref, byte_c, end, seen_c, out_chk)
        block.store_bytes(lse_ref, byte_c, byte_c < end, lse_ch, with_lanes=False)
        return carry

    _over_chunks(begin, end, chunk, jnp.int32(0))


def gather_backward(
    q_BTHK, key_BPQHK, value_BPQHK, rows, out_BTHK, lse_BTH, g_BTHK, scale, dtype, interpret=False
):
    """See `tpu.gather_backward`."""
    return _attend(
        _gather_backward_kernel,
        [q_BTHK, key_BPQHK, value_BPQHK, out_BTHK, lse_BTH, g_BTHK],
        rows,
        key_BPQHK.shape,
        [jax.ShapeDtypeStruct(x.shape, dtype) for x in (q_BTHK, key_BPQHK, value_BPQHK)],
        scale,
        interpret,
    )


def _gather_backward_kernel(
    starts_ref, seen_ref, q_ref, key_ref, value_ref, out_ref, lse_ref, g_ref,
    d_q_ref, d_key_ref, d_value_ref, *, make_block, vectors: int, scale
):  # fmt: skip
    block = make_block()
    begin, end = _run(starts_ref, block.patch, block.row)
    keys = [block.load_vector(key_ref, v) for v in range(vectors)]
    values = [block.load_vector(value_ref, v) for v in range(vectors)]

    def chunk(byte_c, carry):
        seen_c = _seen(seen_ref, block.row, byte_c, end)
        q_chk, g_chk, out_chk = (
            block.load_bytes(ref, byte_c, seen_c) for ref in (q_ref, g_ref, out_ref)
        )
        lse_ch = block.load_bytes(lse_ref, byte_c, seen_c, with_lanes=False)
        mean_ch = (g_chk * out_chk).sum(axis=2)
        seen_ch = _spread_seen(seen_c, block.shape[0])
        d_q_chk, found = jnp.zeros_like(q_chk), []
        for key_hk, value_hk, (d_key_hk, d_value_hk) in zip(keys, values, carry, strict=True):
            score_ch = _scores(q_chk, key_hk) * scale
            weight_ch = jnp.where(seen_ch, jnp.exp(score_ch - lse_ch), 0.0)
            d_score_ch = weight_ch * (_scores(g_chk, value_hk) - mean_ch) * scale
            d_score_ch = jnp.where(seen_ch, d_score_ch, 0.0)
            d_q_chk += _weighted(d_score_ch, key_hk)
            d_key_hk += _weighted(d_score_ch, q_chk).sum(axis=0)
            found.append((d_key_hk, d_value_hk + _weighted(weight_ch, g_chk).sum(axis=0)))
        block.store_seen(d_q_ref, byte_c, end, seen_c, d_q_chk)
        return tuple(found)

    zeros = jnp.zeros(block.shape, jnp.float32)
    found = _over_chunks(begin, end, chunk, ((zeros, zeros),) * vectors)
    for v, (d_key_hk, d_value_hk) in enumerate(found):
        block.store_vector(d_key_ref, v, d_key_hk)
        block.store_vector(d_value_ref, v, d_value_hk)
