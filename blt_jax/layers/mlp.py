"""Gated feed-forward layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blt_jax.dist.sharding import ShardingRules, constrain
from blt_jax.layers.projection import Initialization, project, projection_init


@jax.custom_vjp
def silu_product(gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """silu(gate) * up; the backward pass keeps only the two arguments."""
    return jax.nn.silu(gate) * up


def _silu_product_forward(gate, up):
    return silu_product(gate, up), (gate, up)


def _silu_product_backward(residuals, g):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate, g * gate * sigmoid


silu_product.defvjp(_silu_product_forward, _silu_product_backward)


def swiglu(
    x: Float[Array, "B T D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    sharding: ShardingRules,
) -> Float[Array, "B T D"]:
    """down(silu(gate(x)) * up(x))."""
    hidden_BTF = silu_product(project(x, gate), project(x, up))
    hidden_BTF = constrain(hidden_BTF, ("batch", "length", "mlp_act"), sharding)
    return project(hidden_BTF, down)


class SwiGLU(nn.Module):
    """Gated feed-forward layer with SiLU, without biases."""

    mlp_dim: int
    initialization: Initialization
    sharding: ShardingRules

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], depth_divisor=1.0) -> Float[Array, "B T D"]:
        d_model = x.shape[-1]

        def kernel(name, shape, names):
            init = projection_init(self.initialization, shape[0], depth_divisor)
            return self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)

        gate = kernel("gate", (d_model, self.mlp_dim), ("embed", "mlp"))
        up = kernel("up", (d_model, self.mlp_dim), ("embed", "mlp"))
        down = kernel("down", (self.mlp_dim, d_model), ("mlp", "embed"))
        return swiglu(x, gate, up, down, self.sharding)
