"""The portable fast form: sorted segment reductions and row gathers, linear in the bytes.

No array grows with patches times bytes. Rows are a batch axis of every gather and scatter, so a
program sharded over rows needs no communication. Both attentions keep their output and the
log-sum-exp of the scores, and recompute the weights in the backward pass. The forward and backward
halves are joined in `vjp`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.patch_pool.rows import shared, shifted_rows, take, tie_dtype


def pool_forward(x_BTD, rows, num_patches: int, mode: str):
    """Pooled [B, P, D], and what the gradient needs: the number of bytes of every patch, float
    [B, P], of a mean; how many share an extreme, [B, P, D] in `tie_dtype`; None of a sum."""
    rows_BT, seen_BT = rows
    if mode in ("max", "min"):
        return _extreme(x_BTD, rows_BT, seen_BT, num_patches, 1 if mode == "max" else -1)
    x_BTD_wide = x_BTD.astype(_accumulator(x_BTD))
    pooled_BPD = _segment_sum(jnp.where(seen_BT[..., None], x_BTD_wide, 0.0), rows_BT, num_patches)
    if mode == "sum":
        return pooled_BPD.astype(x_BTD.dtype), None
    count_BP = _count(rows_BT, seen_BT, num_patches).astype(pooled_BPD.dtype)
    pooled_BPD = pooled_BPD / jnp.maximum(count_BP, 1.0)[..., None]
    return pooled_BPD.astype(x_BTD.dtype), count_BP


def _extreme(x_BTD, rows_BT, seen_BT, num_patches, sign):
    low_BTD = jnp.where(seen_BT[..., None], sign * x_BTD, -jnp.inf)
    some_BP = _count(rows_BT, seen_BT, num_patches) > 0
    best_BPD = sign * _segment_max(low_BTD, rows_BT, num_patches)
    best_BPD = jnp.where(some_BP[..., None], best_BPD, 0.0)
    reached_BTD = (x_BTD == take(best_BPD, rows_BT)) & seen_BT[..., None]
    ties_BPD = _segment_sum(reached_BTD.astype(jnp.float32), rows_BT, num_patches)
    return best_BPD, ties_BPD.astype(tie_dtype(x_BTD.dtype))


def pool_backward(x_BTD, out_BPD, weight, g_BPD, rows, mode: str) -> jax.Array:
    """dx[B, T, D] in g's dtype; x and out matter for extremes only."""
    rows_BT, seen_BT = rows
    kept_BTD = seen_BT[..., None]
    if mode in ("max", "min"):
        kept_BTD &= x_BTD == take(out_BPD, rows_BT)
    if weight is not None:
        weight_BPD = weight if weight.ndim == 3 else weight[..., None]
        g_BPD = shared(g_BPD, weight_BPD)
    return jnp.where(kept_BTD, take(g_BPD, rows_BT), 0.0)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _segment_sum(x_BT, rows_BT, num_patches) -> jax.Array:
    add = functools.partial(jax.ops.segment_sum, num_segments=num_patches, indices_are_sorted=True)
    return jax.vmap(add)(x_BT, rows_BT)


def _segment_max(x_BT, rows_BT, num_patches) -> jax.Array:
    most = functools.partial(jax.ops.segment_max, num_segments=num_patches, indices_are_sorted=True)
    return jax.vmap(most)(x_BT, rows_BT)


def _count(rows_BT, seen_BT, num_patches) -> jax.Array:
    return _segment_sum(seen_BT.astype(jnp.int32), rows_BT, num_patches)


# Softmax over groups, met one step of the window at a time. The statistics of a group are the
# maximum, the sum of weights and the weighted values, the last two relative to the maximum.


def _over_window(window, step, combine):
    """combine(step(0), step(1), ..., step(window - 1)) with the memory of one step."""
    first = step(jnp.int32(0))
    if window == 1:
        return first

    def body(carry, shift):
        return combine(carry, step(shift)), None

    return lax.scan(body, first, jnp.arange(1, window, dtype=jnp.int32))[0]


def _combine_statistics(left, right):
    maximum = jnp.maximum(left[0], right[0])

    def rescaled(m, total, values):
        factor = jnp.exp(m - _finite(maximum))
        return total * factor, values * factor[..., None]

    return maximum, *_add(rescaled(*left), rescaled(*right))


