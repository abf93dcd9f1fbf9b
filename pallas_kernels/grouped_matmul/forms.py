"""The implementations by name, and the one that fits the platform."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import ragged_dot, reference, xla
from pallas_kernels.grouped_matmul.vjp import Form

KERNEL_DTYPES = {"tpu": ("float32", "bfloat16"), "gpu": ("float32", "bfloat16", "float16")}


def _kernel(module: str, operation: str, **options):
    """`operation` of a kernel module, imported when it is called: Pallas takes time to load."""

    def call(*args):
        if module == "tpu":
            from pallas_kernels.grouped_matmul import tpu as kernels
        else:
            from pallas_kernels.grouped_matmul import gpu as kernels
        return getattr(kernels, operation)(*args, **options)

    return call


def _kernels(module: str, **options) -> Form:
    return Form(*(_kernel(module, name, **options) for name in ("gmm", "tgmm", "swiglu")))


def _by_platform(operation: str):
    """The kernel of the platform a program is compiled for, `xla` where none serves."""

    def call(lhs, other, metadata, *options) -> jax.Array:
        out_dtype, tiling = options[-2:]
        dtypes = {str(lhs.dtype), str(jnp.dtype(out_dtype))}
        names = [
            name
            for name, served in KERNEL_DTYPES.items()
            if dtypes <= set(served)
            and (name == "tpu" or _gpu_serves(lhs, other, metadata, tiling))
        ]
        forms = {name: _bound(getattr(FORMS[name], operation), options) for name in ("xla", *names)}
        return dispatch.by_platform(lhs, other, metadata, **forms)

    return call


def _bound(product, options):
    return lambda lhs, other, metadata: product(lhs, other, metadata, *options)


def _gpu_serves(lhs, other, metadata, tiling) -> bool:
    powers = (metadata.tile_rows, *(tiling or ())[1:])
    if any(size < 16 or size & (size - 1) for size in powers):
        return False
    result = metadata.num_local_groups * lhs.shape[1] * other.shape[-1]
    return max(lhs.size, other.size, result) < 2**31


FORMS = {
    "reference": Form(reference.gmm, reference.tgmm),
    "xla": Form(xla.gmm, xla.tgmm),
    "ragged_dot": Form(ragged_dot.gmm, ragged_dot.tgmm),
    "tpu": _kernels("tpu"),
    "gpu": _kernels("gpu"),
    "interpret": _kernels("tpu", interpret=True),
    "interpret_gpu": _kernels("gpu", interpret=True),
}
FORMS[None] = Form(*map(_by_platform, ("gmm", "tgmm", "multiply_and_gate")))
