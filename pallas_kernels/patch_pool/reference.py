"""The operations over dense [P, T] masks: plain, slow and differentiable, the truth for tests."""

import jax
import jax.numpy as jnp


def patch_pool(x_BTD: jax.Array, ids_BT: jax.Array, num_patches: int, mode: str) -> jax.Array:
    """See `api.patch_pool`."""
    own_BPT = ids_BT[:, None, :] == jnp.arange(num_patches, dtype=jnp.int32)[None, :, None]
    own_BPT1 = own_BPT[..., None]
    x_B1TD = x_BTD[:, None].astype(_accumulator(x_BTD))
    if mode in ("sum", "mean"):
        pooled_BPD = jnp.where(own_BPT1, x_B1TD, 0.0).sum(2)
        if mode == "mean":
            count_BP1 = jnp.maximum(own_BPT1.sum(2, dtype=jnp.int32), 1)
            pooled_BPD = pooled_BPD / count_BP1.astype(pooled_BPD.dtype)
        return pooled_BPD.astype(x_BTD.dtype)
    if mode == "max":
        pooled_BPD = jnp.where(own_BPT1, x_B1TD, -jnp.inf).max(2)
    else:
        pooled_BPD = jnp.where(own_BPT1, x_B1TD, jnp.inf).min(2)
    return jnp.where(own_BPT1.any(2), pooled_BPD, 0.0).astype(x_BTD.dtype)


def patch_attention(
    q_BPQHK, key_BTHK, value_BTHK, ids_BT, segment_ids_BT, patch_segment_ids_BP, scale, window
):
    """See `api.patch_attention`."""
    dtype = _accumulator(q_BPQHK)
    back_BPT = _patch_minus_id(ids_BT, q_BPQHK.shape[1])
    seen_BPT = _seen(back_BPT, ids_BT, segment_ids_BT, patch_segment_ids_BP, window)
    score_BQHPT = jnp.einsum(
        "bpqhk,bthk->bqhpt", q_BPQHK.astype(dtype), key_BTHK.astype(dtype), precision="highest"
    )
    weight_BQHPT = _softmax(score_BQHPT * scale, seen_BPT[:, None, None], (4,))
    value_BTHK = jnp.where(seen_BPT.any(1)[:, :, None, None], value_BTHK.astype(dtype), 0.0)
    out = jnp.einsum("bqhpt,bthk->bpqhk", weight_BQHPT, value_BTHK, precision="highest")
    return out.astype(q_BPQHK.dtype)


def patch_gather_attention(
    q_BTHK, key_BPQHK, value_BPQHK, ids_BT, segment_ids_BT, patch_segment_ids_BP, scale, window
):
    """See `api.patch_gather_attention`."""
    dtype = _accumulator(q_BTHK)
    back_BPT = -_patch_minus_id(ids_BT, key_BPQHK.shape[1])
    seen_BPT = _seen(back_BPT, ids_BT, segment_ids_BT, patch_segment_ids_BP, window)
    score_BQHPT = jnp.einsum(
        "bthk,bpqhk->bqhpt", q_BTHK.astype(dtype), key_BPQHK.astype(dtype), precision="highest"
    )
    weight_BQHPT = _softmax(score_BQHPT * scale, seen_BPT[:, None, None], (1, 3))
    out = jnp.einsum(
        "bqhpt,bpqhk->bthk", weight_BQHPT, value_BPQHK.astype(dtype), precision="highest"
    )
    return out.astype(q_BTHK.dtype)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _seen(patches_back_BPT, ids_BT, segment_ids_BT, patch_segment_ids_BP, window) -> jax.Array:
    num_patches = patches_back_BPT.shape[1]
    valid_BT = (ids_BT >= 0) & (ids_BT < num_patches)
    seen_BPT = valid_BT[:, None] & (patches_back_BPT >= 0) & (patches_back_BPT < window)
    if segment_ids_BT is not None:
        seen_BPT &= segment_ids_BT[:, None, :] == patch_segment_ids_BP[:, :, None]
    return seen_BPT


def _patch_minus_id(ids_BT, num_patches) -> jax.Array:
    return jnp.arange(num_patches, dtype=jnp.int32)[None, :, None] - ids_BT[:, None, :]


def _softmax(score, seen, axes) -> jax.Array:
    some = jnp.broadcast_to(seen, score.shape).any(axes, keepdims=True)
    score = jnp.where(seen, score, jnp.where(some, -jnp.inf, 0.0).astype(score.dtype))
    return jnp.where(seen, jax.nn.softmax(score, axis=axes), 0.0)
