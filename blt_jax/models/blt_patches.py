"""Operations of the Byte Latent Transformer between bytes and patches, on one device or many.

The layout of patches in a row, pooling and the two cross-attentions (sections 3.2.2, 3.3). On a
mesh every device works on its own rows, heads and, where rows are cut into pieces of whole
patches (`layers.row_pieces`), its own pieces: only a byte before the first complete patch of its
piece needs something from elsewhere, the last patch of the piece before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from blt_jax.dist.sharding import ShardingRules, axes_of, parts_of, shard_by_names
from blt_jax.layers import row_pieces
from blt_jax.models import blt_patching
from blt_jax.models.blt_config import BLTConfig, Pooling

_BYTES, _PATCHES = ("batch", "length"), ("batch", "patches")


class PatchLayout(NamedTuple):
    """Ids of bytes and documents of patches, all int32.

    encoder_ids, decoder_ids: [B, N], see blt_patching; segment_ids [B, P]: document of a patch's
    first byte, 0 for unused patches; positions [B, P]: patch index inside its document.
    """

    encoder_ids: Any
    decoder_ids: Any
    segment_ids: Any
    positions: Any


def patch_layout(
    starts: Bool[Array, "B M"], segment_ids: Int[Array, "B N"], num_patches: int, pieces: int = 1
) -> PatchLayout:
    """Patches of bytes, documents and positions of patches (section 3.1: block-causal mask)."""
    encoder_ids = blt_patching.encoder_ids(starts, segment_ids, pieces, num_patches)
    first = starts[:, :-1] & (encoder_ids >= 0)
    rows = lax.broadcasted_iota(jnp.int32, encoder_ids.shape, 0)
    place = jnp.where(first, encoder_ids, num_patches)
    patch_segments = jnp.zeros((starts.shape[0], num_patches), jnp.int32)
    patch_segments = patch_segments.at[rows, place].set(segment_ids, mode="drop")
    return PatchLayout(
        encoder_ids=encoder_ids,
        decoder_ids=blt_patching.decoder_ids(starts, segment_ids, pieces, num_patches),
        segment_ids=patch_segments,
        positions=blt_patching.patch_positions(patch_segments),
    )


def check_pieces(config: BLTConfig, length: int, sharding: ShardingRules) -> None:
    """ValueError unless the mesh divides rows of `length` bytes between whole patches."""
    devices = parts_of("length", sharding)
    if devices != parts_of("patches", sharding):
        raise ValueError(
            f"sharding: length={sharding.length} and patches={sharding.patches} must divide rows "
            "over the same devices"
        )
    if devices > 1 or config.row_pieces > 1:
        row_pieces.check_divisible(length, config.row_pieces, devices)


def _own_ids(ids: jax.Array, num_patches: int, sharding: ShardingRules) -> jax.Array:
    """Ids among a device's own patches; -1 and num_patches for those of other devices."""
    axes = axes_of("patches", sharding)
    if not axes:
        return ids
    own = ids - lax.axis_index(axes) * num_patches
    return jnp.clip(own, -1, num_patches)


def first_bytes(
    x: Float[Array, "B N D"], ids: Int[Array, "B N"], num_patches: int, count: int
) -> Float[Array, "B P E"]:
    """The first `count` bytes of every patch side by side, zeros where a patch is shorter."""
    B, N, D = x.shape
    index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
    rows = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    place = jnp.where(ids < 0, num_patches, ids)
    begin = jnp.full((B, num_patches), N, jnp.int32).at[rows, place].min(index, mode="drop")
    index_BPC = begin[:, :, None] + jnp.arange(count, dtype=jnp.int32)[None, None, :]
    flat = jnp.minimum(index_BPC, N - 1).reshape(B, num_patches * count)
    owner = jnp.take_along_axis(ids, flat, axis=1).reshape(index_BPC.shape)
    own = (index_BPC < N) & (owner == jnp.arange(num_patches, dtype=jnp.int32)[None, :, None])
    taken = jnp.take_along_axis(x, flat[..., None], axis=1).reshape(B, num_patches, count, D)
    return jnp.where(own[..., None], taken, 0).reshape(B, num_patches, count * D)


def pool(
    x: Float[Array, "B N D"],
    ids: Int[Array, "B N"],
    num_patches: int,
    config: BLTConfig,
    sharding: ShardingRules,
) -> Float[Array, "B P E"]:
    """Bytes of every patch pooled as config.pooling says; 0 for an empty patch."""
    own_patches = num_patches // parts_of("patches", sharding)

    def local(x, ids):
        ids = _own_ids(ids, own_patches, sharding)
        if config.pooling is Pooling.FIRST_BYTES:
            return first_bytes(x, ids, own_patches, config.pooled_bytes)
        modes = config.pooling.value.split("_")
        pooled = [pallas_kernels.patch_pool(x, ids, own_patches, mode=mode) for mode in modes]
        return jnp.concatenate(pooled, axis=-1)

    return shard_by_names(local, ((*_BYTES, None), _BYTES), (*_PATCHES, None), sharding)(x, ids)


