"""The portable fast form: chunks of tokens as batched matrix products, one matrix per channel.

Within a chunk of C tokens the recurrence is a lower triangular Toeplitz matrix; between chunks only
the state is carried. A loop walks over blocks of some chunks, so that the arrays with channels
first, which the matrix products want, stay small enough for a cache and are never as long as the
sequence. The backward pass keeps the states at block starts and recomputes the rest of a block.

Resets divide a chunk into pieces. Pieces must not see each other, and the matrix product is taken
once per piece of the chunk with most pieces, over the tokens of that piece alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cema_scan import reference
from pallas_kernels.cema_scan.reference import Coefficients, Complex, multiply

CHUNK = 32
BLOCK_CHUNKS = 8
"""Chunks of all rows together that a block of the forward pass has at least."""

SEGMENT = 256
"""Tokens between the states that are kept for the backward pass; a multiple of CHUNK."""

BACKWARD_CHANNELS = 1024
"""Rows times channels times segments that the backward pass takes at once: it adds to gradients as
large as the tables each time, which for few channels costs more than a larger working set."""

MAX_BACKWARD_SEGMENTS = 4


class Tables(NamedTuple):
    """What one chunk does: matrices per channel, for row vectors from the left.

    output[D, C + 2N, C] takes the chunk's tokens and the state before it (re then im) to its
    outputs, input[D, C, 2N] its tokens to the state after it, decay the state across it.
    """

    output: jax.Array
    input: jax.Array
    decay_re: jax.Array
    decay_im: jax.Array


def forward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
    *,
    keep: bool,
) -> tuple[jax.Array, Complex, jax.Array | None]:
    """Outputs, final state, and with `keep` the states [B, segments, 2N, D] before each segment."""
    length = x_BTD.shape[1]
    whole = length // SEGMENT
    tables = _tables(coefficients, length)
    state = _channels_first(state_BDN)
    num_kept = -(-length // SEGMENT) if keep else 0
    states = tuple(jnp.zeros((num_kept, *part.shape), part.dtype) for part in state)
    y_BTD = jnp.zeros_like(x_BTD)

    def body(i, carry):
        y_BTD, state, states = carry
        if keep:
            states = _put_each(states, state, i)
        for start, size in _steps(x_BTD.shape[0], SEGMENT):
            start = i * SEGMENT + start
            y, state = _block(*_cut((x_BTD, reset_BT), start, size), tables, state)
            y_BTD = lax.dynamic_update_slice_in_dim(y_BTD, y, start, 1)
        return y_BTD, state, states

    if whole:
        y_BTD, state, states = lax.fori_loop(0, whole, body, (y_BTD, state, states))
    if length % SEGMENT:
        if keep:
            states = _put_each(states, state, whole)
        rest = _cut((x_BTD, reset_BT), whole * SEGMENT, length % SEGMENT)
        y, state = _segment(*rest, tables, coefficients, state)
        y_BTD = lax.dynamic_update_slice_in_dim(y_BTD, y, whole * SEGMENT, 1)
    kept = jnp.concatenate(states, 3).transpose(2, 0, 3, 1) if keep else None
    return y_BTD, _channels_first(state), kept


def backward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    reset_BT: jax.Array | None,
    states: jax.Array,
    dy_BTD: jax.Array,
    d_state_BDN: Complex,
) -> tuple[jax.Array, Coefficients, Complex]:
    """The gradients of x, the coefficients and the first state."""
    rows, length, width = x_BTD.shape
    segments = min(max(BACKWARD_CHANNELS // (rows * width), 1), MAX_BACKWARD_SEGMENTS)
    span = segments * SEGMENT
    whole = length // span
    tables, tables_pullback = jax.vjp(functools.partial(_tables, length=length), coefficients)
    d_state = _channels_first(d_state_BDN)
    d_tables, d_coefficients = jax.tree.map(jnp.zeros_like, (tables, coefficients))
    states_DBN = states.transpose(1, 3, 0, 2)  # segments first
    size = coefficients.decay_re.shape[1]

    def gradients(i, length, d_state):
        """Those of span i, of the given length."""
        x, reset = _cut((x_BTD, reset_BT), i * span, length)
        (dy,) = _cut((dy_BTD,), i * span, length)
        before = lax.dynamic_index_in_dim(states_DBN, i * segments, keepdims=False)
        before = before[..., :size], before[..., size:]
        segment = lambda x, *others: _segment(x, reset, *others)  # noqa: E731
        _, pullback = jax.vjp(segment, x, tables, coefficients, before)
        return pullback((dy, d_state))

    def body(step, carry):
        dx_BTD, d_tables, d_state = carry
        i = whole - 1 - step
        dx, d_more, _, d_state = gradients(i, span, d_state)
        dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx, i * span, 1)
        return dx_BTD, jax.tree.map(jnp.add, d_tables, d_more), d_state

    dx_BTD = jnp.zeros_like(x_BTD)
    if length % span:
        dx, d_tables, d_coefficients, d_state = gradients(whole, length % span, d_state)
        dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx, whole * span, 1)
    if whole:
        dx_BTD, d_tables, d_state = lax.fori_loop(0, whole, body, (dx_BTD, d_tables, d_state))
    (d_more,) = tables_pullback(d_tables)
    return dx_BTD, jax.tree.map(jnp.add, d_coefficients, d_more), _channels_first(d_state)


def _channels_first(state: Complex) -> Complex:
    """[B, D, N] to [D, B, N] and back."""
    return tuple(part.swapaxes(0, 1) for part in state)


def _put_each(all_states, state, i):
    put = lax.dynamic_update_index_in_dim
    return tuple(put(a, part, i, 0) for a, part in zip(all_states, state, strict=True))


def _cut(arrays, start, size):
    cut = lax.dynamic_slice_in_dim
    return [None if x is None else cut(x, start, size, 1) for x in arrays]


def _steps(rows: int, length: int):
    """(start, size) of blocks of whole chunks that cover `length` tokens, itself whole chunks."""
    size = max(BLOCK_CHUNKS // rows, 1) * CHUNK
    return [(start, min(size, length - start)) for start in range(0, length, size)]


def _segment(x_BTD, reset_BT, tables, coefficients, state):
    """Outputs and state after any number of tokens; those beyond whole chunks go one by one."""
    length = x_BTD.shape[1]
    whole = length // CHUNK * CHUNK
    parts = []
    if whole:
        y, state = _block(*_cut((x_BTD, reset_BT), 0, whole), tables, state)
        parts.append(y)
    if whole < length:
        x, reset = _cut((x_BTD, reset_BT), whole, length - whole)
        y, state = reference.cema_scan(x, coefficients, _channels_first(state), reset)
        state = _channels_first(state)
        parts.append(y)
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)), state


def _tables(coefficients: Coefficients, length: int) -> Tables | None:
    return make_tables(coefficients) if length >= CHUNK else None


def make_tables(coefficients: Coefficients) -> Tables:
    """The tables of a chunk of CHUNK tokens."""
    decay = coefficients.decay_re, coefficients.decay_im
    output = coefficients.output_re[None], coefficients.output_im[None]
    one = jnp.ones_like(decay[0]), jnp.zeros_like(decay[0])
    across, powers = lax.scan(lambda power, _: (multiply(power, decay), power), one, length=CHUNK)
    k_CDN = coefficients.input_coeff[None] * multiply(output, powers)[0]
    input_C = [coefficients.input_coeff[None] * part[::-1] for part in powers]
    next_powers = (jnp.concatenate([p[1:], a[None]]) for p, a in zip(powers, across, strict=True))
    re_CDN, im_CDN = multiply(output, tuple(next_powers))
    state_DNC = jnp.concatenate([re_CDN, -im_CDN], 2).transpose(1, 2, 0)
    return Tables(
        jnp.concatenate([_toeplitz(k_CDN.sum(2).T), state_DNC], 1),
        jnp.concatenate(input_C, 2).transpose(1, 0, 2),
        *across,
    )


def _toeplitz(k_DC: jax.Array) -> jax.Array:
    """Matrices [D, C, C] with k[i - j] at row j, column i, and 0 where i < j.

    Rows of length 2C - 1 cut from a sequence of period 2C start one element earlier each.
    """
    width, size = k_DC.shape
    periodic = jnp.tile(jnp.concatenate([k_DC, jnp.zeros_like(k_DC)], 1), (1, size))
    skewed = periodic[:, : size * (2 * size - 1)].reshape(width, size, 2 * size - 1)
    return skewed[:, :, :size]


def _pieces(reset_BT: jax.Array) -> jax.Array:
    """How many resets lie in a chunk up to and with each token: [M, C]."""
    return jnp.cumsum(reset_BT.reshape(-1, CHUNK), axis=1, dtype=jnp.int32)


# One block: M = rows times chunks, a chunk of row b at b * (chunks per row) + k.


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision="highest")


def _block(x_BTD, reset_BT, tables, state_DBN):
    """Outputs and the state after a block of whole chunks."""
    rows, length, width = x_BTD.shape
    dtype = tables.output.dtype
    x_DMC = x_BTD.astype(dtype).reshape(rows * length, width).T.reshape(width, -1, CHUNK)
    if reset_BT is None:
        kept_M, x_first, x_last = None, x_DMC, x_DMC
    else:
        piece_MC = _pieces(reset_BT)
        kept_M = piece_MC[:, -1] == 0
        first_1MC = (piece_MC == 0)[None]
        x_first = jnp.where(first_1MC, x_DMC, 0.0)
        x_last = jnp.where((piece_MC == piece_MC[:, -1:])[None], x_DMC, 0.0)
    added_DMN = _product("dmj,djn->dmn", x_last, tables.input)
    before_DMN, state_DBN = _carry(added_DMN, tables, state_DBN, kept_M)
    y_DMC = _product("dmj,dji->dmi", jnp.concatenate([x_first, before_DMN], 2), tables.output)
    if reset_BT is not None:
        later_DMC = _later_pieces(x_DMC, tables.output[:, :CHUNK], piece_MC)
        y_DMC = jnp.where(first_1MC, y_DMC, later_DMC)
    y_BTD = y_DMC.reshape(width, rows * length).T.reshape(x_BTD.shape)
    return y_BTD.astype(x_BTD.dtype), state_DBN


def _carry(added_DMN, tables, state_DBN, kept_M):
    """The states (re then im) before every chunk, and the state after the last."""
    width, rows, size = state_DBN[0].shape
    added = added_DMN.reshape(width, rows, -1, 2 * size).transpose(2, 0, 1, 3)
    kept = None if kept_M is None else kept_M.reshape(rows, -1).T
    decay = tables.decay_re[:, None], tables.decay_im[:, None]

    def step(state, inputs):
        added_DBN, kept_B = inputs
        re, im = multiply(decay, state)
        if kept_B is not None:
            re, im = (jnp.where(kept_B[None, :, None], part, 0.0) for part in (re, im))
        after = re + added_DBN[..., :size], im + added_DBN[..., size:]
        return after, jnp.concatenate(state, 2)

    state_DBN, before = lax.scan(step, state_DBN, (added, kept))
    return before.transpose(1, 2, 0, 3).reshape(width, -1, 2 * size), state_DBN


@jax.custom_vjp
def _later_pieces(x_DMC, within_DCC, piece_MC):
    """The outputs of every piece but a chunk's first from the tokens of that piece."""

    def add(piece, y_DMC):
        own_1MC = (piece_MC == piece)[None]
        product = _product("dmj,dji->dmi", jnp.where(own_1MC, x_DMC, 0.0), within_DCC)
        return jnp.where(own_1MC, product, y_DMC)

    return lax.fori_loop(1, piece_MC.max() + 1, add, jnp.zeros_like(x_DMC))


def _later_pieces_forward(x_DMC, within_DCC, piece_MC):
    return _later_pieces(x_DMC, within_DCC, piece_MC), (x_DMC, within_DCC, piece_MC)


def _later_pieces_backward(residuals, dy_DMC):
    x_DMC, within_DCC, piece_MC = residuals

    def add(piece, carry):
        dx_DMC, d_within = carry
        own_1MC = (piece_MC == piece)[None]
        x_own, dy_own = (jnp.where(own_1MC, part, 0.0) for part in (x_DMC, dy_DMC))
        dx_own = _product("dmi,dji->dmj", dy_own, within_DCC)
        d_within += _product("dmj,dmi->dji", x_own, dy_own)
        return jnp.where(own_1MC, dx_own, dx_DMC), d_within

    zeros = jnp.zeros_like(x_DMC), jnp.zeros_like(within_DCC)
    return *lax.fori_loop(1, piece_MC.max() + 1, add, zeros), None


_later_pieces.defvjp(_later_pieces_forward, _later_pieces_backward)
