"""Operations between bytes and the patches they form.

Axis letters: B rows, T bytes, P patches, D width, Q vectors per patch, H heads, K head width.

`patch_ids[B, T]` names the patch of every byte: 0..P-1, never decreasing within a row among the
valid ids: for ids that decrease every form but "reference" gives wrong results, in silence (a check
of values would be an effect, which `jax.export` cannot save). An id of -1 or of P and above marks a
byte that is ignored: its result is 0, and so is its gradient. An empty patch has the result 0 and
the gradient 0. Patches have any length.
Gradients are defined for the floating-point arguments, in reverse mode; derivatives of higher
order by None, "xla" and "reference".

Ignored bytes may hold anything. A NaN or infinity elsewhere reaches only what sees it in "xla" and
"gpu". On TPU (and in "interpret") it may reach other patches and bytes of its tile, whose sums are
products with the tile's 0/1 mask on the matrix unit, in attention of "reference" its whole row.
Extremes on TPU take numbers from 2**127 in magnitude for infinite.

implementation: None (by platform), "reference", "xla", "tpu", "gpu" or "interpret" (the TPU kernel
in the Pallas interpreter). The kernels serve float32 and bfloat16, "gpu" also float16; for other
dtypes they raise NotImplementedError, and None takes the portable form.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.arguments import floating, int32_ids, integers, number, of_shape, whole
from pallas_kernels.patch_pool import reference, vjp

MODES = ("max", "mean", "sum", "min")


def patch_pool(
    x: ArrayLike,
    patch_ids: ArrayLike,
    num_patches: int,
    mode: str = "max",
    implementation: str | None = None,
) -> jax.Array:
    """Pools the bytes of every patch: x[B, T, D], patch_ids[B, T] -> [B, P, D] in x's dtype.

    mode: "max", "mean", "sum" or "min". Sums are taken in float32. Bytes that tie for an extreme
    share its gradient equally, as in `jax.ops.segment_max`.
    implementation: see the module.
    """
    x = floating("x", x, 3)
    num_patches = _positive("num_patches", num_patches)
    patch_ids = _integers("patch_ids", patch_ids, x.shape[:2])
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; allowed are {', '.join(MODES)}")
    return _form("patch_pool", implementation)(x, patch_ids, num_patches, mode)


def patch_attention(
    q: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    patch_ids: ArrayLike,
    *,
    scale: float | None = None,
    window: int = 1,
    segment_ids: ArrayLike | None = None,
    patch_segment_ids: ArrayLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Patches attend to their own bytes: q[B, P, Q, H, K], key and value[B, T, H, K] -> as q.

    With `window` = W, patch p sees the bytes of patches p-W+1..p (time grows with W, memory does
    not). When segment_ids[B, T] and patch_segment_ids[B, P] are given, only bytes of the patch's
    own segment are seen. `scale` multiplies the scores, K**-0.5 if None. Softmax in float32.
    implementation: see the module.
    """
    q, key = floating("q", q, 5), floating("key", key, 4)
    arguments = _attention_arguments(
        (q, key, value),
        (q.shape[0], key.shape[1], *q.shape[3:]),
        (patch_ids, segment_ids, patch_segment_ids),
        (key.shape[1], q.shape[1]),
        scale,
        window,
    )
    return _form("patch_attention", implementation)(*arguments)


def patch_gather_attention(
    q: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    patch_ids: ArrayLike,
    *,
    scale: float | None = None,
    window: int = 1,
    segment_ids: ArrayLike | None = None,
    patch_segment_ids: ArrayLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Bytes attend to the Q vectors of a patch: q[B, T, H, K], key, value[B, P, Q, H, K] -> as q.

    With `window` = W, a byte with patch id p sees the vectors of patches p-W+1..p. When
    segment_ids[B, T] and patch_segment_ids[B, P] are given, only patches of the byte's own
    segment are seen. `scale` multiplies the scores, K**-0.5 if None. Softmax in float32.
    implementation: see the module.
    """
    q, key = floating("q", q, 4), floating("key", key, 5)
    arguments = _attention_arguments(
        (q, key, value),
        (q.shape[0], *key.shape[1:3], *q.shape[2:]),
        (patch_ids, segment_ids, patch_segment_ids),
        (q.shape[1], key.shape[1]),
        scale,
        window,
    )
    return _form("patch_gather_attention", implementation)(*arguments)


def _form(operation: str, implementation):
    """The function of `operation` that `implementation` names."""
    with_gradients = getattr(vjp, operation)
    names = (None, "xla", "tpu", "gpu", "interpret")
    forms = {name: functools.partial(with_gradients, implementation=name) for name in names}
    forms["reference"] = getattr(reference, operation)
    return dispatch.choose(operation, implementation, forms)


def _attention_arguments(arrays, key_shape, ids, sizes, scale, window):
    """The checked arguments of either attention; `sizes` are the numbers of bytes and patches."""
    q, key, value = arrays
    num_bytes, num_patches = sizes
    rows = q.shape[0]
    value = floating("value", value, key.ndim)
    _same("key", key, key_shape, q)
    _same("value", value, key_shape, q)
    patch_ids, segment_ids, patch_segment_ids = ids
    patch_ids = _integers("patch_ids", patch_ids, (rows, num_bytes))
    window = min(_positive("window", window), num_patches)
    scale = q.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if (segment_ids is None) != (patch_segment_ids is None):
        raise ValueError("segment_ids and patch_segment_ids are given both or neither")
    if segment_ids is not None:
        segment_ids = integers("segment_ids", segment_ids)
        patch_segment_ids = integers("patch_segment_ids", patch_segment_ids)
        of_shape("segment_ids", segment_ids, (rows, num_bytes))
        of_shape("patch_segment_ids", patch_segment_ids, (rows, num_patches))
        wide = max(segment_ids.dtype.itemsize, patch_segment_ids.dtype.itemsize) > 4
        segment_ids, patch_segment_ids = (
            x.astype(jnp.int64 if wide else jnp.int32) for x in (segment_ids, patch_segment_ids)
        )
    return q, key, value, patch_ids, segment_ids, patch_segment_ids, scale, window


def _integers(name: str, x, shape: tuple[int, ...]) -> jax.Array:
    return int32_ids(of_shape(name, integers(name, x), shape))


def _same(name: str, x: jax.Array, shape: tuple[int, ...], q: jax.Array) -> None:
    of_shape(name, x, shape, f" beside q {q.shape}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; q's dtype {q.dtype} is needed")


def _positive(name: str, value) -> int:
    value = whole(name, value)
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
