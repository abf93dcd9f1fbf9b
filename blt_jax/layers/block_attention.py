"""Causal attention by blocks of queries, with memory linear in the length.

Scores are held with keys as rows, and queries and values with the length as their last axis:
then no product contracts the rows of the large matrix, which is slow on CPU, and the reductions
of the softmax run over rows. The output and the log-sum-exp of the scores are kept for the
backward pass, which computes the weights again.

Axis letters beyond the usual ones: R query heads per kv head; T and S are also the queries and
keys of one block. All forms take q[B, G, K, R, T] (scaled), k[B, G, S, K], v[B, G, K, S].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from blt_jax.layers.masks import NEGATIVE

WINDOW_BLOCK = 128
"""Queries per block in a window. At window 512, 64 and 256 were slower (width 32, CPU)."""

MAX_WINDOW = 1024
"""Largest window whose keys are taken in one piece."""

MAX_UNROLLED = 16
"""Most query blocks that the unrolled triangle writes out."""

TRIANGLE_BLOCK = 128
MAX_TRIANGLE_BLOCK = 256
TILE = 512
"""Queries and keys per tile of the form for long rows."""


def block_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int,
    scale: float,
) -> Float[Array, "B T H K"]:
    """Causal attention inside documents and `window` (0: none), differentiable once in reverse.

    The form follows from the shapes: a window is read in one slice of keys per query block,
    without a window each query block takes exactly the keys before it, and long rows are cut
    into tiles met one after the other.
    """
    T = q.shape[1]
    plan = make_plan(T, window)
    padding = -T % plan.block
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    return _attention(q, k, v, segment_ids, plan, scale)[:, :T]


class Plan(NamedTuple):
    """How a row is cut: form "window", "triangle" or "tiles", and the queries per block."""

    form: str
    block: int
    window: int


def make_plan(length: int, window: int) -> Plan:
    """The form for rows of `length`; a window that covers the row is none."""
    if window >= length:
        window = 0
    if 0 < window <= MAX_WINDOW:
        return Plan("window", WINDOW_BLOCK, window)
    block = TRIANGLE_BLOCK
    while block < MAX_TRIANGLE_BLOCK and length > MAX_UNROLLED * block:
        block *= 2
    if window or length > MAX_UNROLLED * block:
        return Plan("tiles", TILE, window)
    return Plan("triangle", block, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, plan, scale):
    return _attention_forward(q, k, v, segment_ids, plan, scale)[0]


def _attention_forward(q, k, v, segment_ids, plan, scale):
    arrays = _Arrays.of(q, k, v, segment_ids, scale)
    forward = {"window": _window_forward, "triangle": _triangle_forward, "tiles": _tiles_forward}
    out_BGKRT, lse_BGRT = forward[plan.form](arrays, plan)
    out = _rows_first(out_BGKRT, q.shape).astype(q.dtype)
    out, lse_BGRT = checkpoint_name((out, lse_BGRT), "attention")
    return out, (q, k, v, segment_ids, out, lse_BGRT)


def _attention_backward(plan, scale, residuals, g):
    q, k, v, segment_ids, out, lse_BGRT = residuals
    arrays = _Arrays.of(q, k, v, segment_ids, scale)
    mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    mean_BGRT = jnp.moveaxis(mean.reshape(*mean.shape[:2], *lse_BGRT.shape[1:3]), 1, 3)
    cotangent = _Cotangent.of(g, mean_BGRT, lse_BGRT, arrays)
    backward = {
        "window": _window_backward,
        "triangle": _triangle_backward,
        "tiles": _tiles_backward,
    }
    d_q_BGKRT, d_k_BGSK, d_v_BGSK = backward[plan.form](arrays, cotangent, plan)
    d_q = (_rows_first(d_q_BGKRT, q.shape) * scale).astype(q.dtype)
    d_k, d_v = (jnp.swapaxes(x, 1, 2) for x in (d_k_BGSK, d_v_BGSK))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


# Layouts.


class _Arrays(NamedTuple):
    q_BGKRT: jax.Array
    k_BGSK: jax.Array
    v_BGKS: jax.Array
    query_segments_BT: jax.Array
    """Padding is -1 here and 0 among the keys, so it meets nothing."""
    key_segments_BS: jax.Array

    @classmethod
    def of(cls, q, k, v, segment_ids, scale):
        (B, T, H, K), G = q.shape, k.shape[2]
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        return cls(
            jnp.transpose(q.reshape(B, T, G, H // G, K), (0, 2, 4, 3, 1)),
            jnp.swapaxes(k, 1, 2),
            jnp.transpose(v, (0, 2, 3, 1)),
            jnp.where(segment_ids > 0, segment_ids, -1),
            segment_ids,
        )

    def queries(self, start, size):
        """The query side of a block."""
        return self._replace(
            q_BGKRT=_slice(self.q_BGKRT, start, size, 4),
            query_segments_BT=_slice(self.query_segments_BT, start, size, 1),
        )

    def keys(self, start, size):
        """The key side of a block."""
        return self._replace(
            k_BGSK=_slice(self.k_BGSK, start, size, 2),
            v_BGKS=_slice(self.v_BGKS, start, size, 3),
            key_segments_BS=_slice(self.key_segments_BS, start, size, 1),
        )

    def padded(self, size):
        """With `size` keys that nobody sees put before the others."""
        return self._replace(
            k_BGSK=_pad_front(self.k_BGSK, size, 2),
            v_BGKS=_pad_front(self.v_BGKS, size, 3),
            key_segments_BS=_pad_front(self.key_segments_BS, size, 1),
        )


class _Cotangent(NamedTuple):
    """What the backward pass needs of the output and of the queries, and the other layouts."""

    g_BGKRT: jax.Array
    g_BGRTK: jax.Array
    q_BGRTK: jax.Array
    k_BGKS: jax.Array
    v_BGSK: jax.Array
    mean_BGRT: jax.Array
    lse_BGRT: jax.Array

    @classmethod
    def of(cls, g, mean_BGRT, lse_BGRT, arrays):
        (B, T, _, K), (G, R) = g.shape, lse_BGRT.shape[1:3]
        g = g.reshape(B, T, G, R, K)
        return cls(
            jnp.transpose(g, (0, 2, 4, 3, 1)),
            jnp.transpose(g, (0, 2, 3, 1, 4)),
            jnp.transpose(arrays.q_BGKRT, (0, 1, 3, 4, 2)),
            jnp.swapaxes(arrays.k_BGSK, 2, 3),
            jnp.swapaxes(arrays.v_BGKS, 2, 3),
            mean_BGRT,
            lse_BGRT,
        )

    def queries(self, start, size):
        return self._replace(
            g_BGKRT=_slice(self.g_BGKRT, start, size, 4),
            g_BGRTK=_slice(self.g_BGRTK, start, size, 3),
            q_BGRTK=_slice(self.q_BGRTK, start, size, 3),
            mean_BGRT=_slice(self.mean_BGRT, start, size, 3),
            lse_BGRT=_slice(self.lse_BGRT, start, size, 3),
        )

    def keys(self, start, size):
        return self._replace(
            k_BGKS=_slice(self.k_BGKS, start, size, 3), v_BGSK=_slice(self.v_BGSK, start, size, 2)
        )

    def padded(self, size):
        return self._replace(
            k_BGKS=_pad_front(self.k_BGKS, size, 3), v_BGSK=_pad_front(self.v_BGSK, size, 2)
        )


def _slice(x, start, size, axis):
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _pad_front(x, size, axis):
    return jnp.pad(x, [(size, 0) if i == axis else (0, 0) for i in range(x.ndim)])


def _rows_first(x_BGKRT, shape):
    return jnp.transpose(x_BGKRT, (0, 4, 1, 3, 2)).reshape(shape)


def _add_slice(x, update, start, axis):
    old = _slice(x, start, update.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, axis)


# One block of queries with one block of keys.


def _scores(arrays: _Arrays, distance, window):
    """Masked scores [B, G, S, R, T]; `distance` is that from the first query to the first key."""
    T, S = arrays.q_BGKRT.shape[4], arrays.k_BGSK.shape[2]
    distance_ST = distance + jnp.arange(T)[None, :] - jnp.arange(S)[:, None]
    seen_ST = distance_ST >= 0
    if window:
        seen_ST &= distance_ST < window
    same_BST = arrays.query_segments_BT[:, None, :] == arrays.key_segments_BS[:, :, None]
    seen_BGSRT = (seen_ST[None] & same_BST)[:, None, :, None]
    scores = jnp.einsum(
        "bgsk,bgkrt->bgsrt",
        arrays.k_BGSK,
        arrays.q_BGKRT,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(seen_BGSRT, scores, NEGATIVE)


def _block_forward(arrays: _Arrays, distance, window):
    """Maximum, sum of weights, and weighted values, the latter two relative to the maximum."""
    scores_BGSRT = _scores(arrays, distance, window)
    maximum_BGRT = scores_BGSRT.max(2)
    weights_BGSRT = jnp.exp(scores_BGSRT - maximum_BGRT[:, :, None])
    values_BGKRT = jnp.einsum(
        "bgks,bgsrt->bgkrt",
        arrays.v_BGKS,
        weights_BGSRT.astype(arrays.v_BGKS.dtype),
        preferred_element_type=jnp.float32,
    )
    return maximum_BGRT, weights_BGSRT.sum(2), values_BGKRT


def _combine(left, right):
    """The statistics of two sets of keys together."""
    maximum = jnp.maximum(left[0], right[0])
    left_factor, right_factor = jnp.exp(left[0] - maximum), jnp.exp(right[0] - maximum)
    total = left[1] * left_factor + right[1] * right_factor
    values = left[2] * left_factor[:, :, None] + right[2] * right_factor[:, :, None]
    return maximum, total, values


def _finish(statistics, arrays: _Arrays):
    """Output and log-sum-exp; a query of the padding gets 0, and weights of 0 in the backward."""
    maximum_BGRT, total_BGRT, values_BGKRT = statistics
    real_BT = arrays.query_segments_BT > 0
    out_BGKRT = values_BGKRT / total_BGRT[:, :, None]
    return (
        jnp.where(real_BT[:, None, None, None], out_BGKRT, 0.0),
        jnp.where(real_BT[:, None, None], maximum_BGRT + jnp.log(total_BGRT), 0.0),
    )


def _block_backward(arrays: _Arrays, cotangent: _Cotangent, distance, window):
    """Gradients of scaled queries [B, G, K, R, T], and of keys and values [B, G, S, K]."""
    dtype = arrays.k_BGSK.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BGSRT = _scores(arrays, distance, window)
    weights_BGSRT = jnp.exp(scores_BGSRT - cotangent.lse_BGRT[:, :, None])
    d_weights_BGSRT = product("bgsk,bgkrt->bgsrt", cotangent.v_BGSK, cotangent.g_BGKRT)
    d_scores_BGSRT = weights_BGSRT * (d_weights_BGSRT - cotangent.mean_BGRT[:, :, None])
    weights_BGSRT, d_scores_BGSRT = weights_BGSRT.astype(dtype), d_scores_BGSRT.astype(dtype)
    return (
        product("bgks,bgsrt->bgkrt", cotangent.k_BGKS, d_scores_BGSRT),
        product("bgsrt,bgrtk->bgsk", d_scores_BGSRT, cotangent.q_BGRTK),
        product("bgsrt,bgrtk->bgsk", weights_BGSRT, cotangent.g_BGRTK),
    )


# A window: one slice of keys per block of queries.


def _reach(plan: Plan) -> int:
    """Keys before a block that it may see, rounded up so that slices stay aligned."""
    unit = min(plan.block, 1 << math.ceil(math.log2(max(plan.window // 4, 16))))
    return -(-(plan.window - 1) // unit) * unit


def _window_forward(arrays: _Arrays, plan: Plan):
    reach = _reach(plan)
    padded = arrays.padded(reach)

    def block(_, start):
        here = padded.queries(start, plan.block).keys(start, reach + plan.block)
        return None, _finish(_block_forward(here, reach, plan.window), here)

    _, (out, lse) = lax.scan(block, None, _starts(arrays, plan))
    return _unblock(out), _unblock(lse)


def _window_backward(arrays: _Arrays, cotangent: _Cotangent, plan: Plan):
    reach = _reach(plan)
    padded, padded_cotangent = arrays.padded(reach), cotangent.padded(reach)
    size = reach + plan.block

    def block(gradients, start):
        here = padded.queries(start, plan.block).keys(start, size)
        there = padded_cotangent.queries(start, plan.block).keys(start, size)
        d_q, *new = _block_backward(here, there, reach, plan.window)
        return [_add_slice(x, y, start, 2) for x, y in zip(gradients, new, strict=True)], d_q

    zeros = [jnp.zeros(padded.k_BGSK.shape, jnp.float32)] * 2
    (d_k, d_v), d_q = lax.scan(block, zeros, _starts(arrays, plan))
    return _unblock(d_q), d_k[:, :, reach:], d_v[:, :, reach:]


def _starts(arrays: _Arrays, plan: Plan) -> jax.Array:
    return jnp.arange(0, arrays.q_BGKRT.shape[4], plan.block, dtype=jnp.int32)


def _unblock(x):
    """[blocks, ..., T] -> [..., blocks * T]."""
    return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)


# No window: each block of queries, written out, with the keys up to its end.


def _triangle_forward(arrays: _Arrays, plan: Plan):
    parts = []
    for start in range(0, arrays.q_BGKRT.shape[4], plan.block):
        here = arrays.queries(start, plan.block).keys(0, start + plan.block)
        parts.append(_finish(_block_forward(here, start, 0), here))
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=-1), jnp.concatenate(lse, axis=-1)


def _triangle_backward(arrays: _Arrays, cotangent: _Cotangent, plan: Plan):
    d_q, d_k, d_v = [], None, None
    for start in reversed(range(0, arrays.q_BGKRT.shape[4], plan.block)):
        end = start + plan.block
        here = arrays.queries(start, plan.block).keys(0, end)
        there = cotangent.queries(start, plan.block).keys(0, end)
        new_d_q, new_d_k, new_d_v = _block_backward(here, there, start, 0)
        d_q.insert(0, new_d_q)
        if d_k is None:
            d_k, d_v = new_d_k, new_d_v
        else:
            d_k, d_v = _add_slice(d_k, new_d_k, 0, 2), _add_slice(d_v, new_d_v, 0, 2)
    return jnp.concatenate(d_q, axis=-1), d_k, d_v


# Long rows: tiles of queries and keys, as many as the mask needs.


def _first_tile(index, plan: Plan):
    """First tile of keys that a tile of queries may see."""
    if not plan.window:
        return jnp.zeros_like(index)
    return jnp.maximum(index * plan.block - (plan.window - 1), 0) // plan.block


def _tiles_forward(arrays: _Arrays, plan: Plan):
    def tile(_, index):
        here = arrays.queries(index * plan.block, plan.block)

        def one(other, statistics):
            there = here.keys(other * plan.block, plan.block)
            distance = (index - other) * plan.block
            return _combine(statistics, _block_forward(there, distance, plan.window))

        B, G, K, R, T = here.q_BGKRT.shape
        nothing = (
            jnp.full((B, G, R, T), NEGATIVE, jnp.float32),
            jnp.zeros((B, G, R, T), jnp.float32),
            jnp.zeros((B, G, K, R, T), jnp.float32),
        )
        statistics = lax.fori_loop(_first_tile(index, plan), index + 1, one, nothing)
        return None, _finish(statistics, here)

    _, (out, lse) = lax.scan(tile, None, _tile_indices(arrays, plan))
    return _unblock(out), _unblock(lse)


def _tiles_backward(arrays: _Arrays, cotangent: _Cotangent, plan: Plan):
    def tile(gradients, index):
        here = arrays.queries(index * plan.block, plan.block)
        there = cotangent.queries(index * plan.block, plan.block)

        def one(other, carry):
            d_q, d_k, d_v = carry
            start = other * plan.block
            distance = (index - other) * plan.block
            new_d_q, new_d_k, new_d_v = _block_backward(
                here.keys(start, plan.block), there.keys(start, plan.block), distance, plan.window
            )
            d_k, d_v = _add_slice(d_k, new_d_k, start, 2), _add_slice(d_v, new_d_v, start, 2)
            return d_q + new_d_q, d_k, d_v

        d_q = jnp.zeros(here.q_BGKRT.shape, jnp.float32)
        d_q, *gradients = lax.fori_loop(_first_tile(index, plan), index + 1, one, (d_q, *gradients))
        return gradients, d_q

    zeros = [jnp.zeros(arrays.k_BGSK.shape, jnp.float32)] * 2
    (d_k, d_v), d_q = lax.scan(tile, zeros, _tile_indices(arrays, plan))
    return _unblock(d_q), d_k, d_v


def _tile_indices(arrays: _Arrays, plan: Plan) -> jax.Array:
    return jnp.arange(arrays.q_BGKRT.shape[4] // plan.block, dtype=jnp.int32)
