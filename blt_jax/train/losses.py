"""Cross-entropy as sums, with the z-loss option: carry sums and counts, divide once."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers.model import LossSums


@flax.struct.dataclass
class CrossEntropySums:
    """Scalar float32 sums over the counted targets.

    nats: -log p of the targets; z_loss: z_loss coefficient times log(Z)^2; weight: number of
    targets; correct: targets whose logit is the largest of the row (ties count).
    """

    nats: object
    z_loss: object
    weight: object
    correct: object


def token_nats(
    logits: Float[Array, "*rows vocab"], targets: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Per target: -log p in nats, log of the partition function, and 1.0 where it is the argmax.

    Computed in float32. The target's logit is picked by comparison, not by a gather, whose
    gradient would be a scatter.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ids_V = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(ids_V == targets[..., None], logits, 0.0), axis=-1)
    correct = picked >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return log_z - picked, log_z, correct.astype(jnp.float32)


def cross_entropy_sums(
    logits: Float[Array, "*rows vocab"],
    targets: Int[Array, "*rows"],
    mask: Bool[Array, "*rows"],
    z_loss: float = 0.0,
) -> CrossEntropySums:
    """Sums of the cross-entropy over the rows where `mask` is true.

    z_loss: coefficient of log(Z)^2 (PaLM, section 5), 0 for none; it is not part of `nats`.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss}: must be >= 0")
    nats, log_z, correct = token_nats(logits, targets)
    weights = mask.astype(jnp.float32)
    return CrossEntropySums(
        # `where`, not a product: a masked row with infinite nats must count nothing.
        nats=jnp.sum(jnp.where(mask, nats, 0.0)),
        z_loss=z_loss * jnp.sum(jnp.where(mask, jnp.square(log_z), 0.0)),
        weight=jnp.sum(weights),
        correct=jnp.sum(jnp.where(mask, correct, 0.0)),
    )


def language_model_loss(
    logits: Float[Array, "batch length vocab"],
    batch: dict[str, Array],
    z_loss: float = 0.0,
    auxiliary: Float[Array, ""] | None = None,
) -> LossSums:
    """`LossSums` of next-token logits over a batch with `targets`, `target_mask`, `target_bytes`.

    auxiliary: further objective terms, already a sum over the counted targets.
    """
    sums = cross_entropy_sums(logits, batch["targets"], batch["target_mask"], z_loss)
    objective = sums.nats + sums.z_loss
    if auxiliary is not None:
        objective = objective + auxiliary
    return LossSums(
        objective=objective,
        weight=sums.weight,
        metrics={"nats": sums.nats, "bytes": count_bytes(batch), "correct": sums.correct},
    )


def count_bytes(batch: dict[str, Array]) -> Float[Array, ""]:
    """Number of UTF-8 bytes that the counted targets of a batch stand for."""
    counted = jnp.where(batch["target_mask"], batch["target_bytes"], 0)
    return jnp.sum(counted).astype(jnp.float32)
