"""What every model of the suite offers to the training loop, the launcher and the converters."""

import dataclasses
import enum
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blt_jax.dist.mesh import platform
from blt_jax.dist.sharding import ShardingRules


class Precision(enum.Enum):
    """Type of the activations; parameters, norms, softmax, logits and losses stay float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> jnp.dtype:
        """For AUTO bfloat16, and float32 in programs for CPU."""
        if self is Precision.AUTO:
            return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
        return jnp.dtype(self.value)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """Base of every model config: data only, hashable, treated as frozen once parsed."""

    precision: Precision = Precision.AUTO

    def build(self, sharding: ShardingRules | None = None) -> "Model":
        """The linen module of this config."""
        raise NotImplementedError(f"{type(self).__name__} has no build()")


@flax.struct.dataclass
class LossSums:
    """Sums over the counted targets of one (micro-)batch: carry sums, divide once.

    objective: scalar float32, sum of nats and auxiliary terms; weight: scalar float32, number of
    counted targets; metrics: named scalar float32 sums, at least `nats` and `bytes`.
    """

    objective: Any
    weight: Any
    metrics: dict[str, Any]


class Model(nn.Module):
    """Base linen module: attributes `config` and `sharding`, and the methods below."""

    config: ModelConfig
    sharding: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    def example_inputs(self) -> tuple:
        """Small positional arguments of `__call__`, enough to initialise the parameters."""
        raise NotImplementedError(f"{type(self).__name__} has no example_inputs()")

    def loss(self, params, batch: dict[str, jax.Array], key: jax.Array | None = None) -> LossSums:
        """Forward pass and training objective of one batch."""
        raise NotImplementedError(f"{type(self).__name__} has no loss()")

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises ValueError for rows (numpy arrays of a batch, before they reach a device) that
        would give a silently wrong loss: what a compiled program cannot look for."""

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs per input token, analytic; the backward pass costs twice as much."""
        raise NotImplementedError(f"{type(self).__name__} has no flops_per_token()")
