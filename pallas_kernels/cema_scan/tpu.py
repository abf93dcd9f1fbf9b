"""The TPU kernels: the recurrence token by token, the state in registers.

A program holds the state of one row and one tile of channels: N lies on sublanes, channels on
lanes, so that a token is one row of x spread over sublanes, and its output a sum over sublanes. The
grid walks over chunks of CHUNK tokens in order, the state crossing them in VMEM; x, y and, in the
backward pass, their cotangents are copied once. The forward pass for gradients also keeps the
states at chunk starts. The backward kernel walks over the chunks in reverse: from the state at the
start it recomputes the states inside into VMEM, then runs the adjoint recurrence
backward over them, with the gradients of the coefficients summed in float32 in VMEM.

The work is 12 N operations per token and channel forward and 33 N backward on the vector unit,
against 2 to 4 elements of traffic: the kernels are bound by arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.cema_scan.reference import Coefficients, Complex, multiply

CHUNK = 256
GROUP = 8
"""Tokens whose rows of x and y are loaded and stored together."""

TILE_WIDTH = 256
VMEM_LIMIT = 64 * 2**20
HISTORY_LIMIT = 24 * 2**20
"""Bytes of VMEM for the states inside a chunk."""

MAX_SIZE = HISTORY_LIMIT // (8 * 128 * CHUNK)
"""Numbers of state per channel that fit there with the narrowest tile."""


def forward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
    *,
    keep: bool,
    interpret: bool = False,
) -> tuple[jax.Array, Complex, jax.Array | None]:
    """Outputs, final state, and with `keep` the states [B, chunks, 2N, D] before every chunk."""
    plan = _Plan(x_BTD, coefficients, reset_BT, interpret)
    row, chunk, state, table = plan.specs(reverse=False)
    states = pl.BlockSpec((None, None, *state.block_shape[1:]), lambda d, b, t: (b, t, 0, d))
    struct = jax.ShapeDtypeStruct
    state_struct = struct((plan.rows, 2 * plan.padded, plan.width), jnp.float32)
    states_struct = struct((plan.rows, plan.chunks, *state_struct.shape[1:]), jnp.float32)
    wide = pltpu.VMEM((plan.chunk, plan.tile), jnp.float32)
    out = plan.call(
        functools.partial(_forward_kernel, plan, keep),
        "cema_scan_forward",
        (plan.packed(coefficients), plan.join(state_BDN), x_BTD),
        [table, state, row],
        [row, state] + [states] * keep,
        [struct(x_BTD.shape, x_BTD.dtype), state_struct] + [states_struct] * keep,
        [pltpu.VMEM((2 * plan.padded, plan.tile), jnp.float32), wide, wide],
        ("parallel", "parallel", "arbitrary"),
        chunk,
        operations=12,
    )
    return out[0], plan.split(out[1]), plan.without_padding(out[2]) if keep else None


def backward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    reset_BT: jax.Array | None,
    states: jax.Array,
    dy_BTD: jax.Array,
    d_state_BDN: Complex,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, Coefficients, Complex]:
    """The gradients of x, the coefficients and the first state."""
    plan = _Plan(x_BTD, coefficients, reset_BT, interpret, history=True)
    row, chunk, state, table = plan.specs(reverse=True)
    last = plan.chunks - 1
    kept = pl.BlockSpec((None, None, *state.block_shape[1:]), lambda d, b, t: (b, last - t, 0, d))
    struct = jax.ShapeDtypeStruct
    state_struct = struct((plan.rows, 2 * plan.padded, plan.width), jnp.float32)
    packed = plan.packed(coefficients)
    wide = pltpu.VMEM((plan.chunk, plan.tile), jnp.float32)
    dx_BTD, d_state, d_packed = plan.call(
        functools.partial(_backward_kernel, plan),
        "cema_scan_backward",
        (packed, plan.join(d_state_BDN), x_BTD, dy_BTD, plan.with_padding(states)),
        [table, state, row, row, kept],
        [row, state, table],
        [struct(x_BTD.shape, x_BTD.dtype), state_struct, struct(packed.shape, jnp.float32)],
        [
            pltpu.VMEM((2 * plan.padded, plan.tile), jnp.float32),
            pltpu.VMEM((plan.chunk, 2 * plan.padded, plan.tile), jnp.float32),
            wide,
            wide,
            wide,
        ],
        ("parallel", "arbitrary", "arbitrary"),
        chunk,
        operations=33,
    )
    return dx_BTD, plan.unpacked(d_packed), plan.split(d_state)


class _Plan:
    """Sizes, tiles and layouts of one call. In kernels N is padded to whole sublane tiles."""

    def __init__(self, x_BTD, coefficients, reset_BT, interpret, history=False):
        if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"cema_scan: the TPU kernel serves float32 and bfloat16, x has dtype {x_BTD.dtype}"
            )
        self.rows, self.length, self.width = x_BTD.shape
        self.dtype, self.interpret, self.reset_BT = x_BTD.dtype, interpret, reset_BT
        self.size = coefficients.decay_re.shape[1]
        self.padded = -(-self.size // 8) * 8
        self.chunk = min(CHUNK, self.length)
        self.chunks = pl.cdiv(self.length, self.chunk)
        self.tile = min(TILE_WIDTH, self.width)
        if history and 8 * self.chunk * self.padded * self.tile > HISTORY_LIMIT:
            self.tile = min(128, self.width)
            if 8 * self.chunk * self.padded * self.tile > HISTORY_LIMIT:
                raise NotImplementedError(
                    f"cema_scan: the TPU kernel serves up to {MAX_SIZE} "
                    f"complex numbers of state per channel, here are {self.size}; use 'xla'"
                )

    # N padded and before D, real parts before imaginary ones.

    def packed(self, coefficients: Coefficients) -> jax.Array:
        return jnp.concatenate([self._pad(c.T) for c in coefficients])

    def unpacked(self, packed: jax.Array) -> Coefficients:
        parts = packed.reshape(5, self.padded, self.width)[:, : self.size]
        return Coefficients(*(part.T for part in parts))

    def join(self, state_BDN: Complex) -> jax.Array:
        return jnp.concatenate([self._pad(part.swapaxes(1, 2)) for part in state_BDN], 1)

    def split(self, state: jax.Array) -> Complex:
        parts = state.reshape(self.rows, 2, self.padded, self.width)[:, :, : self.size]
        return parts[:, 0].swapaxes(1, 2), parts[:, 1].swapaxes(1, 2)

    def without_padding(self, states: jax.Array) -> jax.Array:
        """[B, chunks, 2N, D] of states in the kernel's layout; nothing to do for whole tiles."""
        shape = *states.shape[:2], 2, self.padded, self.width
        states = states.reshape(shape)[:, :, :, : self.size]
        return states.reshape(*shape[:2], 2 * self.size, self.width)

    def with_padding(self, states: jax.Array) -> jax.Array:
        shape = *states.shape[:2], 2, self.size, self.width
        return self._pad(states.reshape(shape)).reshape(*shape[:2], 2 * self.padded, self.width)

    def _pad(self, x: jax.Array) -> jax.Array:
        rest = [(0, 0)] * (x.ndim - 2) + [(0, self.padded - self.size), (0, 0)]
        return jnp.pad(x, rest)

    # Blocks. Parts of a block beyond the last channel are lanes that touch no others.

    def specs(self, reverse: bool):
        """Blocks of x, of the resets, of a state per row, and of the packed coefficients."""
        last = self.chunks - 1

        def at(t):
            return last - t if reverse else t

        row = pl.BlockSpec((None, self.chunk, self.tile), lambda d, b, t: (b, at(t), d))
        reset = pl.BlockSpec(
            (None, 1, self.chunk), lambda d, b, t: (b, 0, at(t)), memory_space=pltpu.SMEM
        )
        state = pl.BlockSpec((None, 2 * self.padded, self.tile), lambda d, b, t: (b, 0, d))
        table = pl.BlockSpec((5 * self.padded, self.tile), lambda d, b, t: (0, d))
        return row, reset, state, table

    def call(
        self,
        kernel,
        name,
        operands,
        in_specs,
        out_specs,
        out_shape,
        scratch,
        semantics,
        reset_spec,
        operations,
    ):
        if self.reset_BT is not None:
            operands = (*operands, self.reset_BT.astype(jnp.int32)[:, None])
            in_specs = [*in_specs, reset_spec]
        tiles = pl.cdiv(self.width, self.tile)
        copied = sum(_nbytes(x) for x in (*operands, *out_shape))
        if self.reset_BT is not None:
            copied += (tiles - 1) * _nbytes(operands[-1])
        return dispatch.pallas_call(
            kernel,
            grid=(tiles, self.rows, self.chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=operations * self.padded * self.rows * self.length * self.width,
                transcendentals=0,
                bytes_accessed=copied,
            ),
            name=name,
            interpret=self.interpret,
        )(*operands)

    # Inside a kernel.

    def coefficients(self, packed_ref) -> Coefficients:
        n = self.padded
        return Coefficients(*(packed_ref[i * n : (i + 1) * n, :] for i in range(5)))

    def halves(self, ref) -> Complex:
        return ref[: self.padded, :], ref[self.padded :, :]

    def store_halves(self, ref, value: Complex) -> None:
        ref[: self.padded, :], ref[self.padded :, :] = value

    def valid(self, chunk_index):
        """How many tokens of a chunk exist."""
        if self.length % self.chunk == 0:
            return self.chunk
        return jnp.minimum(self.chunk, self.length - chunk_index * self.chunk)

    def walk(self, valid, step, carry, inputs, outputs=(), reverse=False):
        """Carries step(token, *rows of inputs, carry) -> (carry, rows of outputs) over tokens.

        Rows are [1, tile]; they are loaded and stored for GROUP tokens at a time.
        """
        groups = valid // GROUP if isinstance(valid, int) else lax.div(valid, jnp.int32(GROUP))

        def group(i, carry):
            start = (groups - 1 - i if reverse else i) * GROUP
            start = pl.multiple_of(start, GROUP)
            loaded = [ref[pl.ds(start, GROUP), :] for ref in inputs]
            found = [None] * GROUP
            for k in reversed(range(GROUP)) if reverse else range(GROUP):
                rows = [x[k : k + 1] for x in loaded]
                carry, found[k] = step(start + k, *rows, carry)
            for ref, rows in zip(outputs, zip(*found, strict=True), strict=True):
                ref[pl.ds(start, GROUP), :] = jnp.concatenate(rows)
            return carry

        def single(i, carry):
            token = groups * GROUP + valid - 1 - i if reverse else i
            carry, rows = step(token, *(ref[pl.ds(token, 1), :] for ref in inputs), carry)
            for ref, row in zip(outputs, rows, strict=True):
                ref[pl.ds(token, 1), :] = row
            return carry

        def all_groups(carry):
            if isinstance(groups, int) and not groups:
                return carry
            return lax.fori_loop(0, groups, group, carry)

        def rest(carry):
            if isinstance(valid, int) and valid % GROUP == 0:
                return carry
            return lax.fori_loop(groups * GROUP, valid, single, carry)

        return all_groups(rest(carry)) if reverse else rest(all_groups(carry))


