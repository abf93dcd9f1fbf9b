"""The grouped products as Triton kernels.

`gmm` runs one program per visit of a row tile (`metadata.py`), half tile where that is more than
128 rows, and column tile; programs past the last visit end at once. `tgmm` runs one program per
group and tile of its result, which walks the group's rows from their very start. Rows of other
groups are masked where they are loaded, so that nothing of them is read; tokens are gathered there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.sequential import one_by_one

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
LARGEST_ROWS = 128
# Columns of a tile: with 128 rows their float32 sum takes 64 registers of each of 256 threads.
COLUMNS = 128


def gmm(
    lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling, interpret=False
) -> jax.Array:
    """See `api.gmm`."""
    call = functools.partial(_gmm_call, transpose_rhs, False, out_dtype, tiling, interpret)
    return one_by_one(call)(lhs, rhs, metadata)


def swiglu(lhs, rhs, metadata: GroupMetadata, out_dtype, tiling, interpret=False) -> jax.Array:
    """silu(lhs @ gate) * (lhs @ up) for rhs = [gate | up], with no pre-activation in memory."""
    call = functools.partial(_gmm_call, False, True, out_dtype, tiling, interpret)
    return one_by_one(call)(lhs, rhs, metadata)


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling, interpret=False) -> jax.Array:
    """See `api.tgmm`."""
    call = functools.partial(_tgmm_call, out_dtype, tiling, interpret)
    return one_by_one(call)(lhs, dout, metadata)


def _gmm_call(transpose_rhs, gated, out_dtype, tiling, interpret, lhs, rhs, metadata):
    _refuse(lhs, rhs, out_dtype, metadata.tile_rows, tiling)
    rows = min(metadata.tile_rows, LARGEST_ROWS)
    width = lhs.shape[1]
    columns = rhs.shape[1 if transpose_rhs else 2] // (2 if gated else 1)
    inner, outer = _blocks(tiling, width, columns, lhs.dtype.itemsize)
    if gated and tiling is None:
        outer = max(outer // 2, 16)  # two sums
    parts = metadata.tile_rows // rows
    kernel = functools.partial(
        _gmm_kernel,
        rows=rows,
        inner=inner,
        outer=outer,
        parts=parts,
        num_groups=metadata.num_local_groups,
        transpose_rhs=transpose_rhs,
        gated=gated,
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((metadata.num_rows, columns), out_dtype),
        grid=(metadata.visit_groups.shape[0] * parts, pl.cdiv(columns, outer)),
        compiler_params=_compiler_params(rows * outer * (2 if gated else 1)),
        interpret=interpret,
        name="gmm",
    )(
        metadata.bounds,
        metadata.visit_groups,
        metadata.visit_tiles,
        metadata.visit_weights,
        metadata.num_visits,
        *_given(metadata.tokens),
        lhs,
        rhs,
    )


def _gmm_kernel(
    bounds,
    groups,
    tiles,
    weights,
    num_visits,
    *refs,
    rows,
    inner,
    outer,
    parts,
    num_groups,
    transpose_rhs,
    gated,
):
    *tokens, lhs, rhs, out = refs
    visit, part = pl.program_id(0) // parts, pl.program_id(0) % parts
    column = pl.program_id(1) * outer + jnp.arange(outer, dtype=jnp.int32)
    group, weight = groups[visit], weights[visit]
    begin, end = bounds[group], bounds[group + 1]
    low = (tiles[visit] * parts + part) * rows

    @pl.when((visit < num_visits[0]) & (low < end) & (low + rows > begin))
    def _():
        row = low + jnp.arange(rows, dtype=jnp.int32)
        own = (row >= begin) & (row < end)
        source, own = _source(tokens, row, own), own[:, None]
        shifts = (0, out.shape[1]) if gated else (0,)

        def add(step, sums):
            k = step * inner + jnp.arange(inner, dtype=jnp.int32)
            left = _load(lhs, (source[:, None], k[None]), own & (k < lhs.shape[1])[None])
            return tuple(
                total + _product(left, k, column + shift)
                for total, shift in zip(sums, shifts, strict=True)
            )

        def _product(left, k, column):
            inside = (k < lhs.shape[1])[:, None] & (column < out.shape[1] * len(shifts))[None]
            if transpose_rhs:
                right = _load(rhs, (weight, column[:, None], k[None]), inside.T)
            else:
                right = _load(rhs, (weight, k[:, None], column[None]), inside)
            return plgpu.dot(left, right, trans_b=transpose_rhs).astype(jnp.float32)

        local = (group > 0) & (group <= num_groups)
        steps = jnp.where(local, np.int32(pl.cdiv(lhs.shape[1], inner)), np.int32(0))
        zeros = jnp.zeros((rows, outer), jnp.float32)
        sums = lax.fori_loop(np.int32(0), steps, add, (zeros,) * len(shifts))
        total = jax.nn.silu(sums[0]) * sums[1] if gated else sums[0]
        plgpu.store(
            out.at[row[:, None], column[None]],
            total.astype(out.dtype),
            mask=own & (column < out.shape[1])[None],
        )


def _tgmm_call(out_dtype, tiling, interpret, lhs, dout, metadata):
    _refuse(lhs, dout, out_dtype, metadata.tile_rows, tiling)
    inner, outer = (
        min(_power_of_two(size), tiling[axis + 1] if tiling else COLUMNS)
        for axis, size in enumerate((lhs.shape[1], dout.shape[1]))
    )
    kernel = functools.partial(
        _tgmm_kernel, rows=_contracted(lhs.dtype.itemsize), inner=inner, outer=outer
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            (metadata.num_local_groups, lhs.shape[1], dout.shape[1]), out_dtype
        ),
        grid=(
            pl.cdiv(lhs.shape[1], inner),
            pl.cdiv(dout.shape[1], outer),
            metadata.num_local_groups,
        ),
        compiler_params=_compiler_params(inner * outer),
        interpret=interpret,
        name="tgmm",
    )(metadata.bounds, *_given(metadata.tokens), lhs, dout)


def _tgmm_kernel(bounds, *refs, rows, inner, outer):
    *tokens, lhs, dout, out = refs
    group = pl.program_id(2)
    begin, end = bounds[group + 1], bounds[group + 2]
    left_column = pl.program_id(0) * inner + jnp.arange(inner, dtype=jnp.int32)
    right_column = pl.program_id(1) * outer + jnp.arange(outer, dtype=jnp.int32)

    def add(step, total):
        row = begin + step * rows + jnp.arange(rows, dtype=jnp.int32)
        source, own = _source(tokens, row, row < end), (row < end)[:, None]
        left = _load(
            lhs, (source[:, None], left_column[None]), own & (left_column < lhs.shape[1])[None]
        )
        right = _load(
            dout, (row[:, None], right_column[None]), own & (right_column < dout.shape[1])[None]
        )
        return total + plgpu.dot(left, right, trans_a=True).astype(jnp.float32)

    steps = (end - begin + np.int32(rows - 1)) // np.int32(rows)
    total = lax.fori_loop(np.int32(0), steps, add, jnp.zeros((inner, outer), jnp.float32))
    inside = (left_column < lhs.shape[1])[:, None] & (right_column < dout.shape[1])[None]
    plgpu.store(
        out.at[group, left_column[:, None], right_column[None]],
        total.astype(out.dtype),
        mask=inside,
    )


def _given(tokens) -> tuple[jax.Array, ...]:
    return () if tokens is None else (tokens,)


def _source(tokens, row, own) -> jax.Array:
    """The rows of lhs for the sorted rows, those that are a group's `own`."""
    if not tokens:
        return row
    return plgpu.load(tokens[0].at[row], mask=own, other=0)


