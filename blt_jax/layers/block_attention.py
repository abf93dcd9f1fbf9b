"""Causal attention by blocks of queries, with memory linear in the length.

Scores are held with keys as rows: the products of the backward pass then run over contiguous
rows, and the reductions of the softmax over the leading axis, which is several times faster on
CPU than the other way round. All arrays are laid out by head once, before the blocks. The
log-sum-exp of the scores is kept, so that the backward pass can compute the weights again.

Axis letters beyond the usual ones: R query heads per kv head, J width of the values; T and S are
also the queries and keys of one block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from blt_jax.layers.masks import NEGATIVE
from blt_jax.layers.prefix import Prefix, join_softmax
from blt_jax.layers.reductions import inner

WINDOW_BLOCK = 128
"""Queries per block in a window. At window 512, 64 and 256 were slower (width 32, CPU)."""

MAX_WINDOW = 1024
"""Largest window whose keys are taken in one piece."""

TRIANGLE_BLOCKS = ((512, 128), (2304, 256), (4608, 512))
"""Longest row, and queries per block, of the triangle. Few blocks: each is compiled apart."""

MAX_TRIANGLE_SCORES = 2**26
"""Most scores of one block of the triangle, over rows and heads."""

TILE = 512
"""Queries and keys per tile of the form for long rows."""


def block_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G J"],
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B S"] | None = None,
    first: int | Int[Array, ""] = 0,
    *,
    window: int,
    scale: float,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T H J"]:
    """Causal attention inside documents and `window` (0: none), differentiable once in reverse.

    Query t stands at index first + t of the keys; without key_segment_ids these are the queries'
    own. The form follows from the shapes: a window is read in one slice of keys per query block,
    without a window each query block takes exactly the keys before it, and long rows are cut
    into tiles met one after the other. slopes, sink, prefix: as `causal_attention`.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    own_keys = key_segment_ids is None
    key_segment_ids = segment_ids if own_keys else key_segment_ids
    plan = make_plan(T, window, B * H, own_keys)
    if plan.form != "triangle":
        padding = -T % plan.block
        # The last block of queries reads as many keys as the first, whatever `first` is.
        key_padding = padding if own_keys else padding + -(S + padding) % plan.block
        q, segment_ids = _pad_end(q, padding), _pad_end(segment_ids, padding)
        k, v, key_segment_ids = (_pad_end(x, key_padding) for x in (k, v, key_segment_ids))
    first = jnp.asarray(first, jnp.int32)
    if slopes is not None:
        slopes = lax.stop_gradient(slopes)
    inputs = (q, k, v, segment_ids, key_segment_ids, first, slopes)
    out, lse_BGRT = _attention(*inputs, plan, scale)
    if sink is None and prefix is None:
        return out[:, :T]
    out, q, segment_ids = out[:, :T], q[:, :T], segment_ids[:, :T]
    lse_BHT = lse_BGRT.reshape(B, H, -1)[:, :, :T]
    return join_softmax(
        out, lse_BHT, q, segment_ids, scale=scale, slopes=slopes, sink=sink, prefix=prefix
    )


def _pad_end(x, size):
    return jnp.pad(x, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2)) if size else x


class Plan(NamedTuple):
    """How a row is cut: form "window", "triangle" or "tiles", and the queries per block."""

    form: str
    block: int
    window: int


def make_plan(length: int, window: int, num_heads: int, own_keys: bool = True) -> Plan:
    """The form for `length` queries; num_heads are those of all rows together. own_keys: keys and
    queries are the same tokens."""
    if window >= length and own_keys:
        window = 0
    if 0 < window <= MAX_WINDOW:
        return Plan("window", WINDOW_BLOCK, window)
    if not own_keys:
        return Plan("tiles", min(TILE, length), window)
    if not window:
        for longest, block in TRIANGLE_BLOCKS:
            if length <= longest and num_heads * length * block <= MAX_TRIANGLE_SCORES:
                return Plan("triangle", block, 0)
    return Plan("tiles", TILE, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, segment_ids, key_segment_ids, first, slopes, plan, scale):
    """The output [B, T, H, J] and the log-sum-exp of the scores [B, G, R, T]."""
    inputs = (q, k, v, segment_ids, key_segment_ids, first, slopes)
    return _attention_forward(*inputs, plan, scale)[0]


