"""Causal self-attention over packed rows. Axis letter J: width of the values, often K."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from blt_jax.dist.mesh import platform
from blt_jax.layers.block_attention import block_attention
from blt_jax.layers.masks import NEGATIVE, causal_mask
from blt_jax.layers.tpu_attention import splash_attention

MAX_DENSE = 128
"""Longest row for which `causal_attention` builds the whole mask."""


def masked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G J"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float | None = None,
) -> Float[Array, "B T H J"]:
    """Softmax attention with a full mask: the plain form, quadratic in memory.

    Query head h uses key-value head h // (H / G). Scores and softmax are float32; a query that
    sees no key gets 0.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    if H % G:
        raise ValueError(f"masked_attention: {H} query heads are no multiple of {G} kv heads")
    scale = K**-0.5 if scale is None else scale
    q_BTGRK = q.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * scale, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(mask[:, None, None], weights, 0.0).astype(v.dtype)
    return jnp.einsum("bgrts,bsgj->btgrj", weights, v).reshape(B, T, H, -1)


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H J"]:
    """Causal self-attention inside documents, optionally in a sliding window.

    segment_ids: 0 = padding (output 0), 1.. = documents. A window of w shows a query itself and
    the w - 1 positions before it; 0 means no window. Short rows take the dense form, longer ones
    go by blocks: memory is linear in T, and so is time with a window. Programs for TPU take a
    kernel for them.
    """
    H, G = q.shape[2], k.shape[2]
    if H % G:
        raise ValueError(f"causal_attention: {H} query heads are no multiple of {G} kv heads")
    if window < 0:
        raise ValueError(f"causal_attention: window={window} must be at least 0")
    if q.shape[1] <= MAX_DENSE:
        return dense_causal_attention(q, k, v, segment_ids, window=window, scale=scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if platform() == "tpu":
        return splash_attention(q, k, v, segment_ids, window=window, scale=scale)
    return block_attention(q, k, v, segment_ids, window=window, scale=scale)


def dense_causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
) -> Float[Array, "B T H J"]:
    """As `causal_attention`, with the whole mask: the truth for tests, and best for short rows."""
    index_T = jnp.arange(q.shape[1])
    mask = causal_mask(index_T, index_T, segment_ids, segment_ids, window)
    # Every form names its result for the remat policies, as its backward pass reads it.
    return checkpoint_name(masked_attention(q, k, v, mask, scale=scale), "attention")
