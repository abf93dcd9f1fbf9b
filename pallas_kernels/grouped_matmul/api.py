"""Products of rows sorted by group with the weights of their group.

Axis letters: m rows, k contracted width, n columns, g local groups, G all groups.

Group i owns the rows sum(sizes[:i]) .. sum(sizes[:i+1]) - 1. With `group_offset` only the groups
group_offset .. group_offset + g - 1 are local, as under expert parallelism. Rows of no local group,
the tail behind the last group above all, have the result 0 and the gradient 0 and may hold
anything, NaN included. An empty group has the weight gradient 0. Negative sizes count as 0, rows
past m are cut off; under `jax.experimental.checkify` both are errors.

Sums are taken in float32 (float64 for float64). Differentiable in every floating-point argument, in
reverse mode, to any order. Under `jax.checkpoint`, the policy `save_only_these_names("gmm",
"routing")` keeps what `gmm` returns (before the activation) and the order of the rows
(`sort_by_expert`), so that the backward pass repeats neither a product nor the sort.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.arguments import floating, integers, whole
from pallas_kernels.grouped_matmul import metadata as metadata_lib
from pallas_kernels.grouped_matmul import vjp
from pallas_kernels.grouped_matmul.forms import FORMS
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.routing import Routing, checked

ACTIVATIONS = (None, "swiglu")


def make_group_metadata(
    group_sizes: ArrayLike,
    num_rows: int,
    *,
    group_offset: ArrayLike | None = None,
    num_local_groups: int | None = None,
    tile_rows: int | None = None,
) -> GroupMetadata:
    """The layout of `group_sizes[G]` over num_rows rows, to be shared by all products over them.

    group_offset: first local group, an integer scalar; 0 if None. It is clipped to
    0 .. G - num_local_groups. num_local_groups: g, all groups if None.
    tile_rows: rows of a kernel's tile, a multiple of 8; chosen from the mean size if None.
    """
    group_sizes = _integers("group_sizes", group_sizes, 1)
    num_groups = group_sizes.shape[0]
    num_rows = _within("num_rows", num_rows, 1, 2**30)
    if num_local_groups is None:
        num_local_groups = num_groups
    num_local_groups = _within("num_local_groups", num_local_groups, 1, num_groups)
    if group_offset is not None:
        group_offset = _integers("group_offset", group_offset, 0)
    if tile_rows is None:
        tile_rows = default_tile_rows(num_rows, num_groups)
    tile_rows = _within("tile_rows", tile_rows, 8, 2**16)
    if tile_rows % 8:
        raise ValueError(f"tile_rows={tile_rows} must be a multiple of 8")
    return metadata_lib.make(group_sizes, num_rows, group_offset, num_local_groups, tile_rows)


def default_tile_rows(num_rows: int, num_groups: int) -> int:
    """128, or 256 for groups of 512 rows and more; less only when there are fewer rows."""
    rows = 256 if num_rows >= 512 * num_groups else 128
    return min(rows, max(16, 1 << (num_rows - 1).bit_length()))


def gmm(
    lhs: ArrayLike,
    rhs: ArrayLike,
    group_sizes: ArrayLike | GroupMetadata,
    *,
    group_offset: ArrayLike | None = None,
    transpose_rhs: bool = False,
    activation: str | None = None,
    preferred_element_type: DTypeLike | None = None,
    tiling: tuple[int, int, int] | None = None,
    routing: Routing | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Rows of group i times rhs[i]: lhs[m, k], rhs[g, k, n] -> [m, n].

    group_sizes: [G] of any integer dtype, or the metadata of `make_group_metadata`.
    transpose_rhs: rhs is [g, n, k].
    activation: "swiglu" takes rhs = [gate | up] of [g, k, 2n] and returns silu(gate) * up, [m, n].
    preferred_element_type: dtype of the result, lhs's if None.
    tiling: rows, contracted width and columns of a kernel's tile; chosen from the shape if None.
    routing: of `sort_by_expert`; lhs holds the tokens [T, k], which are gathered inside of the
        product (on TPU, and by "reference" and "ragged_dot", before it) and kept for its gradients
        in place of the m = T K rows.
    implementation: None, "reference", "xla", "tpu", "gpu", "interpret" (the TPU kernel in Pallas'
        interpreter), "interpret_gpu" (the Triton kernel there) or "ragged_dot".
    """
    lhs = floating("lhs", lhs, 2)
    rhs = floating("rhs", rhs, 3)
    _same_dtype("rhs", rhs, lhs)
    contracted = rhs.shape[2 if transpose_rhs else 1]
    if contracted != lhs.shape[1]:
        raise ValueError(
            f"rhs has shape {rhs.shape}; {lhs.shape[1]} is needed in axis "
            f"{2 if transpose_rhs else 1} beside lhs {lhs.shape}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; allowed are None, 'swiglu'")
    if activation and (transpose_rhs or rhs.shape[2] % 2):
        raise ValueError(
            f"activation={activation!r} needs rhs [g, k, 2n]; "
            f"rhs has shape {rhs.shape}, transpose_rhs={transpose_rhs}"
        )
    tiling = _tiling(tiling)
    metadata = _metadata(group_sizes, lhs, routing, group_offset, rhs.shape[0], tiling)
    options = vjp.Options(
        form=dispatch.choose("gmm", implementation, FORMS),
        out_dtype=_result_dtype(preferred_element_type, lhs),
        transpose_rhs=transpose_rhs,
        tiling=tiling,
    )
    if activation:
        return vjp.swiglu(lhs, rhs, metadata, options)
    return checkpoint_name(vjp.gmm(lhs, rhs, metadata, options), "gmm")


