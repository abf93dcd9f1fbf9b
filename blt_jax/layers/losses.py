"""Cross-entropy of next-token logits as sums: carry sums and counts, divide once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers.model import LossSums


def target_nats(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """-log p of every target in nats, and the log of the partition function, in float32.

    The target's logit is picked by comparison, not by a gather, whose gradient is a scatter and
    which cannot be partitioned over a sharded vocabulary.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ids_BTV = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    picked = jnp.sum(jnp.where(ids_BTV == targets[..., None], logits, 0.0), axis=-1)
    return log_z - picked, log_z


def cross_entropy_sums(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    target_bytes: Int[Array, "B T"],
    z_loss: float = 0.0,
) -> LossSums:
    """Sums over the targets where `mask` is true; metrics `nats`, `bytes`, `correct`.

    target_bytes: UTF-8 bytes each target stands for. z_loss: coefficient of log(Z)^2 (PaLM,
    section 5), part of the objective and never of `nats`. Raises ValueError if it is negative.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss}: must be >= 0")
    nats, log_z = target_nats(logits, targets)
    correct = jnp.argmax(logits, axis=-1) == targets
    # `where`, not a product: a masked row with infinite nats must count nothing.
    sums = {
        "nats": jnp.sum(jnp.where(mask, nats, 0.0)),
        "bytes": jnp.sum(jnp.where(mask, target_bytes, 0)).astype(jnp.float32),
        "correct": jnp.sum(mask & correct).astype(jnp.float32),
    }
    objective = sums["nats"]
    if z_loss:
        objective += z_loss * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0))
    return LossSums(objective=objective, weight=jnp.sum(mask).astype(jnp.float32), metrics=sums)
