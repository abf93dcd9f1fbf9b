"""The GPU kernels (Pallas Triton): segments of time in parallel, the state in registers.

A program serves one row, one segment of SEGMENT tokens and one block of channels, a channel per
thread; the N complex numbers of state are unrolled, so that no sum crosses threads. Three phases,
as the state before a segment is only known after those before it:

1. every segment alone, from the state 0, for the state at its end;
2. a short loop over segments, in XLA, for the true state before each;
3. every segment once more from its true state, for the outputs.

The backward pass does the same in reverse with the adjoint recurrence. Instead of a history of
states, which registers could not hold, its third phase runs the derivative of the state by the
decay, s[t] = decay * s[t - 1] + h[t - 1], along with the state itself.
Neither time nor correctness on a GPU has been measured: the kernels lower, and run interpreted.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.cema_scan.reference import Coefficients, Complex, multiply

SEGMENT = 256
BLOCK = 64
NUM_WARPS = 2
MAX_SIZE = 32
"""Compiled for 48 numbers of state, every kernel spills its registers, after minutes."""


def forward(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
    *,
    keep: bool,
    interpret: bool = False,
) -> tuple[jax.Array, Complex, jax.Array | None]:
    """Outputs, final state, and with `keep` the states [B, segments, 2N, D] before each segment."""
    plan = _Plan(x_BTD, coefficients, reset_BT, interpret)
    packed, first = plan.packed(coefficients), plan.join(state_BDN)
    if plan.segments == 1:
        states = first[:, None]
    else:
        (ends,) = plan.call(_ends_kernel, "cema_scan_ends", (packed, x_BTD), [plan.per_segment(2)])
        states = plan.combine(packed, first, ends)[0]
    y_BTD, final = plan.call(
        _outputs_kernel,
        "cema_scan_outputs",
        (packed, x_BTD, states),
        [
            jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype),
            jax.ShapeDtypeStruct(first.shape, "float32"),
        ],
    )
    return y_BTD, plan.split(final), states if keep else None


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
    plan = _Plan(x_BTD, coefficients, reset_BT, interpret)
    packed, d_last = plan.packed(coefficients), plan.join(d_state_BDN)
    (starts,) = plan.call(
        _adjoint_starts_kernel, "cema_scan_adjoint", (packed, dy_BTD), [plan.per_segment(2)]
    )
    d_ends, d_first = plan.combine(packed, d_last, starts, reverse=True)
    dx_BTD, d_packed = plan.call(
        _gradients_kernel,
        "cema_scan_gradients",
        (packed, x_BTD, dy_BTD, states, d_ends),
        [jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype), plan.per_segment(5)],
    )
    return dx_BTD, plan.unpacked(d_packed.sum((0, 1))), plan.split(d_first)


class _Plan:
    """Sizes and layouts of one call: N before D, real parts before imaginary ones."""

    def __init__(self, x_BTD, coefficients, reset_BT, interpret):
        if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
            raise NotImplementedError(
                f"cema_scan: the GPU kernel serves float32 and bfloat16, x has dtype {x_BTD.dtype}"
            )
        self.rows, self.length, self.width = x_BTD.shape
        self.size = coefficients.decay_re.shape[1]
        if self.size > MAX_SIZE:
            raise NotImplementedError(
                f"cema_scan: the GPU kernel keeps up to {MAX_SIZE} complex numbers of state per "
                f"channel in registers, here are {self.size}; use 'xla'"
            )
        self.segments = pl.cdiv(self.length, SEGMENT)
        self.reset_BT, self.interpret = reset_BT, interpret

    def packed(self, coefficients: Coefficients) -> jax.Array:
        return jnp.concatenate([c.T for c in coefficients])

    def unpacked(self, packed: jax.Array) -> Coefficients:
        return Coefficients(*(part.T for part in packed.reshape(5, self.size, self.width)))

    def join(self, state_BDN: Complex) -> jax.Array:
        return jnp.concatenate([part.swapaxes(1, 2) for part in state_BDN], 1)

    def split(self, state: jax.Array) -> Complex:
        return state[:, : self.size].swapaxes(1, 2), state[:, self.size :].swapaxes(1, 2)

    def per_segment(self, parts: int) -> jax.ShapeDtypeStruct:
        shape = (self.rows, self.segments, parts * self.size, self.width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(self, kernel, name, operands, results):
        """Runs kernel(program, resets or None, *operands, *results) for every program."""

        def body(*refs):
            reset_ref = None
            if self.reset_BT is not None:
                reset_ref, refs = refs[0], refs[1:]
            kernel(_Program(self, reset_ref), *refs)

        if self.reset_BT is not None:
            operands = (self.reset_BT.astype(jnp.int32), *operands)
        return pl.pallas_call(
            body,
            grid=(pl.cdiv(self.width, BLOCK), self.segments, self.rows),
            out_shape=results,
            compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS),
            name=name,
            interpret=self.interpret,
        )(*operands)

    def combine(self, packed, first, local, reverse=False):
        """The states at the segments' edges: before each, and after all (reverse: mirrored).

        local[B, segments, 2N, D] are the states that segments reach from 0. In reverse these are
        cotangents, which decay by the conjugate.
        """
        n = self.size
        decay = packed[:n], -packed[n : 2 * n] if reverse else packed[n : 2 * n]
        rest = self.length - (self.segments - 1) * SEGMENT
        lengths = [SEGMENT] * (self.segments - 1) + [rest]
        across = [_power(decay, length) for length in sorted(set(lengths))]
        across = tuple(jnp.stack(parts) for parts in zip(*across, strict=True))
        which = jnp.array([sorted(set(lengths)).index(length) for length in lengths])

        def step(state, inputs):
            local_BND, which, kept_B = inputs
            factor = tuple(part[which][None] for part in across)
            carried = jnp.concatenate(multiply(factor, (state[:, :n], state[:, n:])), 1)
            if kept_B is not None:
                carried = jnp.where(kept_B[:, None, None], carried, 0.0)
            return carried + local_BND, state

        inputs = (local.swapaxes(0, 1), which, self._without_reset())
        last, before = lax.scan(step, first, inputs, reverse=reverse)
        return before.swapaxes(0, 1), last

    def _without_reset(self):
        """Which segments hold no reset: [segments, B]."""
        if self.reset_BT is None:
            return None
        rest = self.segments * SEGMENT - self.length
        reset = jnp.pad(self.reset_BT, ((0, 0), (0, rest)))
        return ~reset.reshape(self.rows, self.segments, SEGMENT).any(2).T


def _power(base: Complex, exponent: int) -> Complex:
    """base**exponent for an exponent of at least 1, by squaring."""
    result = None
    while exponent:
        if exponent & 1:
            result = base if result is None else multiply(result, base)
        base, exponent = multiply(base, base), exponent >> 1
    return result


# Inside a program. A state is a pair of lists, one array [BLOCK] of channels for each of the N.


class _Program:
    """Where one program works, and how it reads and writes there."""

    def __init__(self, plan, reset_ref):
        self.size, self.reset_ref = plan.size, reset_ref
        self.segment, self.row = pl.program_id(1), pl.program_id(2)
        self.is_last = self.segment == plan.segments - 1
        self.first_token = self.segment * SEGMENT
        self.valid = jnp.minimum(SEGMENT, plan.length - self.first_token)
        self.channels = pl.program_id(0) * BLOCK + jnp.arange(BLOCK)
        self.inside = self.channels < plan.width

    def load(self, ref, *index):
        return plgpu.load(ref.at[(*index, self.channels)], mask=self.inside, other=0.0)

    def store(self, ref, value, *index):
        plgpu.store(ref.at[(*index, self.channels)], value.astype(ref.dtype), mask=self.inside)

    def load_parts(self, ref, count, *index):
        """`count` lists of N arrays."""
        n = self.size
        return [[self.load(ref, *index, part * n + i) for i in range(n)] for part in range(count)]

    def store_parts(self, ref, parts, *index):
        for i, value in enumerate(value for part in parts for value in part):
            self.store(ref, value, *index, i)

    def zeros(self, count):
        return [[jnp.zeros(BLOCK, jnp.float32)] * self.size for _ in range(count)]

    def token(self, ref, t):
        return self.load(ref, self.row, self.first_token + t).astype(jnp.float32)

    def put_token(self, ref, t, value):
        self.store(ref, value, self.row, self.first_token + t)

    def kept(self, t, parts):
        """The state, 0 at the first token of a document."""
        if self.reset_ref is None:
            return parts
        reset = self.reset_ref[self.row, self.first_token + t] != 0
        return [[jnp.where(reset, 0.0, value) for value in part] for part in parts]

    def walk(self, step, carry, reverse=False):
        """Carries step(token, carry) over the tokens of the segment."""

        def body(i, carry):
            return step(self.valid - 1 - i if reverse else i, carry)

        return lax.fori_loop(0, self.valid, body, carry)


def _advance(decay, input_coeff, state, x):
    """The state after one more token."""
    re, im = [], []
    for a_re, a_im, p, h_re, h_im in zip(*decay, input_coeff, *state, strict=True):
        h_re, h_im = multiply((a_re, a_im), (h_re, h_im))
        re.append(h_re + p * x)
        im.append(h_im)
    return [re, im]


def _receive(output, d_state, dy):
    """The cotangent of the state with what its own output adds."""
    d_re = [d + o * dy for d, o in zip(d_state[0], output[0], strict=True)]
    d_im = [d - o * dy for d, o in zip(d_state[1], output[1], strict=True)]
    return [d_re, d_im]


def _retreat(decay, d_state):
    """The cotangent of the state one token earlier."""
    pairs = zip(*decay, *d_state, strict=True)
    moved = [multiply((a_re, -a_im), (d_re, d_im)) for a_re, a_im, d_re, d_im in pairs]
    return [[re for re, _ in moved], [im for _, im in moved]]


def _total(terms):
    return functools.reduce(jnp.add, terms)


def _ends_kernel(program, packed_ref, x_ref, ends_ref):
    *decay, input_coeff = program.load_parts(packed_ref, 3)

    def step(t, state):
        return _advance(decay, input_coeff, program.kept(t, state), program.token(x_ref, t))

    end = program.walk(step, program.zeros(2))
    program.store_parts(ends_ref, end, program.row, program.segment)


def _outputs_kernel(program, packed_ref, x_ref, states_ref, y_ref, final_ref):
    *decay, input_coeff, output_re, output_im = program.load_parts(packed_ref, 5)

    def step(t, state):
        state = _advance(decay, input_coeff, program.kept(t, state), program.token(x_ref, t))
        pairs = zip(output_re, output_im, *state, strict=True)
        y = _total(o_re * re - o_im * im for o_re, o_im, re, im in pairs)
        program.put_token(y_ref, t, y)
        return state

    start = program.load_parts(states_ref, 2, program.row, program.segment)
    end = program.walk(step, start)

    @pl.when(program.is_last)
    def _():
        program.store_parts(final_ref, end, program.row)


def _adjoint_starts_kernel(program, packed_ref, dy_ref, starts_ref):
    *decay, _, output_re, output_im = program.load_parts(packed_ref, 5)

    def step(t, d_state):
        d_state = _receive((output_re, output_im), d_state, program.token(dy_ref, t))
        return program.kept(t, _retreat(decay, d_state))

    start = program.walk(step, program.zeros(2), reverse=True)
    program.store_parts(starts_ref, start, program.row, program.segment)


def _gradients_kernel(
    program, packed_ref, x_ref, dy_ref, states_ref, d_ends_ref, dx_ref, d_packed_ref
):
    *decay, input_coeff, output_re, output_im = program.load_parts(packed_ref, 5)
    where = program.row, program.segment

    def sensitivities(t, carry):
        """Sums of dy times the state, and times its derivative by the decay."""
        state, slope, sum_state, sum_slope = carry
        x, dy = program.token(x_ref, t), program.token(dy_ref, t)
        state, slope = program.kept(t, state), program.kept(t, slope)
        moved = zip(*decay, *slope, *state, strict=True)
        moved = [
            (re + h_re, im + h_im)
            for a_re, a_im, s_re, s_im, h_re, h_im in moved
            for re, im in [multiply((a_re, a_im), (s_re, s_im))]
        ]
        slope = [[re for re, _ in moved], [im for _, im in moved]]
        state = _advance(decay, input_coeff, state, x)
        add = lambda total, new: [  # noqa: E731
            [a + dy * b for a, b in zip(*pair, strict=True)]
            for pair in zip(total, new, strict=True)
        ]
        return state, slope, add(sum_state, state), add(sum_slope, slope)

    start = program.load_parts(states_ref, 2, *where)
    carry = (start, program.zeros(2), program.zeros(2), program.zeros(2))
    _, slope, sum_state, sum_slope = program.walk(sensitivities, carry)
    d_end = program.load_parts(d_ends_ref, 2, *where)
    # The cotangent (re, im) stands for the linear form re - i im.
    through_y = [
        multiply(*pair)
        for pair in zip(_pairs(output_re, output_im), _pairs(*sum_slope), strict=True)
    ]
    onward = zip(*d_end, _pairs(*slope), strict=True)
    through_end = [multiply((d_re, -d_im), s) for d_re, d_im, s in onward]
    d_decay = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(through_y, through_end, strict=True)]

    def adjoint(t, carry):
        d_state, d_input = carry
        x, dy = program.token(x_ref, t), program.token(dy_ref, t)
        d_state = _receive((output_re, output_im), d_state, dy)
        dx = _total(p * d_re for p, d_re in zip(input_coeff, d_state[0], strict=True))
        program.put_token(dx_ref, t, dx)
        d_input = [total + d_re * x for total, d_re in zip(d_input, d_state[0], strict=True)]
        return program.kept(t, _retreat(decay, d_state)), d_input

    (zeros,) = program.zeros(1)
    _, d_input = program.walk(adjoint, (d_end, zeros), reverse=True)
    parts = (
        [re for re, _ in d_decay],
        [-im for _, im in d_decay],
        d_input,
        sum_state[0],
        [-total for total in sum_state[1]],
    )
    program.store_parts(d_packed_ref, parts, *where)


def _pairs(re, im):
    return list(zip(re, im, strict=True))
