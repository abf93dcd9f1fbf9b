"""Operations between bytes and the patches they form.

Axis letters: B rows, T bytes, P patches, D width, Q vectors per patch, H heads, K head width.

`patch_ids[B, T]` names the patch of every byte: 0..P-1, never decreasing within a row among the
valid ids. An id of -1 or of P and above marks a byte that is ignored: its result is 0, and so is
its gradient. An empty patch has the result 0 and the gradient 0. Patches have any length.
Gradients are defined for the floating-point arguments, in reverse mode.
"""

import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch
from pallas_kernels.patch_pool import reference, xla

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
    implementation: None, "reference" or "xla".
    """
    x = _floating("x", x, 3)
    patch_ids = _integers("patch_ids", patch_ids, x.shape[:2])
    num_patches = _positive("num_patches", num_patches)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; allowed are {', '.join(MODES)}")
    forms = {"reference": reference.patch_pool, "xla": xla.patch_pool}
    return dispatch.choose("patch_pool", implementation, forms)(x, patch_ids, num_patches, mode)


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
    implementation: None, "reference" or "xla".
    """
    q = _floating("q", q, 5)
    rows, num_patches, _, heads, width = q.shape
    key = _floating("key", key, 4)
    bytes_shape = (rows, key.shape[1], heads, width)
    _same("key", key, bytes_shape, q)
    value = _floating("value", value, 4)
    _same("value", value, bytes_shape, q)
    return _attention(
        "patch_attention",
        {"reference": reference.patch_attention, "xla": xla.patch_attention},
        implementation,
        (q, key, value),
        patch_ids,
        (rows, key.shape[1], num_patches, width),
        scale,
        window,
        (segment_ids, patch_segment_ids),
    )


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
    implementation: None, "reference" or "xla".
    """
    q = _floating("q", q, 4)
    rows, num_bytes, heads, width = q.shape
    key = _floating("key", key, 5)
    patches_shape = (rows, *key.shape[1:3], heads, width)
    _same("key", key, patches_shape, q)
    value = _floating("value", value, 5)
    _same("value", value, patches_shape, q)
    return _attention(
        "patch_gather_attention",
        {"reference": reference.patch_gather_attention, "xla": xla.patch_gather_attention},
        implementation,
        (q, key, value),
        patch_ids,
        (rows, num_bytes, key.shape[1], width),
        scale,
        window,
        (segment_ids, patch_segment_ids),
    )


def _attention(operation, forms, implementation, arrays, patch_ids, sizes, scale, window, segments):
    rows, num_bytes, num_patches, width = sizes
    form = dispatch.choose(operation, implementation, forms)
    patch_ids = _integers("patch_ids", patch_ids, (rows, num_bytes))
    window = min(_positive("window", window), num_patches)
    if scale is None:
        scale = width**-0.5
    scale = float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    segment_ids, patch_segment_ids = segments
    if (segment_ids is None) != (patch_segment_ids is None):
        raise ValueError("segment_ids and patch_segment_ids are given both or neither")
    if segment_ids is not None:
        segment_ids = _integers("segment_ids", segment_ids, (rows, num_bytes))
        patch_segment_ids = _integers("patch_segment_ids", patch_segment_ids, (rows, num_patches))
    return form(*arrays, patch_ids, segment_ids, patch_segment_ids, scale, window)


def _floating(name: str, x: ArrayLike, rank: int) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; a floating-point dtype is needed")
    if x.ndim != rank:
        raise ValueError(f"{name} has shape {x.shape}; {rank} axes are needed")
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}; every axis must be at least 1")
    return x


def _integers(name: str, x: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {x.dtype}; an integer dtype is needed")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; {shape} is needed")
    return x.astype(jnp.int32)


def _same(name: str, x: jax.Array, shape: tuple[int, ...], q: jax.Array) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; {shape} is needed beside q {q.shape}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}; q's dtype {q.dtype} is needed")


def _positive(name: str, value) -> int:
    try:
        value = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} must be an integer") from error
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
