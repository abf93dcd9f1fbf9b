"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float):
    """x / rms(x) in float32, cast back to the type of x, then times the weight (Llama)."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)
    return y.astype(x.dtype) * weight


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a weight that starts at one."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        weight = self.param("weight", init, (x.shape[-1],), jnp.float32)
        return rms_norm(x, weight, self.eps)