def _nbytes(x) -> int:
    return x.size * x.dtype.itemsize


def _kept(reset_ref, token, state: Complex) -> Complex:
    """The state, 0 at the first token of a document."""
    if reset_ref is None:
        return state
    reset = reset_ref[0, token] != 0
    return tuple(jnp.where(reset, 0.0, part) for part in state)


def _forward_kernel(plan, keep, packed_ref, state_ref, x_ref, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if plan.reset_BT is not None else (None, refs)
    y_ref, last_ref, *states_ref, carry_ref, x_wide_ref, y_wide_ref = refs
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        carry_ref[...] = state_ref[...]

    if keep:
        states_ref[0][...] = carry_ref[...]
    x_wide_ref[...] = x_ref[...].astype(jnp.float32)
    decay_re, decay_im, input_coeff, output_re, output_im = plan.coefficients(packed_ref)

    def step(token, x_1d, state):
        re, im = multiply((decay_re, decay_im), _kept(reset_ref, token, state))
        re += input_coeff * x_1d
        y_1d = jnp.sum(output_re * re - output_im * im, 0, keepdims=True)
        return (re, im), (y_1d,)

    state = plan.walk(plan.valid(chunk), step, plan.halves(carry_ref), (x_wide_ref,), (y_wide_ref,))
    plan.store_halves(carry_ref, state)
    y_ref[...] = y_wide_ref[...].astype(y_ref.dtype)

    @pl.when(chunk == plan.chunks - 1)
    def _():
        plan.store_halves(last_ref, state)


def _backward_kernel(plan, packed_ref, d_last_ref, x_ref, dy_ref, states_ref, *refs):
    reset_ref, refs = (refs[0], refs[1:]) if plan.reset_BT is not None else (None, refs)
    dx_ref, d_first_ref, d_packed_ref, *scratch = refs
    carry_ref, history_ref, x_wide_ref, dy_wide_ref, dx_wide_ref = scratch
    row, step_index = pl.program_id(1), pl.program_id(2)
    valid = plan.valid(plan.chunks - 1 - step_index)
    n = plan.padded

    @pl.when(step_index == 0)
    def _():
        carry_ref[...] = d_last_ref[...]

    @pl.when((row == 0) & (step_index == 0))
    def _():
        d_packed_ref[...] = jnp.zeros_like(d_packed_ref)

    x_wide_ref[...] = x_ref[...].astype(jnp.float32)
    dy_wide_ref[...] = dy_ref[...].astype(jnp.float32)
    decay_re, decay_im, input_coeff, output_re, output_im = plan.coefficients(packed_ref)
    zeros = jnp.zeros_like(decay_re)

    def recompute(token, x_1d, dy_1d, carry):
        before = _kept(reset_ref, token, carry[:2])
        history_ref[token, :n, :], history_ref[token, n:, :] = before
        re, im = multiply((decay_re, decay_im), before)
        re += input_coeff * x_1d
        return (re, im, carry[2] + dy_1d * re, carry[3] - dy_1d * im), ()

    # The cotangents (re, im) of the state behave as those of two real variables.
    def adjoint(token, x_1d, dy_1d, carry):
        d_re, d_im, d_input, d_decay_re, d_decay_im = carry
        d_re += output_re * dy_1d
        d_im -= output_im * dy_1d
        re, im = history_ref[token, :n, :], history_ref[token, n:, :]
        d_input += d_re * x_1d
        d_decay_re += d_re * re + d_im * im
        d_decay_im += d_im * re - d_re * im
        dx_1d = jnp.sum(input_coeff * d_re, 0, keepdims=True)
        d_before = multiply((decay_re, -decay_im), (d_re, d_im))
        d_before = _kept(reset_ref, token, d_before)
        return (*d_before, d_input, d_decay_re, d_decay_im), (dx_1d,)

    inputs = x_wide_ref, dy_wide_ref
    start = (*plan.halves(states_ref), zeros, zeros)
    *_, d_output_re, d_output_im = plan.walk(valid, recompute, start, inputs)
    start = (*plan.halves(carry_ref), zeros, zeros, zeros)
    d_re, d_im, d_input, d_decay_re, d_decay_im = plan.walk(
        valid, adjoint, start, inputs, (dx_wide_ref,), reverse=True
    )
    plan.store_halves(carry_ref, (d_re, d_im))
    dx_ref[...] = dx_wide_ref[...].astype(dx_ref.dtype)
    added = (d_decay_re, d_decay_im, d_input, d_output_re, d_output_im)
    for i, part in enumerate(added):
        d_packed_ref[i * n : (i + 1) * n, :] += part

    @pl.when(step_index == plan.chunks - 1)
    def _():
        plan.store_halves(d_first_ref, (d_re, d_im))
