"""Keys in front of a row that all of its tokens see, and keys without a value.

Both join attention that was computed without them: a softmax over further keys needs of the first
ones their output and log-sum-exp alone. Axis letters: N keys of a prefix, R query heads per kv
head, J width of the values.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Prefix:
    """Keys seen by every query that is no padding, whatever its document and window.

    key [N, G, K], value [N, G, J]: the same for all rows. distance: int32 [B, T] from each query
    to the first of them, None without slopes.
    """

    key: Any
    value: Any
    distance: Any = None

    def bias(self, slopes: Float[Array, " H"]) -> Float[Array, "B H T N"]:
        """Linear position bias of the queries towards the prefix."""
        if self.distance is None:
            raise ValueError("prefix.distance=None: slopes need the distances to the prefix")
        index_N = jnp.arange(self.key.shape[0], dtype=jnp.int32)
        distance_BTN = self.distance[:, :, None] - index_N[None, None, :]
        distance_BTN = distance_BTN.astype(jnp.float32)
        return -slopes[None, :, None, None] * distance_BTN[:, None]


def join_softmax(
    out: Float[Array, "B T H J"],
    lse: Float[Array, "B H T"],
    q: Float[Array, "B T H K"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T H J"]:
    """Attention as if the softmax behind `out` had also run over a prefix and a sink logit.

    lse: log-sum-exp of the scores behind out. Padding (segment 0) gives 0.
    """
    B, T, H, K = q.shape
    scores = [lse[None]]
    if prefix is not None:
        N, G = prefix.key.shape[:2]
        # Few keys: their products may be float32, and CPU has none such of two bfloat16 arrays.
        key, value = (x.astype(jnp.float32) for x in (prefix.key, prefix.value))
        q_BTGRK = (q.astype(jnp.float32) * scale).reshape(B, T, G, H // G, K)
        scores_NBHT = jnp.einsum("btgrk,ngk->nbgrt", q_BTGRK, key).reshape(N, B, H, T)
        if slopes is not None:
            scores_NBHT += jnp.moveaxis(prefix.bias(slopes), 3, 0)
        scores.append(scores_NBHT)
    if sink is not None:
        scores.append(jnp.broadcast_to(sink[None, None, :, None], (1, B, H, T)))
    # Keys lead: a reduction over a leading axis is several times faster on CPU.
    weights = jax.nn.softmax(jnp.concatenate(scores), axis=0)
    joined = out.astype(jnp.float32) * jnp.swapaxes(weights[0], 1, 2)[..., None]
    if prefix is not None:
        weights_NBGRT = weights[1 : N + 1].reshape(N, B, G, H // G, T)
        joined += jnp.einsum("nbgrt,ngj->btgrj", weights_NBGRT, value).reshape(joined.shape)
    return jnp.where((segment_ids > 0)[:, :, None, None], joined, 0.0).astype(out.dtype)
