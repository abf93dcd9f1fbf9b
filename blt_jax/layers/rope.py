"""Rotary position embedding, both weight layouts, with the Llama 3.1 frequency scaling."""

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RopeLayout(enum.Enum):
    """Which two features rotate together: (2i, 2i + 1), or (i, i + head_dim / 2)."""

    INTERLEAVED = "interleaved"
    HALF_SPLIT = "half_split"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RopeConfig:
    """Rotation base and frequency scaling; scaling_factor 1 means unscaled.

    With scaling_factor s > 1 wavelengths above original_max_positions / low_freq_factor are
    stretched by s, those below original_max_positions / high_freq_factor are kept, and those
    between are blended (Llama 3.1 release).
    """

    theta: float = 500_000.0
    layout: RopeLayout = RopeLayout.INTERLEAVED
    scaling_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f"RopeConfig.theta={self.theta}: must be > 0")
        if self.scaling_factor < 1:
            raise ValueError(f"RopeConfig.scaling_factor={self.scaling_factor}: must be >= 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeConfig.low_freq_factor={self.low_freq_factor}: must be > 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(
                f"RopeConfig.original_max_positions={self.original_max_positions}: must be >= 1"
            )


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2] radians per position."""
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding needs an even width")
    freq = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling_factor > 1:
        wavelength = 2 * math.pi / freq
        low, high = config.low_freq_factor, config.high_freq_factor
        blend = np.clip((config.original_max_positions / wavelength - low) / (high - low), 0, 1)
        freq = (1 - blend) * freq / config.scaling_factor + blend * freq
    return freq.astype(np.float32)


def rope_table(
    positions: Int[Array, "B T"], config: RopeConfig, head_dim: int
) -> Float[Array, "B T K"]:
    """float32 cosines, then sines, of the head_dim / 2 angles of every position.

    Computed once per forward pass; the barrier keeps the compiler from evaluating the cosines
    again inside every layer.
    """
    freq_K = jnp.asarray(rope_frequencies(config, head_dim))
    angle_BTK = positions.astype(jnp.float32)[:, :, None] * freq_K[None, None, :]
    table = jnp.concatenate([jnp.cos(angle_BTK), jnp.sin(angle_BTK)], axis=-1)
    return jax.lax.optimization_barrier(table)


def rotate(
    x: Float[Array, "B T H K"], table: Float[Array, "#B T K"], layout: RopeLayout
) -> Float[Array, "B T H K"]:
    """Rotates the pairs of features of x by the angles of `rope_table`, in float32; a table of one
    row is that of all."""
    cos, sin = jnp.split(table[:, :, None, :], 2, axis=-1)
    x32 = x.astype(jnp.float32)
    if layout is RopeLayout.HALF_SPLIT:
        a, b = jnp.split(x32, 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x32[..., 0::2], x32[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return y.astype(x.dtype)


def apply_rope(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], config: RopeConfig
) -> Float[Array, "B T H K"]:
    """Rotates the features of x by their positions."""
    return rotate(x, rope_table(positions, config, x.shape[-1]), config.layout)