def patches_attend_to_bytes(
    q: Float[Array, "B P Q H K"],
    key: Float[Array, "B N H K"],
    value: Float[Array, "B N H K"],
    ids: Int[Array, "B N"],
    segment_ids: Int[Array, "B N"],
    patch_segment_ids: Int[Array, "B P"],
    config: BLTConfig,
    sharding: ShardingRules,
) -> Float[Array, "B P Q H K"]:
    """Every patch attends to its own bytes (the local encoder's cross-attention)."""

    def local(q, key, value, ids, segment_ids, patch_segment_ids):
        ids = _own_ids(ids, q.shape[1], sharding)
        window = _window(config, segment_ids, patch_segment_ids)
        return pallas_kernels.patch_attention(q, key, value, ids, **window)

    patches, bytes_ = (*_PATCHES, None, "heads_act", None), (*_BYTES, "heads_act", None)
    names = (patches, bytes_, bytes_, _BYTES, _BYTES, _PATCHES)
    run = shard_by_names(local, names, patches, sharding)
    return run(q, key, value, ids, segment_ids, patch_segment_ids)


def bytes_attend_to_patches(
    q: Float[Array, "B N H K"],
    key: Float[Array, "B P Q H K"],
    value: Float[Array, "B P Q H K"],
    ids: Int[Array, "B N"],
    segment_ids: Int[Array, "B N"],
    patch_segment_ids: Int[Array, "B P"],
    config: BLTConfig,
    sharding: ShardingRules,
) -> Float[Array, "B N H K"]:
    """Every byte attends to the vectors of patch ids[b, n] (the local decoder's)."""

    def local(q, key, value, ids, segment_ids, patch_segment_ids):
        ids, extend = _with_patch_before(ids, patch_segment_ids, sharding)
        window = _window(config, segment_ids, patch_segment_ids)
        return pallas_kernels.patch_gather_attention(q, extend(key), extend(value), ids, **window)

    patches, bytes_ = (*_PATCHES, None, "heads_act", None), (*_BYTES, "heads_act", None)
    names = (bytes_, patches, patches, _BYTES, _BYTES, _PATCHES)
    run = shard_by_names(local, names, bytes_, sharding)
    return run(q, key, value, ids, segment_ids, patch_segment_ids)


def take_patches(
    patches: Float[Array, "B P D"],
    ids: Int[Array, "B N"],
    patch_segment_ids: Int[Array, "B P"],
    sharding: ShardingRules,
) -> Float[Array, "B N D"]:
    """The vector of each byte's patch; 0 for ids outside 0..P-1."""

    def local(patches, ids, patch_segment_ids):
        ids, extend = _with_patch_before(ids, patch_segment_ids, sharding)
        patches = extend(patches)
        P = patches.shape[1]
        taken = jnp.take_along_axis(patches, jnp.clip(ids, 0, P - 1)[..., None], axis=1)
        return jnp.where(((ids >= 0) & (ids < P))[..., None], taken, 0)

    names = ((*_PATCHES, None), _BYTES, _PATCHES)
    run = shard_by_names(local, names, (*_BYTES, None), sharding)
    return run(patches, ids, patch_segment_ids)


def _window(config: BLTConfig, segment_ids, patch_segment_ids) -> dict[str, Any]:
    """A window of one patch cannot leave its document; a wider one needs the documents."""
    if config.patch_window == 1:
        return {}
    segments = {"segment_ids": segment_ids, "patch_segment_ids": patch_segment_ids}
    return {"window": config.patch_window} | segments


def _with_patch_before(
    ids: jax.Array, patch_segment_ids: jax.Array, sharding: ShardingRules
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Ids among a device's patches after the last one before them, and what puts it in front."""
    axes = axes_of("patches", sharding)
    if not axes:
        return ids, lambda x: x
    num_patches = patch_segment_ids.shape[1]
    index = lax.broadcasted_iota(jnp.int32, patch_segment_ids.shape, 1)
    last = jnp.max(jnp.where(patch_segment_ids > 0, index, 0), axis=1, keepdims=True)

    def extend(x):
        x_last = jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)
        return jnp.concatenate([row_pieces.from_previous(x_last, axes), x], axis=1)

    own = jnp.clip(ids - lax.axis_index(axes) * num_patches + 1, 0, num_patches + 1)
    return jnp.where(ids < 0, -1, own), extend