def _attention_forward(q, k, v, segment_ids, key_segment_ids, first, slopes, plan, scale):
    (B, T, H, K), G = q.shape, k.shape[2]
    reach = _reach(plan)
    # Tied to q: masks alone do not change from layer to layer, and jax would compute those of
    # all blocks ahead of a scan over layers and store them.
    q, segment_ids, key_segment_ids = lax.optimization_barrier((q, segment_ids, key_segment_ids))
    q_BTGRK = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(B, T, G, H // G, K)
    inputs = _Inputs(
        jnp.transpose(q_BTGRK, (0, 2, 3, 1, 4)),
        _pad_front(jnp.swapaxes(k, 1, 2), reach, 2),
        _pad_front(jnp.swapaxes(v, 1, 2), reach, 2),
        jnp.where(segment_ids > 0, segment_ids, -1),
        _pad_front(key_segment_ids, reach, 1),
        first,
        None if slopes is None else slopes.reshape(G, H // G),
    )
    forward = {"window": _window_forward, "triangle": _triangle_forward, "tiles": _tiles_forward}
    out_BGRTJ, lse_BGRT = forward[plan.form](inputs, plan)
    out = jnp.transpose(out_BGRTJ, (0, 3, 1, 2, 4)).reshape(B, T, H, v.shape[3])
    out, lse_BGRT = checkpoint_name((out, lse_BGRT), "attention")
    return (out, lse_BGRT), (inputs, out, lse_BGRT)


def _attention_backward(plan, scale, residuals, cotangents):
    inputs, out, lse_BGRT = residuals
    g, g_lse_BGRT = cotangents
    inputs, g = lax.optimization_barrier((inputs, g))
    B, G, R, T, K = inputs.q_BGRTK.shape
    mean_BTH = inner(g.astype(jnp.float32), out.astype(jnp.float32))
    cotangent = _Cotangent(
        jnp.transpose(g.reshape(B, T, G, R, g.shape[3]), (0, 2, 3, 1, 4)),
        jnp.transpose(mean_BTH.reshape(B, T, G, R), (0, 2, 3, 1)) - g_lse_BGRT,
        lse_BGRT,
    )
    backward = {
        "window": _window_backward,
        "triangle": _triangle_backward,
        "tiles": _tiles_backward,
    }
    d_q_BGRTK, d_k_BGSK, d_v_BGSJ = backward[plan.form](inputs, cotangent, plan)
    reach, dtype = _reach(plan), inputs.k_BGSK.dtype
    d_k, d_v = (jnp.swapaxes(x[:, :, reach:], 1, 2).astype(dtype) for x in (d_k_BGSK, d_v_BGSJ))
    d_q = jnp.transpose(d_q_BGRTK, (0, 3, 1, 2, 4)).reshape(B, T, G * R, K)
    return (d_q * scale).astype(dtype), d_k, d_v, None, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


class _Inputs(NamedTuple):
    """Scaled queries, and keys with those that nobody sees in front.

    Padding has the segment -1 among the queries and 0 among the keys, so it meets nothing. `first`
    is the index of the first query among the keys. Slopes are None without a position bias.
    """

    q_BGRTK: jax.Array
    k_BGSK: jax.Array
    v_BGSJ: jax.Array
    query_segments_BT: jax.Array
    key_segments_BS: jax.Array
    first: jax.Array
    slopes_GR: jax.Array | None

    def queries(self, start, size):
        return self._replace(
            q_BGRTK=_slice(self.q_BGRTK, start, size, 3),
            query_segments_BT=_slice(self.query_segments_BT, start, size, 1),
        )

    def keys(self, start, size):
        return self._replace(
            k_BGSK=_slice(self.k_BGSK, start, size, 2),
            v_BGSJ=_slice(self.v_BGSJ, start, size, 2),
            key_segments_BS=_slice(self.key_segments_BS, start, size, 1),
        )


class _Cotangent(NamedTuple):
    """Gradient of the output; its product with the output, summed over J, less the gradient of the
    log-sum-exp of the scores; that log-sum-exp."""

    g_BGRTJ: jax.Array
    mean_BGRT: jax.Array
    lse_BGRT: jax.Array

    def queries(self, start, size):
        return _Cotangent(
            _slice(self.g_BGRTJ, start, size, 3),
            _slice(self.mean_BGRT, start, size, 3),
            _slice(self.lse_BGRT, start, size, 3),
        )


def _slice(x, start, size, axis):
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _pad_front(x, size, axis):
    if not size:
        return x
    return jnp.pad(x, [(size, 0) if i == axis else (0, 0) for i in range(x.ndim)])


def _rows(x_BGKRT):
    """[B, G, R, T, K]"""
    return jnp.transpose(x_BGKRT, (0, 1, 3, 4, 2))


def _add_slice(x, update, start, axis):
    old = _slice(x, start, update.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, axis)


# One block of queries with one block of keys.


def _scores(here: _Inputs, distance, window):
    """Masked scores [B, G, S, R, T]; `distance` is that from the first query to the first key."""
    T, S = here.q_BGRTK.shape[3], here.k_BGSK.shape[2]
    distance_ST = distance + jnp.arange(T)[None, :] - jnp.arange(S)[:, None]
    seen_ST = distance_ST >= 0
    if window:
        seen_ST &= distance_ST < window
    same_BST = here.query_segments_BT[:, None, :] == here.key_segments_BS[:, :, None]
    seen_BGSRT = (seen_ST[None] & same_BST)[:, None, :, None]
    scores = _product("bgsk,bgrtk->bgsrt", here.k_BGSK, here.q_BGRTK)
    if here.slopes_GR is not None:
        far_ST = distance_ST.astype(jnp.float32)
        scores -= here.slopes_GR[None, :, None, :, None] * far_ST[None, None, :, None, :]
    return jnp.where(seen_BGSRT, scores, NEGATIVE)


def _product(formula, left, right):
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)


def _sum_over_keys(x_BGSK, weights_BGSRT):
    """[B, G, K, R, T] in float32."""
    if x_BGSK.dtype == jnp.float32:
        return _product("bgsk,bgsrt->bgkrt", x_BGSK, weights_BGSRT)
    # CPU has no product of two bfloat16 arrays into float32 that contracts the rows of the first;
    # the barrier keeps the transpose from being merged into it.
    x_BGKS = lax.optimization_barrier(jnp.swapaxes(x_BGSK, 2, 3))
    return _product("bgks,bgsrt->bgkrt", x_BGKS, weights_BGSRT)


def _block_forward(here: _Inputs, distance, window):
    """Maximum, sum of weights, and weighted values, the latter two relative to the maximum."""
    scores_BGSRT = _scores(here, distance, window)
    maximum_BGRT = scores_BGSRT.max(2)
    weights_BGSRT = jnp.exp(scores_BGSRT - maximum_BGRT[:, :, None])
    values_BGJRT = _sum_over_keys(here.v_BGSJ, weights_BGSRT.astype(here.v_BGSJ.dtype))
    return maximum_BGRT, weights_BGSRT.sum(2), values_BGJRT


def _combine(left, right):
    """The statistics of two sets of keys together."""
    maximum = jnp.maximum(left[0], right[0])
    left_factor, right_factor = jnp.exp(left[0] - maximum), jnp.exp(right[0] - maximum)
    total = left[1] * left_factor + right[1] * right_factor
    values = left[2] * left_factor[:, :, None] + right[2] * right_factor[:, :, None]
    return maximum, total, values


def _finish(statistics, here: _Inputs):
    """Output [B, G, R, T, K] and log-sum-exp [B, G, R, T]; both are 0 for padding."""
    maximum_BGRT, total_BGRT, values_BGJRT = statistics
    real_BT = here.query_segments_BT > 0
    out_BGJRT = values_BGJRT / total_BGRT[:, :, None]
    out_BGJRT = jnp.where(real_BT[:, None, None, None], out_BGJRT, 0.0)
    lse_BGRT = jnp.where(real_BT[:, None, None], maximum_BGRT + jnp.log(total_BGRT), 0.0)
    return _rows(out_BGJRT.astype(here.q_BGRTK.dtype)), lse_BGRT


def _block_backward(here: _Inputs, cotangent: _Cotangent, distance, window):
    """float32 gradients of the scaled queries [B, G, R, T, K], keys and values."""
    dtype = here.k_BGSK.dtype
    weights_BGSRT = jnp.exp(_scores(here, distance, window) - cotangent.lse_BGRT[:, :, None])
    d_weights_BGSRT = _product("bgsk,bgrtk->bgsrt", here.v_BGSJ, cotangent.g_BGRTJ)
    d_scores_BGSRT = weights_BGSRT * (d_weights_BGSRT - cotangent.mean_BGRT[:, :, None])
    weights_BGSRT, d_scores_BGSRT = weights_BGSRT.astype(dtype), d_scores_BGSRT.astype(dtype)
    return (
        _rows(_sum_over_keys(here.k_BGSK, d_scores_BGSRT)),
        _product("bgsrt,bgrtk->bgsk", d_scores_BGSRT, here.q_BGRTK),
        _product("bgsrt,bgrtk->bgsk", weights_BGSRT, cotangent.g_BGRTJ),
    )


# A window: one slice of keys per block of queries.


def _reach(plan: Plan) -> int:
    """Keys before a block that it may see, rounded up so that slices stay aligned."""
    if plan.form != "window":
        return 0
    unit = min(plan.block, 1 << math.ceil(math.log2(max(plan.window // 4, 16))))
    return -(-(plan.window - 1) // unit) * unit


def _window_forward(inputs: _Inputs, plan: Plan):
    reach = _reach(plan)

    def block(_, start):
        here = inputs.queries(start, plan.block)
        here = here.keys(here.first + start, reach + plan.block)
        return None, _finish(_block_forward(here, reach, plan.window), here)

    _, (out, lse) = lax.scan(block, None, _starts(inputs, plan))
    return _join(out, 3), _join(lse, 3)


def _window_backward(inputs: _Inputs, cotangent: _Cotangent, plan: Plan):
    reach = _reach(plan)

    def block(gradients, start):
        here = inputs.queries(start, plan.block)
        here = here.keys(here.first + start, reach + plan.block)
        there = cotangent.queries(start, plan.block)
        d_q, *new = _block_backward(here, there, reach, plan.window)
        at = here.first + start
        gradients = [_add_slice(x, y, at, 2) for x, y in zip(gradients, new, strict=True)]
        return gradients, d_q

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (inputs.k_BGSK, inputs.v_BGSJ)]
    (d_k, d_v), d_q = lax.scan(block, zeros, _starts(inputs, plan))
    return _join(d_q, 3), d_k, d_v


def _starts(inputs: _Inputs, plan: Plan) -> jax.Array:
    return jnp.arange(0, inputs.q_BGRTK.shape[3], plan.block, dtype=jnp.int32)


def _join(x, axis):
    """Blocks along the leading axis put one after the other along `axis` of the rest."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


# No window: each block of queries, written out, with the keys up to its end.


def _spans(length: int, block: int) -> list[tuple[int, int]]:
    """Start and size of the blocks; a short rest belongs to the last one."""
    starts = list(range(0, length, block))
    if len(starts) > 1 and length - starts[-1] < block // 4:
        starts.pop()
    return list(zip(starts, np.diff([*starts, length]).tolist(), strict=True))


def _triangle_forward(inputs: _Inputs, plan: Plan):
    parts = []
    for start, size in _spans(inputs.q_BGRTK.shape[3], plan.block):
        here = inputs.queries(start, size).keys(0, start + size)
        parts.append(_finish(_block_forward(here, start, 0), here))
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=3), jnp.concatenate(lse, axis=3)


def _triangle_backward(inputs: _Inputs, cotangent: _Cotangent, plan: Plan):
    d_q, d_k, d_v = [], None, None
    for start, size in reversed(_spans(inputs.q_BGRTK.shape[3], plan.block)):
        here = inputs.queries(start, size).keys(0, start + size)
        there = cotangent.queries(start, size)
        new_d_q, new_d_k, new_d_v = _block_backward(here, there, start, 0)
        d_q.insert(0, new_d_q)
        if d_k is None:
            d_k, d_v = new_d_k, new_d_v
        else:
            d_k, d_v = _add_slice(d_k, new_d_k, 0, 2), _add_slice(d_v, new_d_v, 0, 2)
    return jnp.concatenate(d_q, axis=3), d_k, d_v


# Long rows: tiles of queries and keys, as many as the mask needs.


def _key_tiles(inputs: _Inputs, index, plan: Plan):
    """The tiles of keys that a tile of queries may see, from the first to before the last."""
    begin = inputs.first + index * plan.block
    last = (begin + 2 * plan.block - 1) // plan.block
    if not plan.window:
        return jnp.zeros_like(last), last
    return jnp.maximum(begin - (plan.window - 1), 0) // plan.block, last


def _tiles_forward(inputs: _Inputs, plan: Plan):
    def tile(_, index):
        here = inputs.queries(index * plan.block, plan.block)

        def one(other, statistics):
            there = here.keys(other * plan.block, plan.block)
            distance = here.first + (index - other) * plan.block
            return _combine(statistics, _block_forward(there, distance, plan.window))

        B, G, R, T, _ = here.q_BGRTK.shape
        nothing = (
            jnp.full((B, G, R, T), NEGATIVE, jnp.float32),
            jnp.zeros((B, G, R, T), jnp.float32),
            jnp.zeros((B, G, here.v_BGSJ.shape[3], R, T), jnp.float32),
        )
        statistics = lax.fori_loop(*_key_tiles(inputs, index, plan), one, nothing)
        return None, _finish(statistics, here)

    _, (out, lse) = lax.scan(tile, None, _starts(inputs, plan) // plan.block)
    return _join(out, 3), _join(lse, 3)


def _tiles_backward(inputs: _Inputs, cotangent: _Cotangent, plan: Plan):
    def tile(gradients, index):
        here = inputs.queries(index * plan.block, plan.block)
        there = cotangent.queries(index * plan.block, plan.block)

        def one(other, carry):
            d_q, d_k, d_v = carry
            start = other * plan.block
            distance = here.first + (index - other) * plan.block
            new_d_q, new_d_k, new_d_v = _block_backward(
                here.keys(start, plan.block), there, distance, plan.window
            )
            d_k, d_v = _add_slice(d_k, new_d_k, start, 2), _add_slice(d_v, new_d_v, start, 2)
            return d_q + new_d_q, d_k, d_v

        B, G, R, T, K = here.q_BGRTK.shape
        carry = (jnp.zeros((B, G, R, T, K), jnp.float32), *gradients)
        d_q, *gradients = lax.fori_loop(*_key_tiles(inputs, index, plan), one, carry)
        return gradients, d_q

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (inputs.k_BGSK, inputs.v_BGSJ)]
    (d_k, d_v), d_q = lax.scan(tile, zeros, _starts(inputs, plan) // plan.block)
    return _join(d_q, 3), d_k, d_v
