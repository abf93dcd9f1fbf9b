"""The recurrence as one long convolution by Fourier transforms, to compare with.

Causal only up to rounding: a huge later token disturbs earlier outputs by about 1e-7 of its size.
"""

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
    """See `api.cema_scan`; without resets, which are no convolution."""
    if reset_BT is not None:
        raise NotImplementedError(
            "cema_scan: implementation='fft' cannot reset the state: with resets the operation is "
            "no convolution; use None or 'xla'"
        )
    length = x_BTD.shape[1]
    decay = coefficients.decay_re, coefficients.decay_im
    output = coefficients.output_re, coefficients.output_im
    x_BTD_wide = x_BTD.astype(decay[0].dtype)
    input_gain = tuple(coefficients.input_coeff * part for part in output)
    y_BTD = _convolve(x_BTD_wide, _power_sums(input_gain, decay, length))

    # What the incoming state adds: Re(output * decay**(t + 1) * state), per row.
    one_step = tuple(part[None] for part in multiply(output, decay))
    gain_BDN = multiply(one_step, state_BDN)
    y_BTD += jax.vmap(lambda *gain: _power_sums(gain, decay, length))(*gain_BDN).swapaxes(1, 2)
    return y_BTD.astype(x_BTD.dtype), _final_state(x_BTD_wide, coefficients, state_BDN)


def _convolve(x_BTD, k_DT):
    length = x_BTD.shape[1]
    size = 1 << (2 * length - 1).bit_length()
    x_BDF = jnp.fft.rfft(x_BTD.swapaxes(1, 2), size)
    return jnp.fft.irfft(x_BDF * jnp.fft.rfft(k_DT, size)[None], size)[..., :length].swapaxes(1, 2)


def _powers(base: Complex, count: int) -> Complex:
    """base**0 .. base**(count - 1) on a new last axis."""
    one = jnp.ones_like(base[0]), jnp.zeros_like(base[0])
    powers = lax.scan(lambda power, _: (multiply(power, base), power), one, length=count)[1]
    return tuple(jnp.moveaxis(part, 0, -1) for part in powers)


def _factored(decay: Complex, length: int) -> tuple[Complex, Complex]:
    """The powers of decay as products of two factors, about the square root of length each."""
    fine = 1 << ((length - 1).bit_length() + 1) // 2
    first = _powers(decay, fine)
    step = multiply(tuple(part[..., -1] for part in first), decay)
    return first, _powers(step, -(-length // fine))


def _power_sums(gain_DN: Complex, decay_DN: Complex, length: int) -> jax.Array:
    """Re of the sum over n of gain * decay**t for t < length, as [D, T], without a [D, N, T]."""
    fine, coarse = _factored(decay_DN, length)
    coarse = multiply(tuple(part[..., None] for part in gain_DN), coarse)
    sums = jnp.einsum("dna,dnf->daf", coarse[0], fine[0], precision="highest")
    sums -= jnp.einsum("dna,dnf->daf", coarse[1], fine[1], precision="highest")
    return sums.reshape(sums.shape[0], -1)[:, :length]


def _final_state(x_BTD, coefficients, state_BDN):
    """decay**T * state + the sum of input_coeff * decay**(T - 1 - t) * x[t]."""
    rows, length, width = x_BTD.shape
    decay = coefficients.decay_re, coefficients.decay_im
    fine, coarse = _factored(decay, length)
    sizes = coarse[0].shape[-1], fine[0].shape[-1]
    x_BTD = jnp.pad(x_BTD[:, ::-1], ((0, 0), (0, sizes[0] * sizes[1] - length), (0, 0)))
    x_BAFD = x_BTD.reshape(rows, *sizes, width)
    # The powers of x's own coarse step come last, so that no [B, T, D, N] is formed.
    parts = tuple(jnp.einsum("bafd,dnf->badn", x_BAFD, p, precision="highest") for p in fine)
    coarse_ADN = tuple(jnp.moveaxis(part, -1, 0)[None] for part in coarse)
    inner = tuple(part.sum(1) for part in multiply(coarse_ADN, parts))
    high, low = divmod(length - 1, sizes[1])
    last = multiply(tuple(part[..., high] for part in coarse), tuple(p[..., low] for p in fine))
    carried = multiply(tuple(part[None] for part in multiply(last, decay)), state_BDN)
    added = tuple(coefficients.input_coeff[None] * part for part in inner)
    return carried[0] + added[0], carried[1] + added[1]
