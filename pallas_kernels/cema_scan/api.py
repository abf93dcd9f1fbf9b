"""The complex exponential moving average (CEMA) over time.

Axis letters: B rows, T tokens, D channels, N complex numbers of state per channel.

Every channel of every row carries N complex numbers h, each with its own decay:

    h[t] = decay * h[t - 1] + input_coeff * x[t],    y[t] = sum over N of Re(output * h[t])

This is the recurrence of Megalodon (arXiv 2404.08801, section 3.1), without its skip connection,
and of other diagonal state-space models. Complex numbers are pairs of real arrays everywhere. The
state is kept and summed in float32 (float64 if x is), whatever the dtype of x.
Gradients are defined for every floating-point argument, the state included, in reverse mode.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.arguments import array, floating, of_shape
from pallas_kernels.cema_scan import associative, fft, reference, vjp
from pallas_kernels.cema_scan.reference import Coefficients

NAMES = (None, "xla", "tpu", "gpu", "interpret")
FORMS = {
    **{name: functools.partial(vjp.cema_scan, name) for name in NAMES},
    "reference": reference.cema_scan,
    "fft": fft.cema_scan,
    "associative": associative.cema_scan,
}


def cema_scan(
    x: ArrayLike,
    decay_re: ArrayLike,
    decay_im: ArrayLike,
    input_coeff: ArrayLike,
    output_re: ArrayLike,
    output_im: ArrayLike,
    state: tuple[ArrayLike, ...] | None = None,
    reset: ArrayLike | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Runs the recurrence over x[B, T, D]: y[B, T, D] in x's dtype, and the state after it.

    decay_*, input_coeff, output_*: [D, N]. state: real and imaginary part, [B, D, N] each, before
    the first token; None is 0. reset[B, T], boolean: true where a document starts, so that
    the state before that token counts as 0 and nothing crosses, forward or backward.
    A sequence cut anywhere and continued with the returned state gives the same outputs.
    implementation: None, "reference", "xla", "tpu", "gpu", "interpret", and to compare with "fft"
    (no resets) and "associative".
    """
    x = _floating("x", x, 3)
    rows, length, width = x.shape
    decay_re = _floating("decay_re", decay_re, 2)
    shape = (width, decay_re.shape[1])
    given = {
        "decay_re": decay_re,
        "decay_im": decay_im,
        "input_coeff": input_coeff,
        "output_re": output_re,
        "output_im": output_im,
    }
    dtype = jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    coefficients = Coefficients(*(_shaped(k, v, shape, dtype) for k, v in given.items()))
    state_shape = (rows, *shape)
    if state is None:
        state = (jnp.zeros(state_shape, dtype),) * 2
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state={state!r:.40} must be a pair of arrays (re, im) or None")
    state = tuple(_shaped(f"state[{i}]", s, state_shape, dtype) for i, s in enumerate(state))
    if reset is not None:
        reset = array("reset", reset)
        if reset.dtype != jnp.bool_:
            raise TypeError(f"reset has dtype {reset.dtype}; bool is needed")
        of_shape("reset", reset, (rows, length))
    form = dispatch.choose("cema_scan", implementation, FORMS)
    return form(x, coefficients, state, reset)


def _floating(name: str, x, rank: int) -> jax.Array:
    x = floating(name, x, rank)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise TypeError(f"{name} has dtype {x.dtype}; float32, bfloat16 or float64 is needed")
    return x


def _shaped(name: str, x, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return of_shape(name, _floating(name, x, len(shape)), shape).astype(dtype)
