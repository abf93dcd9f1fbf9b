"""The portable fast form: chunks of tokens as batched matrix products, one matrix per channel.

Within a chunk of C tokens the recurrence is a lower triangular Toeplitz matrix; between chunks only
the state is carried. Channels are taken in blocks whose matrices stay in a cache. Within a block a
loop walks over spans of some chunks, so that the arrays with channels first, which the matrix
products want, stay small as well and are never as long as the sequence. The backward pass keeps the
states at segment starts and computes the rest of a span again; both passes take the same spans, so
that their common kernels are compiled once.

Resets divide a chunk into pieces. Pieces must not see each other, and the matrix product is taken
once per piece of the chunk with most pieces, over the tokens of that piece alone.

Axes: M chunks of all rows, K chunks of one row, C tokens of a chunk, S = 2N: real parts, then
imaginary ones. Inside, a state is one array [D, B, 2, N].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.cema_scan import reference
from pallas_kernels.cema_scan.reference import Coefficients, Complex

CHUNK = 32

MIN_CHANNELS, MAX_CHANNELS = 64, 256
"""Channels that are taken at a time, for all tokens: their tables stay in a cache."""

HALVED_FROM = 256
"""Width from which on gradients of rows without resets take two blocks at least: in a loop over
them XLA cannot fuse what makes the cotangents into turning them around, which reads far apart."""

SEGMENT = 256
"""Tokens between the states that are kept for the backward pass; a multiple of CHUNK."""

BLOCK_CHUNKS, BLOCK_CHANNELS = 8, 8192
"""The forward pass takes as many chunks of all rows at once, or as many as hold that many channels
if these are more: fewer would read the tables too often, more would not stay in a cache."""

SPAN_CHANNELS = 1024
"""Rows times channels times segments that are taken at once: the backward pass adds to gradients
as large as the tables each time, which for few channels costs more than a larger working set."""

MAX_SPAN_SEGMENTS = 4


class Tables(NamedTuple):
    """What one chunk does: matrices per channel, for row vectors from the left.

    output[D, C + S, C] takes the chunk's tokens and the state before it to its outputs,
    input[D, C, S] its tokens to the state after it, decay[D, 2, N] the state across it.
    """

    output: jax.Array
    input: jax.Array
    decay: jax.Array


class Chunks(NamedTuple):
    """The tokens of a span and its pieces.

    x[D, M, C]; piece[M, C] counts the resets of the chunk up to and with each token; or None,
    without resets.
    """

    x: jax.Array
    piece: jax.Array | None

    def first(self, x_DMC: jax.Array) -> jax.Array:
        """x_DMC, 0 beyond the first piece: what the state before the chunk reaches."""
        if self.piece is None:
            return x_DMC
        return jnp.where((self.piece == 0)[None], x_DMC, 0.0)

    def last(self, x_DMC: jax.Array) -> jax.Array:
        """x_DMC, 0 before the last piece: what reaches the state after the chunk."""
        if self.piece is None:
            return x_DMC
        return jnp.where((self.piece == self.piece[:, -1:])[None], x_DMC, 0.0)

    def kept(self, rows: int) -> jax.Array | None:
        """Whether the state crosses a chunk: [K, B]."""
        return None if self.piece is None else (self.piece[:, -1] == 0).reshape(rows, -1).T


def _by_channels(axes, out_axes):
    """Decorates a function so that it is called for some channels at a time.

    axes, out_axes: where each argument and each result has its channels, None for the resets, which
    have none; the first two arguments are x_BTD and the coefficients.
    """

    def decorate(function):
        @functools.wraps(function)
        def over_blocks(*arguments, **options):
            width = arguments[0].shape[-1]
            gradients, reset = options.get("keep", True), arguments[axes.index(None)]
            size = _channels_at_once(*arguments[:2], gradients, reset is not None)
            if size == width:
                return function(*arguments, **options)

            def results_of(i):
                def cut(axis, x):
                    return lax.dynamic_slice_in_dim(x, i * size, size, axis)

                pairs = zip(axes, arguments, strict=True)
                parts = [x if n is None else jax.tree.map(partial(cut, n), x) for n, x in pairs]
                return function(*parts, **options)

            def all_channels(axis, x):
                return jnp.zeros((*x.shape[:axis], width, *x.shape[axis + 1 :]), x.dtype)

            def body(i, results):
                def put(axis, whole, x):
                    return lax.dynamic_update_slice_in_dim(whole, x, i * size, axis)

                pairs = zip(out_axes, results, results_of(i), strict=True)
                return tuple(jax.tree.map(partial(put, n), old, x) for n, old, x in pairs)

            partial = functools.partial
            shapes = zip(out_axes, jax.eval_shape(results_of, 0), strict=True)
            results = tuple(jax.tree.map(partial(all_channels, n), x) for n, x in shapes)
            return lax.fori_loop(0, width // size, body, results)

        return over_blocks

    return decorate


def _channels_at_once(
    x_BTD: jax.Array, coefficients: Coefficients, gradients: bool, resets: bool
) -> int:
    """The largest divisor of the width within the bounds, without gradients the largest whose
    tables are no larger than x, or the least; all channels where there is none, or where a mesh
    partitions them. With resets two blocks would cost compile time, and less time is saved."""
    width, table_size = x_BTD.shape[2], CHUNK * (CHUNK + 4 * coefficients.decay_re.shape[1])
    sizes = [n for n in range(MIN_CHANNELS, MAX_CHANNELS + 1) if width % n == 0]
    if dispatch.automatically_partitioned() or not sizes:
        return width
    most = MAX_CHANNELS if gradients else x_BTD.size // table_size
    if gradients and not resets and width >= HALVED_FROM:
        most = min(most, width // 2)
    return max((n for n in sizes if n <= most), default=sizes[0])


@_by_channels(axes=(2, 0, 1, None), out_axes=(2, 1, 3))
def forward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
    *,
    keep: bool,
) -> tuple[jax.Array, Complex, jax.Array | None]:
    """Outputs, final state, and with `keep` the states [B, segments, S, D] before each segment."""
    rows, length, width = x_BTD.shape
    tables = _tables(coefficients, length)
    num_kept = -(-length // SEGMENT) if keep else 0
    most = _power_of_two(max(BLOCK_CHUNKS, BLOCK_CHANNELS // width) // rows) * CHUNK

    def outputs(start, size, carry):
        y_BTD, state, kept = carry
        for offset in range(0, size, most):
            chunks = _chunks(x_BTD, reset_BT, start + offset, min(most, size - offset), state.dtype)
            before, state = _states(chunks, tables, state)
            if keep and offset % SEGMENT == 0:
                at_starts = before[:: SEGMENT // CHUNK]
                kept = _put(kept, at_starts, (start + offset) // SEGMENT, axis=0)
            y = _tokens_first(_outputs(chunks, tables, before), y_BTD)
            y_BTD = _put(y_BTD, y, start + offset)
        return y_BTD, state, kept

    state = _stacked(state_BDN)
    kept = jnp.zeros((num_kept, *state.shape), state.dtype)
    span = _span(rows, width) if keep else most
    y_BTD, state, kept = _walk(outputs, (jnp.zeros_like(x_BTD), state, kept), length, span)
    if tail := length % CHUNK:
        start = length - tail
        if keep and start % SEGMENT == 0:
            kept = _put(kept, state[None], start // SEGMENT, axis=0)
        x, reset = _cut(x_BTD, start, tail), _cut(reset_BT, start, tail)
        y, state_BDN = reference.cema_scan(x, coefficients, _pair(state), reset)
        y_BTD, state = _put(y_BTD, y, start), _stacked(state_BDN)
    kept = kept.reshape(num_kept, width, rows, -1).transpose(2, 0, 3, 1) if keep else None
    return y_BTD, _pair(state), kept


@_by_channels(axes=(2, 0, None, 3, 2, 1), out_axes=(2, 0, 1))
def backward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    reset_BT: jax.Array | None,
    kept: jax.Array,
    dy_BTD: jax.Array,
    d_state_BDN: Complex,
) -> tuple[jax.Array, Coefficients, Complex]:
    """The gradients of x, the coefficients and the first state."""
    rows, length, width = x_BTD.shape
    tables, tables_pullback = jax.vjp(functools.partial(_tables, length=length), coefficients)
    kept = kept.transpose(1, 3, 0, 2).reshape(kept.shape[1], width, rows, 2, -1)

    def states(start, size):
        chunks = _chunks(x_BTD, reset_BT, start, size, kept.dtype)
        state = lax.dynamic_index_in_dim(kept, start // SEGMENT, keepdims=False)
        return chunks, *_states(chunks, tables, state)

    def gradients(start, size, carry):
        dx_BTD, d_tables, d_state = carry
        chunks, before, _ = states(start, size)
        dy_DMC = _channels_first(_cut(dy_BTD, start, size), kept.dtype)
        dx, d_more, d_state = _gradients(chunks, tables, before, dy_DMC, d_state)
        dx_BTD = _put(dx_BTD, _tokens_first(dx, dx_BTD), start)
        return dx_BTD, jax.tree.map(jnp.add, d_tables, d_more), d_state

    dx_BTD, d_state = jnp.zeros_like(x_BTD), _stacked(d_state_BDN)
    d_coefficients, d_tables = jax.tree.map(jnp.zeros_like, (coefficients, tables))
    if tail := length % CHUNK:
        start = length - tail
        segment = start // SEGMENT * SEGMENT
        state = states(segment, start - segment)[-1] if start > segment else kept[-1]
        x, reset = _cut(x_BTD, start, tail), _cut(reset_BT, start, tail)
        scan = functools.partial(reference.cema_scan, reset_BT=reset)
        _, pullback = jax.vjp(scan, x, coefficients, _pair(state))
        dx, d_coefficients, d_state_BDN = pullback((_cut(dy_BTD, start, tail), d_state_BDN))
        dx_BTD, d_state = _put(dx_BTD, dx, start), _stacked(d_state_BDN)
    carry = dx_BTD, d_tables, d_state
    span = _span(rows, width)
    dx_BTD, d_tables, d_state = _walk(gradients, carry, length, span, reverse=True)
    (d_more,) = tables_pullback(d_tables)
    return dx_BTD, jax.tree.map(jnp.add, d_coefficients, d_more), _pair(d_state)


def _span(rows: int, width: int) -> int:
    """Tokens that are taken at once where states are kept or gradients are taken."""
    return min(_power_of_two(SPAN_CHANNELS // (rows * width)), MAX_SPAN_SEGMENTS) * SEGMENT


def _walk(step, carry, length: int, size: int, reverse: bool = False):
    """carry = step(start, size, carry) over spans of `size` tokens and the whole chunks behind."""
    spans, rest = length // size, length % size // CHUNK * CHUNK

    def body(i, carry):
        return step((spans - 1 - i if reverse else i) * size, size, carry)

    if rest and reverse:
        carry = step(spans * size, rest, carry)
    if spans:
        carry = lax.fori_loop(0, spans, body, carry)
    if rest and not reverse:
        carry = step(spans * size, rest, carry)
    return carry


def _power_of_two(most: int) -> int:
    """The largest that is at most `most`, and at least 1."""
    return 1 << max(most.bit_length() - 1, 0)


def _cut(x: jax.Array | None, start, size: int) -> jax.Array | None:
    return None if x is None else lax.dynamic_slice_in_dim(x, start, size, 1)


def _put(x: jax.Array, part: jax.Array, start, axis: int = 1) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def _stacked(state_BDN: Complex) -> jax.Array:
    """A state as one array [D, B, 2, N]."""
    return jnp.stack(state_BDN, 2).swapaxes(0, 1)


def _pair(state: jax.Array) -> Complex:
    """It as a pair [B, D, N] again."""
    return state[:, :, 0].swapaxes(0, 1), state[:, :, 1].swapaxes(0, 1)


# Tables


def _tables(coefficients: Coefficients, length: int) -> Tables | None:
    return make_tables(coefficients) if length >= CHUNK else None


def make_tables(coefficients: Coefficients) -> Tables:
    """The tables of a chunk of CHUNK tokens."""
    decay = jnp.stack([coefficients.decay_re, coefficients.decay_im], 1)
    output = jnp.stack([coefficients.output_re, coefficients.output_im], 1)
    width, _, size = decay.shape
    powers_CD2N = powers(decay, CHUNK + 1)
    after_CD2N = times(output[None], powers_CD2N)
    weights_CD = (coefficients.input_coeff[None] * after_CD2N[:CHUNK, :, 0]).sum(2)
    state_CDS = conjugate(after_CD2N[1:]).reshape(CHUNK, width, 2 * size)
    input_CD2N = coefficients.input_coeff[None, :, None] * powers_CD2N[CHUNK - 1 :: -1]
    return Tables(
        jnp.concatenate([_toeplitz(weights_CD.T), state_CDS.transpose(1, 2, 0)], 1),
        input_CD2N.reshape(CHUNK, width, 2 * size).swapaxes(0, 1),
        powers_CD2N[CHUNK],
    )


def conjugate(x: jax.Array) -> jax.Array:
    """That of complex arrays [..., 2, N]."""
    return x * jnp.array([1.0, -1.0], x.dtype).reshape((1,) * (x.ndim - 2) + (2, 1))


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of complex arrays [..., 2, N] of equal rank."""
    return a[..., :1, :] * b - conjugate(a[..., 1:, :] * b[..., ::-1, :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def powers(decay: jax.Array, count: int) -> jax.Array:
    """The powers 0 .. count - 1 of decay[D, 2, N]: [count, D, 2, N]."""
    re, im = jnp.ones_like(decay[:, :1]), jnp.zeros_like(decay[:, :1])
    step = lambda power, _: (times(decay, power), power)  # noqa: E731
    return lax.scan(step, jnp.concatenate([re, im], 1), length=count)[1]


def _powers_forward(decay, count):
    result = powers(decay, count)
    return result, result


def _powers_backward(count, result, d_result):
    exponents = jnp.arange(1, count, dtype=result.dtype)[:, None, None, None]
    return (times(conjugate(exponents * result[:-1]), d_result[1:]).sum(0),)


powers.defvjp(_powers_forward, _powers_backward)


def _toeplitz(k_DC: jax.Array) -> jax.Array:
    """Matrices [D, C, C] with k[i - j] at row j, column i, and 0 where i < j.

    Rows of length 2C - 1 cut from a sequence of period 2C start one element earlier each.
    """
    width, size = k_DC.shape
    periodic = jnp.tile(jnp.concatenate([k_DC, jnp.zeros_like(k_DC)], 1), (1, size))
    skewed = periodic[:, : size * (2 * size - 1)].reshape(width, size, 2 * size - 1)
    return skewed[:, :, :size]


# One span


def _chunks(x_BTD, reset_BT, start, size: int, dtype) -> Chunks:
    """The tokens of a span: chunk k of row b at b * K + k."""
    x_DMC = _channels_first(_cut(x_BTD, start, size), dtype)
    if reset_BT is None:
        return Chunks(x_DMC, None)
    # A product, where XLA:CPU makes five kernels of a cumulative sum.
    reset_MC = _cut(reset_BT, start, size).reshape(-1, CHUNK).astype(jnp.float32)
    piece_MC = reset_MC @ jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    return Chunks(x_DMC, piece_MC.astype(jnp.int32))


def _channels_first(x_BTD: jax.Array, dtype) -> jax.Array:
    width = x_BTD.shape[2]
    return x_BTD.astype(dtype).reshape(-1, width).T.reshape(width, -1, CHUNK)


def _tokens_first(x_DMC: jax.Array, like_BTD: jax.Array) -> jax.Array:
    rows, _, width = like_BTD.shape
    return x_DMC.reshape(width, -1).T.reshape(rows, -1, width).astype(like_BTD.dtype)


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision="highest")


def _states(chunks: Chunks, tables: Tables, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before every chunk [K, D, B, 2, N], and the one after the last."""
    added_DMS = _product("dmj,djs->dms", chunks.last(chunks.x), tables.input)
    return _carry(tables.decay, chunks, added_DMS, state)


def _carry(decay, chunks: Chunks, added_DMS: jax.Array, state: jax.Array, reverse: bool = False):
    """Takes a state across chunks, each of which adds to it: the states before every chunk, and the
    one after all. In reverse from the last chunk to the first."""
    decay = decay[:, None]

    def step(state, inputs):
        added, kept_B = inputs
        after = times(decay, state)
        if kept_B is not None:
            after = jnp.where(kept_B[None, :, None, None], after, 0.0)
        return after + added, state

    inputs = _chunks_leading(added_DMS, state), chunks.kept(state.shape[1])
    state, before = lax.scan(step, state, inputs, reverse=reverse)
    return before, state


def _chunks_leading(x_DMS: jax.Array, state: jax.Array) -> jax.Array:
    width, rows, _, size = state.shape
    return x_DMS.reshape(width, rows, -1, 2, size).transpose(2, 0, 1, 3, 4)


def _channels_leading(states: jax.Array) -> jax.Array:
    """[K, D, B, 2, N] to [D, M, S]."""
    chunks, width, rows, _, size = states.shape
    return states.transpose(1, 2, 0, 3, 4).reshape(width, rows * chunks, 2 * size)


def _outputs(chunks: Chunks, tables: Tables, before: jax.Array) -> jax.Array:
    seen = jnp.concatenate([chunks.first(chunks.x), _channels_leading(before)], 2)
    y_DMC = _product("dmj,dji->dmi", seen, tables.output)
    if chunks.piece is None:
        return y_DMC

    def add(piece, y_DMC):
        own_1MC = (chunks.piece == piece)[None]
        x_own = jnp.where(own_1MC, chunks.x, 0.0)
        return jnp.where(own_1MC, _product("dmj,dji->dmi", x_own, within), y_DMC)

    within = tables.output[:, :CHUNK]
    return lax.fori_loop(1, chunks.piece.max() + 1, add, y_DMC)


def _gradients(
    chunks: Chunks, tables: Tables, before: jax.Array, dy_DMC: jax.Array, d_state: jax.Array
) -> tuple[jax.Array, Tables, jax.Array]:
    """Those of the tokens [D, M, C], the tables and the state before a span."""
    seen = jnp.concatenate([chunks.first(chunks.x), _channels_leading(before)], 2)
    dy_first = chunks.first(dy_DMC)
    d_seen = _product("dmi,dji->dmj", dy_first, tables.output)
    d_output = _product("dmj,dmi->dji", seen, dy_first)
    carried = conjugate(tables.decay), chunks, d_seen[..., CHUNK:], d_state
    d_after, d_state = _carry(*carried, reverse=True)
    d_added = _channels_leading(d_after)
    crossing = seen[..., CHUNK:]
    if chunks.piece is not None:
        crossing = jnp.where((chunks.piece[:, -1:] == 0)[None], crossing, 0.0)
    complex_ = lambda x: x.reshape(*x.shape[:2], *d_state.shape[2:])  # noqa: E731
    d_decay = times(conjugate(complex_(crossing)), complex_(d_added)).sum(1)
    d_input = _product("dmj,dms->djs", chunks.last(chunks.x), d_added)
    dx_DMC = chunks.first(d_seen[..., :CHUNK])
    dx_DMC += chunks.last(_product("dms,djs->dmj", d_added, tables.input))
    if chunks.piece is None:
        return dx_DMC, Tables(d_output, d_input, d_decay), d_state

    def add(piece, carry):
        dx_DMC, d_output = carry
        own_1MC = (chunks.piece == piece)[None]
        x_own, dy_own = (jnp.where(own_1MC, part, 0.0) for part in (chunks.x, dy_DMC))
        dx_own = _product("dmi,dji->dmj", dy_own, within)
        d_within = _product("dmj,dmi->dji", x_own, dy_own)
        return jnp.where(own_1MC, dx_own, 0.0) + dx_DMC, d_output.at[:, :CHUNK].add(d_within)

    within = tables.output[:, :CHUNK]
    dx_DMC, d_output = lax.fori_loop(1, chunks.piece.max() + 1, add, (dx_DMC, d_output))
    return dx_DMC, Tables(d_output, d_input, d_decay), d_state
