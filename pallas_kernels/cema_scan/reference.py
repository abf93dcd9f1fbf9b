"""The recurrence, one token at a time: plain, differentiable, the truth for tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A complex number is a pair of real arrays (re, im), as Pallas and collectives want it.
Complex = tuple[jax.Array, jax.Array]


class Coefficients(NamedTuple):
    """The coefficients [D, N] of `api.cema_scan`, in the dtype of the accumulation."""

    decay_re: jax.Array
    decay_im: jax.Array
    input_coeff: jax.Array
    output_re: jax.Array
    output_im: jax.Array


def cema_scan(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
) -> tuple[jax.Array, Complex]:
    """See `api.cema_scan`. The state lies as [B, N, D] inside the loop: channels are contiguous."""
    decay_re, decay_im, input_coeff, output_re, output_im = (c.T for c in coefficients)

    def step(state, inputs):
        x_BD, reset_B = inputs
        re, im = state
        if reset_B is not None:
            re, im = (jnp.where(reset_B[:, None, None], 0.0, part) for part in state)
        x_B1D = x_BD.astype(re.dtype)[:, None]
        re, im = multiply((decay_re[None], decay_im[None]), (re, im))
        re = re + input_coeff[None] * x_B1D
        y_BD = (output_re[None] * re - output_im[None] * im).sum(1)
        return (re, im), y_BD.astype(x_BD.dtype)

    inputs = (x_BTD.swapaxes(0, 1), None if reset_BT is None else reset_BT.T)
    state = tuple(part.swapaxes(1, 2) for part in state_BDN)
    state, y_TBD = lax.scan(step, state, inputs)
    return y_TBD.swapaxes(0, 1), tuple(part.swapaxes(1, 2) for part in state)


def multiply(a: Complex, b: Complex) -> Complex:
    """The product of two complex arrays."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
