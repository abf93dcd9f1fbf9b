"""The differentiable operation over its fast forms, which share what they keep for gradients.

Kept are the arguments and the states [B, segments, 2N, D] before every SEGMENT tokens; everything
between them is computed again. That is 2N / SEGMENT numbers per element of x.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cema_scan import xla
from pallas_kernels.cema_scan.reference import Coefficients, Complex


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cema_scan(
    implementation: str | None,
    x_BTD: jax.Array,
    coefficients: Coefficients,
    state_BDN: Complex,
    reset_BT: jax.Array | None,
) -> tuple[jax.Array, Complex]:
    """See `api.cema_scan`; implementation: None, "xla", "tpu", "gpu" or "interpret"."""
    arguments = x_BTD, coefficients, state_BDN, reset_BT
    return _run(implementation, "forward", *arguments, keep=False)[:2]


def _forward(implementation, x_BTD, coefficients, state_BDN, reset_BT):
    arguments = x_BTD, coefficients, state_BDN, reset_BT
    y_BTD, state, states = _run(implementation, "forward", *arguments, keep=True)
    return (y_BTD, state), (x_BTD, coefficients, reset_BT, states)


def _backward(implementation, residuals, cotangents):
    return *_run(implementation, "backward", *residuals, *cotangents), None


cema_scan.defvjp(_forward, _backward)


def _run(implementation, direction, x_BTD, *others, **options):
    """One direction of the named form, or for None of the form of the platform compiled for."""
    if implementation is not None:
        return _form(implementation, direction, options)(x_BTD, *others)
    size = others[0].decay_re.shape[1]
    names = ["xla", *(name for name in ("tpu", "gpu") if _serves(name, x_BTD.dtype, size))]
    forms = {name: _form(name, direction, options) for name in names}
    return dispatch.by_platform(x_BTD, *others, **forms)


def _serves(name, dtype, size) -> bool:
    return dtype != jnp.float64 and size <= _kernels(name).MAX_SIZE


def _kernels(name):
    """The module of a kernel, imported when it is needed: Pallas takes time to load."""
    if name == "gpu":
        from pallas_kernels.cema_scan import gpu as kernels
    else:
        from pallas_kernels.cema_scan import tpu as kernels
    return kernels


def _form(name, direction, options):
    if name == "xla":
        return functools.partial(getattr(xla, direction), **options)
    if name != "gpu":
        options["interpret"] = name == "interpret"
    return functools.partial(getattr(_kernels(name), direction), **options)
