"""Normalisation layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blt_jax.layers.reductions import inner


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float):
    """x / rms(x) in float32, cast back to the type of x, then times the weight (Llama).

    The backward pass keeps x and one number per row instead of the three arrays of the size of x
    that differentiation of the plain formula would store.
    """
    return _forward(x, weight, eps)[0]


def _forward(x, weight, eps):
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    y = (x32 * inverse_rms).astype(x.dtype) * _as_row(weight, x)
    return y, (x, inverse_rms, weight)


def _backward(eps, residuals, g):
    del eps
    x, inverse_rms, weight = residuals
    g32 = g.astype(jnp.float32)
    unit = x.astype(jnp.float32) * inverse_rms
    d_weight = jnp.sum(g32 * unit, axis=tuple(range(x.ndim - 1)))
    d_unit = g32 * _as_row(weight, x).astype(jnp.float32)
    d_x = inverse_rms * (d_unit - unit * _mean_product(d_unit, unit))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


def _mean_product(x, y):
    return inner(x, y)[..., None] / x.shape[-1]


def _as_row(weight, x):
    return weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)


rms_norm.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a weight that starts at one."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        weight = self.param("weight", init, (x.shape[-1],), jnp.float32)
        return rms_norm(x, weight, self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
):
    """(x - mean) / deviation over the last axis in float32, times the weight plus the bias, in the
    type of x. The backward pass keeps x and two numbers per row."""
    return _layer_forward(x, weight, bias, eps)[0]


def _layer_forward(x, weight, bias, eps):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(variance + eps)
    weight32, bias32 = (_as_row(each, x32) for each in (weight, bias))
    y = (x32 - mean) * scale * weight32 + bias32
    return y.astype(x.dtype), (x, mean, scale, weight)


def _layer_backward(eps, residuals, g):
    del eps
    x, mean, scale, weight = residuals
    g32 = g.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * scale
    rows = tuple(range(x.ndim - 1))
    d_unit = g32 * _as_row(weight, g32)
    d_x = d_unit - jnp.mean(d_unit, axis=-1, keepdims=True)
    d_x = scale * (d_x - unit * _mean_product(d_unit, unit))
    d_weight, d_bias = jnp.sum(g32 * unit, axis=rows), jnp.sum(g32, axis=rows)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype), d_bias.astype(weight.dtype)


layer_norm.defvjp(_layer_forward, _layer_backward)
