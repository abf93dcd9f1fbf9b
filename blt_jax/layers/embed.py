"""Token embedding and output head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from blt_jax.dist.sharding import ShardingRules, constrain
from blt_jax.layers.projection import project, truncated_normal


class Embed(nn.Module):
    """Table [vocab_size, d_model]; ids outside it are never indexed (clipped by the caller)."""

    vocab_size: int
    d_model: int
    dtype: jnp.dtype
    sharding: ShardingRules
    stddev: float = 0.0
    """0 means d_model^-1/2."""

    def setup(self):
        init = truncated_normal(self.stddev or self.d_model**-0.5)
        self.table = self.param(
            "table",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (self.vocab_size, self.d_model),
            jnp.float32,
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = look_up(self.table, ids, self.sharding).astype(self.dtype)
        return constrain(x_BTD, ("batch", "length", "embed_act"), self.sharding)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """float32 logits with the same table (tied head)."""
        return head_logits(x, self.table.T, self.sharding)


def look_up(
    table: Float[Array, "V D"], ids: Int[Array, "*B"], sharding: ShardingRules
) -> Float[Array, "*B D"]:
    """The rows of the table that ids name."""
    # The gather needs the width unsharded, or the partitioner replicates the table.
    return jnp.take(constrain(table, ("vocab", None), sharding), ids, axis=0)


def head_logits(
    x: Float[Array, "B T D"], kernel: Float[Array, "D V"], sharding: ShardingRules
) -> Float[Array, "B T V"]:
    """float32 logits of an output projection."""
    logits_BTV = project(x, kernel, output_dtype=jnp.dtype(jnp.float32))
    return constrain(logits_BTV, ("batch", "length", "vocab_act"), sharding)


class Head(nn.Module):
    """Untied output projection to float32 logits."""

    vocab_size: int
    sharding: ShardingRules
    stddev: float = 0.0
    """0 means d_model^-1/2."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        d_model = x.shape[-1]
        init = truncated_normal(self.stddev or d_model**-0.5)
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, ("embed", "vocab")),
            (d_model, self.vocab_size),
            jnp.float32,
        )
        return head_logits(x, kernel, self.sharding)


def check_token_ids(
    name: str,
    ids: jax.Array | np.ndarray,
    vocab_size: int | None = None,
    real: jax.Array | np.ndarray | None = None,
) -> None:
    """Raises TypeError unless ids have an integer type (a float array would be truncated).

    vocab_size: also raises ValueError for ids outside 0..vocab_size-1 where they are known, that
    is outside jit. real: bool of the shape of ids, the ones that are looked at; None all.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {ids.dtype}: token ids must be integers")
    if vocab_size is None or any(isinstance(x, jax.core.Tracer) for x in (ids, real)):
        return
    found = np.asarray(ids) if real is None else np.asarray(ids)[np.asarray(real)]
    if found.size and (found.min() < 0 or found.max() >= vocab_size):
        raise ValueError(
            f"{name} hold ids {found.min()}..{found.max()}: must be 0..{vocab_size - 1}"
        )
