"""The recurrence by `jax.lax.associative_scan`, to compare with: arrays of B, T, D and N axes."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cema_scan.reference import Coefficients, Complex, multiply


def cema_scan(
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
) -> tuple[jax.Array, Complex]:
    """See `api.cema_scan`."""
    decay_re, decay_im, input_coeff, output_re, output_im = (c[None, None] for c in coefficients)
    x_BTD1 = x_BTD[..., None].astype(decay_re.dtype)
    full = *x_BTD.shape, decay_re.shape[-1]
    kept = 1.0 if reset_BT is None else jnp.where(reset_BT, 0.0, 1.0)[..., None, None]
    factor = tuple(jnp.broadcast_to(d * kept, full) for d in (decay_re, decay_im))
    re, im = multiply(tuple(f[:, 0] for f in factor), state_BDN)
    added_re = (input_coeff * x_BTD1).at[:, 0].add(re)
    added_im = jnp.zeros(full, re.dtype).at[:, 0].add(im)

    def combine(left, right):
        re, im = multiply(right[:2], left[2:])
        return *multiply(right[:2], left[:2]), re + right[2], im + right[3]

    re, im = lax.associative_scan(combine, (*factor, added_re, added_im), axis=1)[2:]
    y_BTD = (output_re * re - output_im * im).sum(3)
    return y_BTD.astype(x_BTD.dtype), (re[:, -1], im[:, -1])
