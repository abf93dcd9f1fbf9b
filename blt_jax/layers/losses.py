"""Cross-entropy of next-token logits as sums: carry sums and counts, divide once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers.model import LossSums


def target_nats(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]]:
    """Per target, in float32: -log p in nats, log of the partition function, is it the largest.

    The target's logit is picked by comparison, not by a gather, whose gradient is a scatter and
    which cannot be partitioned over a sharded vocabulary. Ties count as largest.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ids_BTV = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    picked = jnp.sum(jnp.where(ids_BTV == targets[..., None], logits, 0.0), axis=-1)
    correct = picked >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return log_z - picked, log_z, correct


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
    nats, log_z, correct = target_nats(logits, targets)
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


def chunked_cross_entropy_sums(
    logits: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    target_bytes: Int[Array, "B T"],
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> LossSums:
    """`cross_entropy_sums` of logits(hidden) with the logits of `chunk` tokens per row at a time.

    For large vocabularies: neither the forward nor the backward pass (which computes the logits
    again) holds more than one chunk of them.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be >= 1")
    B, T = targets.shape
    chunks = -(-T // chunk)

    def split(x):
        pad = [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, pad).reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(sums, part):
        hidden, *goal = part
        return jax.tree.map(jnp.add, sums, cross_entropy_sums(logits(hidden), *goal, z_loss)), None

    names = ("nats", "bytes", "correct")
    zero = jnp.float32(0.0)
    start = LossSums(objective=zero, weight=zero, metrics=dict.fromkeys(names, zero))
    parts = tuple(split(x) for x in (hidden, targets, mask, target_bytes))
    return jax.lax.scan(body, start, parts)[0]
