"""The one function through which every linear projection goes, and the initialisers."""

import enum
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Initialization(enum.Enum):
    """Standard deviation of projections: input width^-1/2 cut at 3 sigma, or normal 0.02."""

    FAN_IN = "fan_in"
    NORMAL_002 = "normal_002"


class DepthScaling(enum.Enum):
    """Factor that divides the standard deviation of layer l of L (released BLT code).

    CURRENT: sqrt(2 (l + 1)); TOTAL: sqrt(2 (L + 1)); WIDTH: width / 4096.
    """

    NONE = "none"
    CURRENT = "current"
    TOTAL = "total"
    WIDTH = "width"


def truncated_normal(stddev: float | jax.Array):
    """Initialiser: a normal of standard deviation `stddev`, cut at three of them."""

    def init(key, shape, dtype=jnp.float32):
        return stddev * jax.random.truncated_normal(key, -3.0, 3.0, shape, dtype)

    return init


def projection_init(kind: Initialization, fan_in: int, divisor: float | jax.Array = 1.0):
    """Initialiser of a projection with `fan_in` inputs."""
    if kind is Initialization.NORMAL_002:
        return nn.initializers.normal(0.02)
    return truncated_normal(fan_in**-0.5 / divisor)


def depth_divisor(kind: DepthScaling, layer, num_layers: int, d_model: int) -> float | jax.Array:
    """Divisor of the standard deviation in layer `layer` (0-based, may be traced)."""
    match kind:
        case DepthScaling.NONE:
            return 1.0
        case DepthScaling.CURRENT:
            return jnp.sqrt(2.0 * (jnp.asarray(layer, jnp.float32) + 1.0))
        case DepthScaling.TOTAL:
            return math.sqrt(2.0 * (num_layers + 1))
        case DepthScaling.WIDTH:
            return d_model / 4096


def project(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    *,
    num_input_axes: int = 1,
    output_dtype: jnp.dtype | None = None,
) -> Float[Array, "..."]:
    """Contracts the last `num_input_axes` axes of x with the first ones of the kernel.

    The kernel is cast to the type of x; the result has that type too, unless output_dtype asks
    for the float32 accumulator. Off a mesh the rows are flattened first, because a weight
    gradient that contracts two axes is 2-3 times slower on CPU than one over flattened rows; on a
    mesh rows keep their axes, so that each can be sharded.
    """
    in_shape, out_shape = kernel.shape[:num_input_axes], kernel.shape[num_input_axes:]
    rows = x.shape[: x.ndim - num_input_axes]
    if x.shape[len(rows) :] != in_shape:
        raise ValueError(f"project: x {x.shape} does not end in the kernel's inputs {in_shape}")
    mesh = jax.sharding.get_abstract_mesh()
    kernel = kernel.reshape(math.prod(in_shape), math.prod(out_shape)).astype(x.dtype)
    if mesh.empty or mesh.size == 1:
        x = x.reshape(math.prod(rows), math.prod(in_shape))
    else:
        x = x.reshape(*rows, math.prod(in_shape))
    y = jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=output_dtype)
    return y.reshape(*rows, *out_shape)
