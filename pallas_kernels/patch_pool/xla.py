"""The portable fast form: sorted segment reductions and row gathers, linear in the bytes.

No array grows with patches times bytes. Rows are a batch axis of every gather and scatter, so a
program sharded over rows needs no communication. Both attentions keep their output and the
log-sum-exp of the scores, and recompute the weights in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def patch_pool(x_BTD: jax.Array, ids_BT: jax.Array, num_patches: int, mode: str) -> jax.Array:
    """See `api.patch_pool`."""
    rows_BT, valid_BT = _sorted_rows(ids_BT, num_patches)
    if mode == "max":
        return _segment_extreme(x_BTD, rows_BT, valid_BT, num_patches)
    if mode == "min":
        return -_segment_extreme(-x_BTD, rows_BT, valid_BT, num_patches)
    x_BTD_wide = x_BTD.astype(_accumulator(x_BTD))
    pooled_BPD = _segment_sum(jnp.where(valid_BT[..., None], x_BTD_wide, 0.0), rows_BT, num_patches)
    if mode == "mean":
        pooled_BPD = pooled_BPD / jnp.maximum(_count(rows_BT, valid_BT, num_patches), 1)[
            ..., None
        ].astype(pooled_BPD.dtype)
    return pooled_BPD.astype(x_BTD.dtype)


# Rows: `rows_BT` names, for every byte, the patch it reads from or adds to.


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _sorted_rows(ids_BT, num_patches) -> tuple[jax.Array, jax.Array]:
    """Patch ids made non-decreasing and in range everywhere, and where they were valid."""
    valid_BT = (ids_BT >= 0) & (ids_BT < num_patches)
    # An ignored byte goes to the patch before it, with the neutral element as its value.
    return lax.cummax(jnp.where(valid_BT, ids_BT, 0), axis=1), valid_BT


def _segment_sum(x_BT, rows_BT, num_patches) -> jax.Array:
    add = functools.partial(jax.ops.segment_sum, num_segments=num_patches, indices_are_sorted=True)
    return jax.vmap(add)(x_BT, rows_BT)


def _segment_max(x_BT, rows_BT, num_patches) -> jax.Array:
    take = functools.partial(jax.ops.segment_max, num_segments=num_patches, indices_are_sorted=True)
    return jax.vmap(take)(x_BT, rows_BT)


def _take(x_BP, rows_BT) -> jax.Array:
    def take(x_P, rows_T):
        return x_P.at[rows_T].get(indices_are_sorted=True, mode="promise_in_bounds")

    return jax.vmap(take)(x_BP, rows_BT)


def _count(rows_BT, valid_BT, num_patches) -> jax.Array:
    return _segment_sum(valid_BT.astype(jnp.int32), rows_BT, num_patches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _segment_extreme(x_BTD, rows_BT, valid_BT, num_patches) -> jax.Array:
    low = jnp.where(valid_BT[..., None], x_BTD, -jnp.inf)
    largest_BPD = _segment_max(low, rows_BT, num_patches)
    some_BP = _count(rows_BT, valid_BT, num_patches) > 0
    return jnp.where(some_BP[..., None], largest_BPD, 0.0)


def _segment_extreme_forward(x_BTD, rows_BT, valid_BT, num_patches):
    out_BPD = _segment_extreme(x_BTD, rows_BT, valid_BT, num_patches)
    return out_BPD, (x_BTD, rows_BT, valid_BT, out_BPD)


def _segment_extreme_backward(num_patches, residuals, g_BPD):
    x_BTD, rows_BT, valid_BT, out_BPD = residuals
    reached_BTD = (x_BTD == _take(out_BPD, rows_BT)) & valid_BT[..., None]
    ties_BPD = _segment_sum(reached_BTD.astype(jnp.float32), rows_BT, num_patches)
    share_BPD = g_BPD / jnp.maximum(ties_BPD, 1.0).astype(g_BPD.dtype)
    return jnp.where(reached_BTD, _take(share_BPD, rows_BT), 0.0), None, None


_segment_extreme.defvjp(_segment_extreme_forward, _segment_extreme_backward)


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
    """Output and log-sum-exp of the scores, both 0 where nothing is seen."""
    maximum, total, values = statistics
    total = jnp.where(total > 0, total, 1.0)
    return values / total[..., None], _finite(maximum) + jnp.log(total)


def _visible(rows_BT, valid_BT, segment_ids_BT, patch_segment_ids_BP) -> jax.Array:
    """Which bytes reach the patch named by `rows_BT`: [B, T, 1, 1]."""
    if segment_ids_BT is not None:
        valid_BT &= segment_ids_BT == _take(patch_segment_ids_BP, rows_BT)
    return valid_BT[:, :, None, None]


# Patches attend to bytes.


def patch_attention(
    q_BPQHK, key_BTHK, value_BTHK, ids_BT, segment_ids_BT, patch_segment_ids_BP, scale, window
):
    """See `api.patch_attention`."""
    sorted_ids = _sorted_rows(ids_BT, q_BPQHK.shape[1])
    segments = (segment_ids_BT, patch_segment_ids_BP)
    return _patch_attention(q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments, scale, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _patch_attention(q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments, scale, window):
    arguments = (q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments)
    return _patch_attention_forward(*arguments, scale, window)[0]


def _patch_attention_scores(q_BPQHK, key_BTHK, sorted_ids, segments, scale, shift):
    """The patch `shift` after each byte's own: its row, visibility, queries, scores."""
    num_patches = q_BPQHK.shape[1]
    ids_BT, valid_BT = sorted_ids
    rows_BT = jnp.minimum(ids_BT + shift, num_patches - 1)
    valid_BT = valid_BT & (ids_BT + shift < num_patches)
    seen_BT11 = _visible(rows_BT, valid_BT, *segments)
    q_BTQHK = _take(q_BPQHK, rows_BT).astype(_accumulator(q_BPQHK))
    score_BTQH = (q_BTQHK * key_BTHK[:, :, None].astype(q_BTQHK.dtype)).sum(-1) * scale
    return rows_BT, seen_BT11, q_BTQHK, score_BTQH