def _add(left, right):
    return jax.tree.map(jnp.add, left, right)


def _finite(m: jax.Array) -> jax.Array:
    """Maxima with those of groups where nothing is seen replaced by 0."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _finish(statistics):
    """Output and log-sum-exp of the scores, 0 and -inf where nothing is seen."""
    maximum, total, values = statistics
    total = jnp.where(total > 0, total, 1.0)
    return values / total[..., None], maximum + jnp.log(total)


def _take_seen(x_BPQHK, rows_BT, seen_BT11) -> jax.Array:
    """What each byte's patch holds, [B, T, Q, H, K] in the dtype of sums; 0 where none is seen."""
    x_BTQHK = take(x_BPQHK, rows_BT).astype(_accumulator(x_BPQHK))
    return jnp.where(seen_BT11[..., None], x_BTQHK, 0.0)


# Patches attend to bytes.


def _patch_scores(q_BPQHK, key_BTHK, rows, segments, scale, shift):
    """The patch `shift` after each byte's own: its row, visibility, queries, and the scores, -inf
    where it is not seen."""
    rows_BT, seen_BT = shifted_rows(*rows, shift, q_BPQHK.shape[1], *segments)
    seen_BT11 = seen_BT[:, :, None, None]
    q_BTQHK = _take_seen(q_BPQHK, rows_BT, seen_BT11)
    score_BTQH = (q_BTQHK * key_BTHK[:, :, None].astype(q_BTQHK.dtype)).sum(-1) * scale
    return rows_BT, seen_BT11, q_BTQHK, jnp.where(seen_BT11, score_BTQH, -jnp.inf)


def patch_forward(q_BPQHK, key_BTHK, value_BTHK, rows, segments, scale, window):
    """Output and log-sum-exp [B, P, Q, H] of patch_attention."""
    num_patches = q_BPQHK.shape[1]

    def step(shift):
        rows_BT, seen_BT11, _, score_BTQH = _patch_scores(
            q_BPQHK, key_BTHK, rows, segments, scale, shift
        )
        m_BPQH = _segment_max(score_BTQH, rows_BT, num_patches)
        weight_BTQH = jnp.exp(score_BTQH - take(_finite(m_BPQH), rows_BT))
        value_BT1HK = value_BTHK[:, :, None].astype(weight_BTQH.dtype)
        weighted = jnp.where(seen_BT11[..., None], weight_BTQH[..., None] * value_BT1HK, 0.0)
        return (
            m_BPQH,
            _segment_sum(weight_BTQH, rows_BT, num_patches),
            _segment_sum(weighted, rows_BT, num_patches),
        )

    out, lse_BPQH = _finish(_over_window(window, step, _combine_statistics))
    return out.astype(q_BPQHK.dtype), lse_BPQH


def patch_backward(
    q_BPQHK, key_BTHK, value_BTHK, rows, segments, out_BPQHK, lse_BPQH, g_BPQHK, scale, window
):
    """dq, dkey, dvalue of patch_attention."""
    dtype = lse_BPQH.dtype
    num_patches = q_BPQHK.shape[1]
    key_BT1HK = key_BTHK[:, :, None].astype(dtype)
    value_BT1HK = value_BTHK[:, :, None].astype(dtype)
    mean_BPQH = (g_BPQHK.astype(dtype) * out_BPQHK.astype(dtype)).sum(-1)

    def step(shift):
        rows_BT, seen_BT11, q_BTQHK, score_BTQH = _patch_scores(
            q_BPQHK, key_BTHK, rows, segments, scale, shift
        )
        lse_BTQH = take(_finite(lse_BPQH), rows_BT)
        weight_BTQH = jnp.where(seen_BT11, jnp.exp(score_BTQH - lse_BTQH), 0.0)
        g_BTQHK = _take_seen(g_BPQHK, rows_BT, seen_BT11).astype(dtype)
        d_weight_BTQH = (g_BTQHK * value_BT1HK).sum(-1)
        d_score_BTQH = weight_BTQH * (d_weight_BTQH - take(mean_BPQH, rows_BT)) * scale
        d_score_BTQH1 = jnp.where(seen_BT11, d_score_BTQH, 0.0)[..., None]
        d_q_BTQHK = jnp.where(seen_BT11[..., None], d_score_BTQH1 * key_BT1HK, 0.0)
        return (
            _segment_sum(d_q_BTQHK, rows_BT, num_patches),
            (d_score_BTQH1 * q_BTQHK).sum(2),
            (weight_BTQH[..., None] * g_BTQHK).sum(2),
        )

    d_q, d_key, d_value = _over_window(window, step, _add)
    return tuple(x.astype(q_BPQHK.dtype) for x in (d_q, d_key, d_value))