def tgmm(
    lhs: ArrayLike,
    dout: ArrayLike,
    group_sizes: ArrayLike | GroupMetadata,
    *,
    group_offset: ArrayLike | None = None,
    num_local_groups: int | None = None,
    preferred_element_type: DTypeLike | None = None,
    tiling: tuple[int, int, int] | None = None,
    routing: Routing | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """lhs^T dout of every group's rows: lhs[m, k], dout[m, n] -> [g, k, n].

    num_local_groups: g, all groups if None. tiling: rows of a tile, columns of lhs and of dout.
    The other arguments are those of `gmm`; with routing, lhs holds the tokens and dout the rows.
    """
    lhs = floating("lhs", lhs, 2)
    dout = floating("dout", dout, 2)
    _same_dtype("dout", dout, lhs)
    tiling = _tiling(tiling)
    metadata = _metadata(group_sizes, lhs, routing, group_offset, num_local_groups, tiling)
    if dout.shape[0] != metadata.num_rows:
        raise ValueError(
            f"dout has shape {dout.shape}; {metadata.num_rows} rows are needed beside lhs "
            f"{lhs.shape}"
        )
    options = vjp.Options(
        form=dispatch.choose("tgmm", implementation, FORMS),
        out_dtype=_result_dtype(preferred_element_type, lhs),
        tiling=tiling,
    )
    return vjp.tgmm(lhs, dout, metadata, options)


def _metadata(group_sizes, lhs, routing, group_offset, num_local_groups, tiling) -> GroupMetadata:
    num_rows = lhs.shape[0]
    if routing is not None:
        tokens, choices = checked(routing).inverse.shape
        if tokens != num_rows:
            raise ValueError(f"lhs has shape {lhs.shape}; {tokens} tokens are needed for routing")
        num_rows = tokens * choices
    metadata = _of_sizes(group_sizes, num_rows, group_offset, num_local_groups, tiling)
    if routing is None:
        return metadata
    return metadata.of_tokens(routing.order, routing.inverse)


def _of_sizes(group_sizes, num_rows, group_offset, num_local_groups, tiling) -> GroupMetadata:
    if not isinstance(group_sizes, GroupMetadata):
        return make_group_metadata(
            group_sizes,
            num_rows,
            group_offset=group_offset,
            num_local_groups=num_local_groups,
            tile_rows=tiling and tiling[0],
        )
    given = group_sizes
    if group_offset is not None:
        raise ValueError("group_offset is part of the metadata; give it to make_group_metadata")
    if given.num_rows != num_rows:
        raise ValueError(f"the metadata is of {given.num_rows} rows; {num_rows} are needed")
    if num_local_groups not in (None, given.num_local_groups):
        raise ValueError(
            f"the metadata is of {given.num_local_groups} local groups, not {num_local_groups}"
        )
    if tiling and tiling[0] != given.tile_rows:
        raise ValueError(
            f"tiling={tiling} has {tiling[0]} rows; the metadata's tile_rows={given.tile_rows}"
        )
    return given


def _tiling(tiling) -> tuple[int, int, int] | None:
    if tiling is None:
        return None
    if not isinstance(tiling, tuple | list):
        raise TypeError(f"tiling={tiling!r} must be (rows, contracted width, columns) or None")
    if len(tiling) != 3:
        raise ValueError(f"tiling={tiling!r} must be (rows, contracted width, columns)")
    return tuple(_within("tiling", size, 8, 2**16) for size in tiling)


def _result_dtype(preferred, lhs: jax.Array):
    try:
        dtype = jnp.dtype(lhs.dtype if preferred is None else preferred)
    except TypeError as error:
        raise TypeError(f"preferred_element_type={preferred!r} is no dtype") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"preferred_element_type={dtype}; a floating-point dtype is needed")
    return dtype


def _integers(name: str, x, rank: int) -> jax.Array:
    x = integers(name, x)
    if x.ndim != rank or 0 in x.shape:
        needed = "a scalar" if rank == 0 else f"{rank} axis of at least 1"
        raise ValueError(f"{name} has shape {x.shape}; {needed} is needed")
    return x


def _same_dtype(name: str, x: jax.Array, lhs: jax.Array) -> None:
    if x.dtype != lhs.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; lhs's dtype {lhs.dtype} is needed")


def _within(name: str, value, low: int, high: int) -> int:
    value = whole(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be from {low} to {high}")
    return value