def _patch_attention_forward(q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments, scale, window):
    num_patches = q_BPQHK.shape[1]

    def step(shift):
        rows_BT, seen_BT11, _, score_BTQH = _patch_attention_scores(
            q_BPQHK, key_BTHK, sorted_ids, segments, scale, shift
        )
        score_BTQH = jnp.where(seen_BT11, score_BTQH, -jnp.inf)
        m_BPQH = _segment_max(score_BTQH, rows_BT, num_patches)
        weight_BTQH = jnp.exp(score_BTQH - _take(_finite(m_BPQH), rows_BT))
        value_BT1HK = value_BTHK[:, :, None].astype(weight_BTQH.dtype)
        weighted = jnp.where(seen_BT11[..., None], weight_BTQH[..., None] * value_BT1HK, 0.0)
        return (
            m_BPQH,
            _segment_sum(weight_BTQH, rows_BT, num_patches),
            _segment_sum(weighted, rows_BT, num_patches),
        )

    out, lse_BPQH = _finish(_over_window(window, step, _combine_statistics))
    out = out.astype(q_BPQHK.dtype)
    return out, (q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments, out, lse_BPQH)


def _patch_attention_backward(scale, window, residuals, g_BPQHK):
    q_BPQHK, key_BTHK, value_BTHK, sorted_ids, segments, out_BPQHK, lse_BPQH = residuals
    dtype = lse_BPQH.dtype
    num_patches = q_BPQHK.shape[1]
    key_BT1HK = key_BTHK[:, :, None].astype(dtype)
    value_BT1HK = value_BTHK[:, :, None].astype(dtype)
    mean_BPQH = (g_BPQHK.astype(dtype) * out_BPQHK.astype(dtype)).sum(-1)

    def step(shift):
        rows_BT, seen_BT11, q_BTQHK, score_BTQH = _patch_attention_scores(
            q_BPQHK, key_BTHK, sorted_ids, segments, scale, shift
        )
        weight_BTQH = jnp.where(seen_BT11, jnp.exp(score_BTQH - _take(lse_BPQH, rows_BT)), 0.0)
        g_BTQHK = _take(g_BPQHK, rows_BT).astype(dtype)
        d_weight_BTQH = (g_BTQHK * value_BT1HK).sum(-1)
        d_score_BTQH = weight_BTQH * (d_weight_BTQH - _take(mean_BPQH, rows_BT)) * scale
        d_score_BTQH1 = jnp.where(seen_BT11, d_score_BTQH, 0.0)[..., None]
        d_q_BTQHK = jnp.where(seen_BT11[..., None], d_score_BTQH1 * key_BT1HK, 0.0)
        return (
            _segment_sum(d_q_BTQHK, rows_BT, num_patches),
            (d_score_BTQH1 * q_BTQHK).sum(2),
            (weight_BTQH[..., None] * g_BTQHK).sum(2),
        )

    d_q, d_key, d_value = _over_window(window, step, _add)
    d_arrays = (d_q.astype(q_BPQHK.dtype), d_key.astype(key_BTHK.dtype))
    return (*d_arrays, d_value.astype(value_BTHK.dtype), None, None)


