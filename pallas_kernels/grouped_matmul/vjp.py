"""Gradients of the grouped products, by each other.

    out = gmm(lhs, rhs):   d lhs = gmm(d out, rhs^T),          d rhs = tgmm(lhs, d out)
    out = tgmm(lhs, dout): d lhs = gmm(dout, d out^T),         d dout = gmm(lhs, d out)

`rhs^T` is `transpose_rhs` toggled, nothing is transposed in memory. Where the metadata say that lhs
holds tokens, d lhs is the sum of the rows of each. The rules call the differentiable products, so
derivatives of any order exist.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul.reference import accumulator
from pallas_kernels.grouped_matmul.routing import sum_of_choices


@dataclasses.dataclass(frozen=True)
class Form:
    """The products of one implementation: gmm and tgmm.

    swiglu: gmm with the activation fused, None where the form has none of its own.
    """

    gmm: Callable[..., jax.Array]
    tgmm: Callable[..., jax.Array]
    swiglu: Callable[..., jax.Array] | None = None

    def multiply_and_gate(self, lhs, rhs, metadata, out_dtype, tiling) -> jax.Array:
        """silu(lhs @ gate) * (lhs @ up) for rhs = [gate | up], fused where the form can."""
        if self.swiglu is not None:
            with contextlib.suppress(NotImplementedError):
                return self.swiglu(lhs, rhs, metadata, out_dtype, tiling)
        return _gated(self.gmm(lhs, rhs, metadata, False, lhs.dtype, tiling)).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a product needs besides arrays; `tiling` is (rows, contracted, columns) or None."""

    form: Form
    out_dtype: Any
    transpose_rhs: bool = False
    tiling: tuple[int, int, int] | None = None

    def backward(self, out_dtype, transpose_rhs=False, order=(0, 1, 2)) -> "Options":
        """The same form with another result, and the tiles permuted as the axes are."""
        tiling = self.tiling and tuple(self.tiling[i] for i in order)
        return Options(self.form, jnp.dtype(out_dtype), transpose_rhs, tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gmm(lhs, rhs, metadata, options: Options) -> jax.Array:
    return options.form.gmm(
        lhs, rhs, metadata, options.transpose_rhs, options.out_dtype, options.tiling
    )


def _gmm_forward(lhs, rhs, metadata, options):
    return gmm(lhs, rhs, metadata, options), (lhs, rhs, metadata)


def _gmm_backward(options, residuals, g):
    lhs, rhs, metadata = residuals
    g = g.astype(lhs.dtype)
    swapped = options.backward(lhs.dtype, not options.transpose_rhs, (0, 2, 1))
    d_lhs = _of_lhs(gmm(g, rhs, metadata.of_rows(), swapped), metadata)
    if options.transpose_rhs:
        rows = metadata.rows_of(lhs), metadata.of_rows()
        d_rhs = tgmm(g, *rows, options.backward(rhs.dtype, order=(0, 2, 1)))
    else:
        d_rhs = tgmm(lhs, g, metadata, options.backward(rhs.dtype))
    return d_lhs, d_rhs, None


gmm.defvjp(_gmm_forward, _gmm_backward)


def _of_lhs(rows, metadata) -> jax.Array:
    """The gradient of lhs from that of its rows."""
    if metadata.inverse is None:
        return rows
    return sum_of_choices(rows, metadata.inverse).astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tgmm(lhs, dout, metadata, options: Options) -> jax.Array:
    return options.form.tgmm(lhs, dout, metadata, options.out_dtype, options.tiling)


def _tgmm_forward(lhs, dout, metadata, options):
    return tgmm(lhs, dout, metadata, options), (lhs, dout, metadata)


def _tgmm_backward(options, residuals, g):
    lhs, dout, metadata = residuals
    g = g.astype(lhs.dtype)
    transposed = options.backward(lhs.dtype, True, (0, 2, 1))
    d_lhs = _of_lhs(gmm(dout, g, metadata.of_rows(), transposed), metadata)
    d_dout = gmm(lhs, g, metadata, options.backward(dout.dtype))
    return d_lhs, d_dout, None


tgmm.defvjp(_tgmm_forward, _tgmm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def swiglu(lhs, rhs, metadata, options: Options) -> jax.Array:
    """silu(lhs @ gate) * (lhs @ up) for rhs = [gate | up] in its columns."""
    return options.form.multiply_and_gate(lhs, rhs, metadata, options.out_dtype, options.tiling)


def _swiglu_forward(lhs, rhs, metadata, options):
    # The pre-activations are kept, so that the backward pass repeats no product.
    unfused = dataclasses.replace(options, out_dtype=lhs.dtype)
    hidden = checkpoint_name(gmm(lhs, rhs, metadata, unfused), "gmm")
    return _gated(hidden).astype(options.out_dtype), (lhs, rhs, metadata, hidden)


def _swiglu_backward(options, residuals, g):
    lhs, rhs, metadata, hidden = residuals
    _, vjp = jax.vjp(_gated, hidden)
    (d_hidden,) = vjp(g.astype(hidden.dtype))
    unfused = dataclasses.replace(options, out_dtype=lhs.dtype)
    return _gmm_backward(unfused, (lhs, rhs, metadata), d_hidden)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gated(hidden: jax.Array) -> jax.Array:
    """silu(gate) * up of [gate | up]."""
    gate, up = jnp.split(hidden.astype(accumulator(hidden.dtype)), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(hidden.dtype)
