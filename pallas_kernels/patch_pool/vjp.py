"""Gradients of the patch operations, and the choice of the form that computes each half.

Every form (`xla`, `tpu`, `gpu`) has a forward and a backward function per operation. The backward
functions get what the forward ones kept, of the same shapes whatever the form, so that the platform
can be chosen inside either half. Device kernels know patches of which each byte has one; a window
of W patches is W calls with the rows shifted, whose softmax parts are combined by their
log-sum-exp.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.patch_pool import xla
from pallas_kernels.patch_pool.rows import shifted_rows, sorted_rows

DTYPES = {
    "tpu": ("float32", "bfloat16"),
    "interpret": ("float32", "bfloat16"),
    "gpu": ("float32", "bfloat16", "float16"),
}
KERNELS = tuple(DTYPES)


def check_kernel(operation: str, implementation: str | None, dtype) -> None:
    """Raises NotImplementedError when the named kernel does not serve the dtype."""
    if implementation in KERNELS and str(dtype) not in DTYPES[implementation]:
        raise NotImplementedError(
            f"{operation}: implementation={implementation!r} does not serve dtype {dtype}; it "
            f"serves {', '.join(DTYPES[implementation])}"
        )


def _run(implementation: str | None, dtype, of: Callable[[str], Callable[..., Any]], *args) -> Any:
    """of(form)(*args) for the form "xla", "tpu", "gpu" or "interpret" that serves here."""
    if implementation is not None:
        return of(implementation)(*args)
    kernels = {name: of(name) for name in ("tpu", "gpu") if str(dtype) in DTYPES[name]}
    return dispatch.by_platform(*args, xla=of("xla"), **kernels)


def _kernel(form: str, name: str) -> Callable[..., Any]:
    # The Pallas backends are imported where a kernel is traced.
    module = "gpu" if form == "gpu" else "tpu"
    kernel = getattr(importlib.import_module(f"pallas_kernels.patch_pool.{module}"), name)
    return functools.partial(kernel, interpret=True) if form == "interpret" else kernel


# Pooling.


def patch_pool(x_BTD, ids_BT, num_patches: int, mode: str, implementation: str | None):
    """See `api.patch_pool`."""
    check_kernel("patch_pool", implementation, x_BTD.dtype)
    rows = sorted_rows(ids_BT, num_patches)
    return _pool(x_BTD, rows, num_patches, mode, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _pool(x_BTD, rows, num_patches, mode, implementation):
    return _pool_forward(x_BTD, rows, num_patches, mode, implementation)[0]


def _pool_forward(x_BTD, rows, num_patches, mode, implementation):
    def of(form):
        forward = xla.pool_forward if form == "xla" else _kernel(form, "pool_forward")
        return lambda x_BTD, rows: forward(x_BTD, rows, num_patches, mode)

    out_BPD, weight = _run(implementation, x_BTD.dtype, of, x_BTD, rows)
    kept = (x_BTD, out_BPD) if mode in ("max", "min") else (None, None)
    return out_BPD, (*kept, weight, rows)


def _pool_backward(num_patches, mode, implementation, residuals, g_BPD):
    x_BTD, out_BPD, weight, rows = residuals

    def of(form):
        backward = xla.pool_backward if form == "xla" else _kernel(form, "pool_backward")
        return lambda *args: backward(*args, mode)

    args = (x_BTD, out_BPD, weight, g_BPD, rows)
    return _run(implementation, g_BPD.dtype, of, *args), None


_pool.defvjp(_pool_forward, _pool_backward)


# Attention, in either direction: `side` is "patch" when patches attend, "gather" when bytes do.


def patch_attention(
    q_BPQHK, key_BTHK, value_BTHK, ids_BT, *segments_scale_window, implementation: str | None
):
    """See `api.patch_attention`."""
    arrays = (q_BPQHK, key_BTHK, value_BTHK)
    return _attend(
        "patch", arrays, ids_BT, q_BPQHK.shape[1], *segments_scale_window, implementation
    )


def patch_gather_attention(
    q_BTHK, key_BPQHK, value_BPQHK, ids_BT, *segments_scale_window, implementation: str | None
):
    """See `api.patch_gather_attention`."""
    arrays = (q_BTHK, key_BPQHK, value_BPQHK)
    return _attend(
        "gather", arrays, ids_BT, key_BPQHK.shape[1], *segments_scale_window, implementation
    )


def _attend(
    side,
    arrays,
    ids_BT,
    num_patches,
    segment_ids_BT,
    patch_segment_ids_BP,
    scale,
    window,
    implementation,
):
    check_kernel(f"patch_{side}_attention", implementation, arrays[0].dtype)
    where = (sorted_rows(ids_BT, num_patches), (segment_ids_BT, patch_segment_ids_BP))
    return _attention(*arrays, where, side, num_patches, scale, window, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _attention(q, key, value, where, side, num_patches, scale, window, implementation):
    static = (side, num_patches, scale, window, implementation)
    return _attention_forward(q, key, value, where, *static)[0]


def _attention_forward(q, key, value, where, side, num_patches, scale, window, implementation):
    def of(form):
        if form == "xla":
            forward = getattr(xla, f"{side}_forward")
            return lambda q, key, value, where: forward(q, key, value, *where, scale, window)
        step = _kernel(form, f"{side}_forward")
        return functools.partial(_windowed_forward, step, side, num_patches, scale, window)

    out, lse = _run(implementation, q.dtype, of, q, key, value, where)
    return out, (q, key, value, where, out, lse)


def _attention_backward(side, num_patches, scale, window, implementation, residuals, g):
    def of(form):
        if form == "xla":
            backward = getattr(xla, f"{side}_backward")
            return lambda q, key, value, where, *kept: backward(
                q, key, value, *where, *kept, scale, window
            )
        step = _kernel(form, f"{side}_backward")
        return functools.partial(_windowed_backward, step, side, num_patches, scale, window)

    return *_run(implementation, g.dtype, of, *residuals, g), None


_attention.defvjp(_attention_forward, _attention_backward)


def _shifted(where, side, num_patches, shift):
    """Rows of the patches that meet each byte at one step of the window."""
    rows, segments = where
    # A patch sees the bytes of patches before it: bytes meet patches after their own.
    return shifted_rows(*rows, shift if side == "patch" else -shift, num_patches, *segments)


def _windowed_forward(step, side, num_patches, scale, window, q, key, value, where):
    if window == 1:
        rows = _shifted(where, side, num_patches, 0)
        return step(q, key, value, rows, scale, q.dtype)

    def add(carry, shift):
        rows = _shifted(where, side, num_patches, shift)
        return _combined(carry, step(q, key, value, rows, scale, jnp.float32)), None

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    (out, lse), _ = lax.scan(add, nothing, jnp.arange(window, dtype=jnp.int32))
    return out.astype(q.dtype), lse


def _combined(left, right):
    """Softmax output and log-sum-exp over two sets of which one or both may be empty."""
    (out, lse), (more, more_lse) = left, right
    maximum = jnp.maximum(lse, more_lse)
    finite = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    share, more_share = jnp.exp(lse - finite), jnp.exp(more_lse - finite)
    total = share + more_share
    some = jnp.where(total > 0, total, 1.0)[..., None]
    out = (out * share[..., None] + more * more_share[..., None]) / some
    return out, maximum + jnp.log(jnp.where(total > 0, total, 1.0))


def _windowed_backward(step, side, num_patches, scale, window, q, key, value, where, out, lse, g):
    if window == 1:
        rows = _shifted(where, side, num_patches, 0)
        return tuple(step(q, key, value, rows, out, lse, g, scale, q.dtype))

    def add(sums, shift):
        rows = _shifted(where, side, num_patches, shift)
        more = step(q, key, value, rows, out, lse, g, scale, jnp.float32)
        return jax.tree.map(jnp.add, sums, tuple(more)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, key, value))
    sums, _ = lax.scan(add, zeros, jnp.arange(window, dtype=jnp.int32))
    return tuple(x.astype(q.dtype) for x in sums)