_patch_attention.defvjp(_patch_attention_forward, _patch_attention_backward)


# Bytes attend to the vectors of patches.


def patch_gather_attention(
    q_BTHK, key_BPQHK, value_BPQHK, ids_BT, segment_ids_BT, patch_segment_ids_BP, scale, window
):
    """See `api.patch_gather_attention`."""
    sorted_ids = _sorted_rows(ids_BT, key_BPQHK.shape[1])
    segments = (segment_ids_BT, patch_segment_ids_BP)
    return _gather_attention(q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments, scale, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gather_attention(q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments, scale, window):
    arguments = (q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments)
    return _gather_attention_forward(*arguments, scale, window)[0]


def _gather_attention_scores(q_BTHK, key_BPQHK, sorted_ids, segments, scale, shift):
    """The patch `shift` before each byte's own: its row, visibility, keys, scores."""
    ids_BT, valid_BT = sorted_ids
    rows_BT = jnp.maximum(ids_BT - shift, 0)
    seen_BT11 = _visible(rows_BT, valid_BT & (ids_BT >= shift), *segments)
    key_BTQHK = _take(key_BPQHK, rows_BT).astype(_accumulator(q_BTHK))
    score_BTQH = (q_BTHK[:, :, None].astype(key_BTQHK.dtype) * key_BTQHK).sum(-1) * scale
    return rows_BT, seen_BT11, key_BTQHK, score_BTQH


def _gather_attention_forward(q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments, scale, window):
    def step(shift):
        rows_BT, seen_BT11, _, score_BTQH = _gather_attention_scores(
            q_BTHK, key_BPQHK, sorted_ids, segments, scale, shift
        )
        score_BTQH = jnp.where(seen_BT11, score_BTQH, -jnp.inf)
        m_BTH = score_BTQH.max(2)
        weight_BTQH = jnp.exp(score_BTQH - _finite(m_BTH)[:, :, None])
        value_BTQHK = _take(value_BPQHK, rows_BT).astype(weight_BTQH.dtype)
        return m_BTH, weight_BTQH.sum(2), (weight_BTQH[..., None] * value_BTQHK).sum(2)

    out, lse_BTH = _finish(_over_window(window, step, _combine_statistics))
    out = out.astype(q_BTHK.dtype)
    return out, (q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments, out, lse_BTH)


def _gather_attention_backward(scale, window, residuals, g_BTHK):
    q_BTHK, key_BPQHK, value_BPQHK, sorted_ids, segments, out_BTHK, lse_BTH = residuals
    dtype = lse_BTH.dtype
    num_patches = key_BPQHK.shape[1]
    q_BT1HK = q_BTHK[:, :, None].astype(dtype)
    g_BT1HK = g_BTHK[:, :, None].astype(dtype)
    mean_BT1H = (g_BT1HK * out_BTHK[:, :, None].astype(dtype)).sum(-1)
    lse_BT1H = lse_BTH[:, :, None]

    def step(shift):
        rows_BT, seen_BT11, key_BTQHK, score_BTQH = _gather_attention_scores(
            q_BTHK, key_BPQHK, sorted_ids, segments, scale, shift
        )
        weight_BTQH = jnp.where(seen_BT11, jnp.exp(score_BTQH - lse_BT1H), 0.0)
        d_weight_BTQH = (g_BT1HK * _take(value_BPQHK, rows_BT).astype(dtype)).sum(-1)
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
    d_arrays = (d_q.astype(q_BTHK.dtype), d_key.astype(key_BPQHK.dtype))
    return (*d_arrays, d_value.astype(value_BPQHK.dtype), None, None)


_gather_attention.defvjp(_gather_attention_forward, _gather_attention_backward)
