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
CHUNKS_PER_BLOCK = 8
"""Chunks of all rows together that one block has at least; larger ones measured slower on CPU."""


class Tables(NamedTuple):
    """What one chunk does: matrices per channel, for row vectors from the left.

    output[D, C + 2N, C] takes the chunk's tokens and the state before it (re then im) to its
    outputs, input[D, C, 2N] its tokens to the state after it, decay the state across it.
    """

    output: jax.Array
    input: jax.Array
    decay_re: jax.Array
    decay_im: jax.Array


def cema_scan(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
) -> tuple[jax.Array, Complex]:
    """See `api.cema_scan`. Tokens beyond whole chunks take the recurrence one by one."""
    rows, length, _ = x_BTD.shape
    num_chunks = length // CHUNK
    per_block = min(max(CHUNKS_PER_BLOCK // rows, 1), max(num_chunks, 1))
    in_blocks = num_chunks // per_block * per_block
    parts, start = [], 0
    tables = make_tables(coefficients) if num_chunks else None
    state = tuple(part.swapaxes(0, 1) for part in state_BDN)
    for chunks, block in ((in_blocks, per_block), (num_chunks - in_blocks, None)):
        if not chunks:
            continue
        stop = start + chunks * CHUNK
        piece = None if reset_BT is None else _pieces(reset_BT[:, start:stop])
        y, state = _blocks(x_BTD[:, start:stop], piece, tables, state, block or chunks)
        parts.append(y)
        start = stop
    state = tuple(part.swapaxes(0, 1) for part in state)
    if start < length:
        reset = None if reset_BT is None else reset_BT[:, start:]
        y, state = reference.cema_scan(x_BTD[:, start:], coefficients, state, reset)
        parts.append(y)
    return (parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)), state


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
    """How many resets lie in the chunk up to and with each token."""
    chunks = reset_BT.reshape(reset_BT.shape[0], -1, CHUNK)
    return jnp.cumsum(chunks, axis=2, dtype=jnp.int32).reshape(reset_BT.shape)


# The loop over blocks, forward and backward.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(x_BTD, piece_BT, tables, state_DBN, chunks_per_block):
    return _blocks_forward(x_BTD, piece_BT, tables, state_DBN, chunks_per_block)[0]


def _slice(x, i, length):
    return None if x is None else lax.dynamic_slice_in_dim(x, i * length, length, 1)


def _blocks_forward(x_BTD, piece_BT, tables, state_DBN, chunks_per_block):
    size = chunks_per_block * CHUNK
    num_blocks = x_BTD.shape[1] // size

    def body(i, carry):
        y_BTD, state, states = carry
        states = tuple(
            lax.dynamic_update_index_in_dim(all_states, part, i, 0)
            for all_states, part in zip(states, state, strict=True)
        )
        y, state = _block(_slice(x_BTD, i, size), tables, state, _slice(piece_BT, i, size))
        return lax.dynamic_update_slice_in_dim(y_BTD, y, i * size, 1), state, states

    states = tuple(jnp.zeros((num_blocks, *part.shape), part.dtype) for part in state_DBN)
    carry = (jnp.zeros_like(x_BTD), state_DBN, states)
    y_BTD, state, states = lax.fori_loop(0, num_blocks, body, carry)
    return (y_BTD, state), (x_BTD, piece_BT, tables, states)


def _blocks_backward(chunks_per_block, residuals, cotangents):
    x_BTD, piece_BT, tables, states = residuals
    dy_BTD, d_state = cotangents
    size = chunks_per_block * CHUNK
    num_blocks = x_BTD.shape[1] // size

    def body(step, carry):
        dx_BTD, d_tables, d_state = carry
        i = num_blocks - 1 - step
        state = tuple(lax.dynamic_index_in_dim(part, i, keepdims=False) for part in states)
        piece = _slice(piece_BT, i, size)
        block = functools.partial(_block, piece_BT=piece)
        _, pullback = jax.vjp(block, _slice(x_BTD, i, size), tables, state)
        dx, d_more, d_state = pullback((_slice(dy_BTD, i, size), d_state))
        dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx, i * size, 1)
        return dx_BTD, jax.tree.map(jnp.add, d_tables, d_more), d_state

    carry = (jnp.zeros_like(x_BTD), jax.tree.map(jnp.zeros_like, tables), d_state)
    dx_BTD, d_tables, d_state = lax.fori_loop(0, num_blocks, body, carry)
    return dx_BTD, None, d_tables, d_state


_blocks.defvjp(_blocks_forward, _blocks_backward)


# One block: M = rows times chunks, a chunk of row b at b * (chunks per row) + k.


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision="highest")


def _block(x_BTD, tables, state_DBN, piece_BT):
    """Outputs and the state after a block of whole chunks."""
    rows, length, width = x_BTD.shape
    dtype = tables.output.dtype
    x_DMC = x_BTD.astype(dtype).reshape(rows * length, width).T.reshape(width, -1, CHUNK)
    if piece_BT is None:
        kept_M, x_first, x_last = None, x_DMC, x_DMC
    else:
        piece_MC = piece_BT.reshape(-1, CHUNK)
        kept_M = piece_MC[:, -1] == 0
        first_1MC = (piece_MC == 0)[None]
        x_first = jnp.where(first_1MC, x_DMC, 0.0)
        x_last = jnp.where((piece_MC == piece_MC[:, -1:])[None], x_DMC, 0.0)
    added_DMN = _product("dmj,djn->dmn", x_last, tables.input)
    before_DMN, state_DBN = _carry(added_DMN, tables, state_DBN, kept_M)
    y_DMC = _product("dmj,dji->dmi", jnp.concatenate([x_first, before_DMN], 2), tables.output)
    if piece_BT is not None:
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