def _load(ref, index, mask) -> jax.Array:
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def _blocks(tiling, width, columns, itemsize) -> tuple[int, int]:
    """Contracted width and columns of a tile, powers of two."""
    inner, outer = tiling[1:] if tiling else (_contracted(itemsize), COLUMNS)
    return min(inner, _power_of_two(width)), min(outer, _power_of_two(columns))


def _contracted(itemsize: int) -> int:
    """128 bytes of every row at a time: two stages of both operands take 64 KiB."""
    return 128 // itemsize


def _power_of_two(size: int) -> int:
    """The smallest one that covers `size`, at least 16 as the matrix units need."""
    return max(16, 1 << (size - 1).bit_length())


def _compiler_params(sums: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=8 if sums >= 128 * 128 else 4, num_stages=3)


def _refuse(lhs, other, out_dtype, tile_rows, tiling) -> None:
    for name, given in (("lhs", lhs.dtype), ("preferred_element_type", jnp.dtype(out_dtype))):
        if given not in DTYPES:
            raise NotImplementedError(
                f"the GPU kernel: {name} has dtype {given}; allowed are float32, bfloat16, float16"
            )
    sizes = (tile_rows, *(tiling or ())[1:])
    if any(size < 16 or size & (size - 1) for size in sizes):
        raise NotImplementedError(
            f"the GPU kernel: tile_rows={tile_rows}, tiling={tiling}; "
            "powers of two from 16 are needed"
        )
    if max(lhs.size, other.size) >= 2**31:
        raise NotImplementedError(
            f"the GPU kernel counts elements in 32 bits: the operands {lhs.shape} and "
            f"{other.shape} must each have fewer than 2**31"
        )
