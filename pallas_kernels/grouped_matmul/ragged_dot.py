"""`jax.lax.ragged_dot` under the contract of this package, for comparison.

On the CPU it multiplies every group with all rows: groups times the work, and the memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.reference import accumulator
from pallas_kernels.grouped_matmul.sequential import one_by_one


def gmm(lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling) -> jax.Array:
    """See `api.gmm`."""
    del tiling
    _refuse_offset(metadata)
    if transpose_rhs:
        rhs = rhs.swapaxes(1, 2)
    product = functools.partial(lax.ragged_dot, preferred_element_type=accumulator(lhs.dtype))
    out = one_by_one(product)(_own(metadata.rows_of(lhs), metadata), rhs, metadata.sizes)
    return _own(out.astype(out_dtype), metadata)


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling) -> jax.Array:
    """See `api.tgmm`."""
    del tiling
    _refuse_offset(metadata)
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    product = functools.partial(
        lax.ragged_dot_general,
        ragged_dot_dimension_numbers=numbers,
        preferred_element_type=accumulator(lhs.dtype),
    )
    lhs = _own(metadata.rows_of(lhs), metadata)
    out = one_by_one(product)(lhs, _own(dout, metadata), metadata.sizes)
    return out.astype(out_dtype)


def _own(x, metadata) -> jax.Array:
    own = metadata.row_groups < metadata.num_local_groups
    return jnp.where(own[:, None], x, jnp.zeros((), x.dtype))


def _refuse_offset(metadata) -> None:
    if metadata.num_local_groups != metadata.num_groups:
        raise NotImplementedError(
            "implementation='ragged_dot': jax.lax.ragged_dot has no group_offset; "
            f"num_local_groups={metadata.num_local_groups} must be all {metadata.num_groups} groups"
        )