# Bytes attend to the vectors of patches.


def _gather_scores(q_BTHK, key_BPQHK, rows, segments, scale, shift):
    """The patch `shift` before each byte's own: its row, visibility, keys, and the scores, -inf
    where it is not seen."""
    rows_BT, seen_BT = shifted_rows(*rows, -shift, key_BPQHK.shape[1], *segments)
    seen_BT11 = seen_BT[:, :, None, None]
    key_BTQHK = _take_seen(key_BPQHK, rows_BT, seen_BT11)
    score_BTQH = (q_BTHK[:, :, None].astype(key_BTQHK.dtype) * key_BTQHK).sum(-1) * scale
    return rows_BT, seen_BT11, key_BTQHK, jnp.where(seen_BT11, score_BTQH, -jnp.inf)


def gather_forward(q_BTHK, key_BPQHK, value_BPQHK, rows, segments, scale, window):
    """Output and log-sum-exp [B, T, H] of patch_gather_attention."""

    def step(shift):
        rows_BT, seen_BT11, _, score_BTQH = _gather_scores(
            q_BTHK, key_BPQHK, rows, segments, scale, shift
        )
        m_BTH = score_BTQH.max(2)
        weight_BTQH = jnp.exp(score_BTQH - _finite(m_BTH)[:, :, None])
        value_BTQHK = _take_seen(value_BPQHK, rows_BT, seen_BT11)
        return m_BTH, weight_BTQH.sum(2), (weight_BTQH[..., None] * value_BTQHK).sum(2)

    out, lse_BTH = _finish(_over_window(window, step, _combine_statistics))
    return out.astype(q_BTHK.dtype), lse_BTH


def gather_backward(
    q_BTHK, key_BPQHK, value_BPQHK, rows, segments, out_BTHK, lse_BTH, g_BTHK, scale, window
):
    """dq, dkey, dvalue of patch_gather_attention."""
    dtype = lse_BTH.dtype
    num_patches = key_BPQHK.shape[1]
    q_BT1HK = q_BTHK[:, :, None].astype(dtype)
    g_BT1HK = g_BTHK[:, :, None].astype(dtype)
    mean_BT1H = (g_BT1HK * out_BTHK[:, :, None].astype(dtype)).sum(-1)
    lse_BT1H = _finite(lse_BTH)[:, :, None]

    def step(shift):
        rows_BT, seen_BT11, key_BTQHK, score_BTQH = _gather_scores(
            q_BTHK, key_BPQHK, rows, segments, scale, shift
        )
        weight_BTQH = jnp.where(seen_BT11, jnp.exp(score_BTQH - lse_BT1H), 0.0)
        value_BTQHK = _take_seen(value_BPQHK, rows_BT, seen_BT11)
        d_weight_BTQH = (g_BT1HK * value_BTQHK).sum(-1)
        d_score_BTQH = jnp.where(seen_BT11, weight_BTQH * (d_weight_BTQH - mean_BT1H), 0.0)
        d_score_BTQH1 = (d_score_BTQH * scale)[..., None]
        # An ignored byte may hold anything: nothing of it reaches the patches.
        seen_BT111 = seen_BT11[..., None]
        d_key_BTQHK = jnp.where(seen_BT111, d_score_BTQH1 * q_BT1HK, 0.0)
        d_value_BTQHK = jnp.where(seen_BT111, weight_BTQH[..., None] * g_BT1HK, 0.0)
        return (
            (d_score_BTQH1 * key_BTQHK).sum(2),
            _segment_sum(d_key_BTQHK, rows_BT, num_patches),
            _segment_sum(d_value_BTQHK, rows_BT, num_patches),
        )

    d_q, d_key, d_value = _over_window(window, step, _add)
    return tuple(x.astype(q_BTHK.dtype) for x in (d_q, d_key, d_value))
