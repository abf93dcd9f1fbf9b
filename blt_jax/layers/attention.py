"""Causal self-attention over packed rows. Axis letter J: width of the values, often K."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from blt_jax.dist.mesh import platform
from blt_jax.layers.block_attention import block_attention
from blt_jax.layers.masks import NEGATIVE, causal_mask
from blt_jax.layers.prefix import Prefix
from blt_jax.layers.reductions import drop_unit_axes
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
    bias: Float[Array, "#B H T S"] | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H J"]:
    """Softmax attention with a full mask: the plain form, quadratic in memory.

    Query head h uses key-value head h // (H / G). Scores and softmax are float32; a query that
    sees no key gets 0. bias: added to the scaled scores. sink: one logit per query head that
    takes part in the softmax and has no value.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    if H % G:
        raise ValueError(f"masked_attention: {H} query heads are no multiple of {G} kv heads")
    scale = K**-0.5 if scale is None else scale
    q_BGRTK = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSJ = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = _product(q_BGRTK, k_BGSK, 3, jnp.float32) * scale
    if bias is not None:
        scores += bias.reshape(-1, G, H // G, *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, NEGATIVE)
    if sink is not None:
        sink_BGRT1 = jnp.broadcast_to(sink.reshape(1, G, H // G, 1, 1), (*scores.shape[:4], 1))
        scores = jnp.concatenate([scores, sink_BGRT1], axis=-1)
    weights = jax.nn.softmax(drop_unit_axes(scores), axis=-1).reshape(scores.shape)
    weights = weights[..., : k.shape[1]]
    weights = jnp.where(mask[:, None, None], weights, 0.0).astype(v.dtype)
    out_BGRTJ = _product(weights, v_BGSJ, 2, v.dtype)
    return out_BGRTJ.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x_BGRTC, y, axis: int, dtype):
    """x times y[B, G, C, N] (axis 2) or y[B, G, N, C] (axis 3): [B, G, R, T, N].

    The gradients come in the order in which their products yield them; differentiation of an
    einsum would transpose those of keys and values.
    """
    return _contract(x_BGRTC, y, 4, axis, dtype)


def _product_forward(x_BGRTC, y, axis, dtype):
    return _product(x_BGRTC, y, axis, dtype), (x_BGRTC, y)


def _product_backward(axis, dtype, residuals, g_BGRTN):
    del dtype
    x_BGRTC, y = residuals
    pair = (x_BGRTC, g_BGRTN) if axis == 2 else (g_BGRTN, x_BGRTC)
    d_x = _contract(g_BGRTN, y, 4, 5 - axis, x_BGRTC.dtype)
    return d_x, _contract(*pair, (2, 3), (2, 3), y.dtype)


_product.defvjp(_product_forward, _product_backward)


def _contract(x, y, x_axes: int | tuple[int, ...], y_axes: int | tuple[int, ...], dtype):
    """A product over some axes, [B, G, rest of x, rest of y]."""
    axes = [(axis,) if isinstance(axis, int) else axis for axis in (x_axes, y_axes)]
    batch = (0, 1)
    return jax.lax.dot_general(x, y, (axes, (batch, batch)), preferred_element_type=dtype)


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T H J"]:
    """Causal self-attention inside documents, optionally in a sliding window.

    segment_ids: 0 = padding (output 0), 1.. = documents. A window of w shows a query itself and
    the w - 1 positions before it; 0 means no window. slopes: constants; slope (i - j) is subtracted
    from the score of query i and key j. sink: one logit per query head that takes part in the
    softmax and has no value. prefix: keys that every query sees. Short rows take the dense form,
    longer ones go by blocks: memory is linear in T, and so is time with a window. Programs for TPU
    take a kernel for them, unless there are slopes or a prefix.
    """
    H, G = q.shape[2], k.shape[2]
    if H % G:
        raise ValueError(f"causal_attention: {H} query heads are no multiple of {G} kv heads")
    if window < 0:
        raise ValueError(f"causal_attention: window={window} must be at least 0")
    if q.shape[1] <= MAX_DENSE:
        attend = dense_causal_attention
        options = dict(slopes=slopes, sink=sink, prefix=prefix)
    elif platform() == "tpu" and slopes is None and prefix is None:
        attend, options = splash_attention, dict(sink=sink)
    else:
        attend = block_attention
        options = dict(slopes=slopes, sink=sink, prefix=prefix)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return attend(q, k, v, segment_ids, window=window, scale=scale, **options)


def dense_causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T H J"]:
    """As `causal_attention`, with the whole mask: the truth for tests, and best for short rows."""
    (index_T, q), bias = _positions(q), None
    mask = causal_mask(index_T, index_T, segment_ids, segment_ids, window)
    if slopes is not None:
        slopes = jax.lax.stop_gradient(slopes)
        distance_TT = (index_T[:, None] - index_T[None, :]).astype(jnp.float32)
        bias = -slopes[None, :, None, None] * distance_TT[None, None]
    if prefix is not None:
        k, v, mask, bias = _with_prefix(k, v, mask, bias, slopes, segment_ids, prefix)
    out = masked_attention(q, k, v, mask, scale=scale, bias=bias, sink=sink)
    # Every form names its result for the remat policies, as its backward pass reads it.
    return checkpoint_name(out, "attention")


def _positions(q):
    """The positions of a row of q, and q.

    On CPU they are tied to q: a loop over layers would compute the mask ahead, and keep [T, T] in
    memory, in place of comparing positions where scores are masked. On TPU the barrier would keep
    the rotation of q out of the product's kernel (7 % more bytes).
    """
    tied, free = (lambda *pair: jax.lax.optimization_barrier(pair)), (lambda *pair: pair)
    return jax.lax.platform_dependent(jnp.arange(q.shape[1]), q, cpu=tied, default=free)


def _with_prefix(k, v, mask, bias, slopes, segment_ids, prefix: Prefix):
    """Keys, values, mask and bias with the prefix in front."""
    B, T = segment_ids.shape
    N = prefix.key.shape[0]

    def in_front(rows, x):
        rows = jnp.broadcast_to(rows[None], (B, *rows.shape)).astype(x.dtype)
        return jnp.concatenate([rows, x], axis=1)

    seen_BTN = jnp.broadcast_to((segment_ids > 0)[:, :, None], (B, T, N))
    mask = jnp.concatenate([seen_BTN, mask], axis=2)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (B, *bias.shape[1:]))
        bias = jnp.concatenate([prefix.bias(slopes), bias], axis=3)
    return in_front(prefix.key, k), in_front(prefix.value, v), mask, bias
