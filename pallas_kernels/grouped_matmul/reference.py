"""One dense product per group over all rows: plain and slow, the truth for tests."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata


def gmm(lhs, rhs, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling) -> jax.Array:
    """See `api.gmm`."""
    del tiling
    if transpose_rhs:
        rhs = rhs.swapaxes(1, 2)
    dtype, lhs = accumulator(lhs.dtype), metadata.rows_of(lhs)
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    out = jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    for group in range(rhs.shape[0]):
        own = (metadata.row_groups == group)[:, None]
        product = jnp.matmul(jnp.where(own, lhs, 0), rhs[group], precision=lax.Precision.HIGHEST)
        out = jnp.where(own, product, out)
    return out.astype(out_dtype)


def tgmm(lhs, dout, metadata: GroupMetadata, out_dtype, tiling) -> jax.Array:
    """See `api.tgmm`."""
    del tiling
    dtype, lhs = accumulator(lhs.dtype), metadata.rows_of(lhs)
    lhs, dout = lhs.astype(dtype), dout.astype(dtype)
    products = []
    for group in range(metadata.num_local_groups):
        own = (metadata.row_groups == group)[:, None]
        own_lhs, own_dout = jnp.where(own, lhs, 0), jnp.where(own, dout, 0)
        products.append(jnp.matmul(own_lhs.T, own_dout, precision=lax.Precision.HIGHEST))
    return jnp.stack(products).astype(out_dtype)


def accumulator(dtype) -> jnp.dtype:
    """The dtype in which products are summed."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
