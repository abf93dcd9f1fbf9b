"""Tiles of the TPU kernels, and the path along which they are walked (see `tpu`)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

TILE_BYTES = 256
POOL_TILE_PATCHES = 128
ATTENTION_TILE_PATCHES = 64
VMEM_BUDGET = 56 * 2**20  # for blocks and sums; what is computed inside of a tile needs the rest
LEAST_TILE_BYTES, LEAST_TILE_PATCHES = 128, 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of a call, and how many there are."""

    num_bytes: int
    num_patches: int
    tile_bytes: int
    tile_patches: int

    @property
    def byte_tiles(self) -> int:
        return pl.cdiv(self.num_bytes, self.tile_bytes)

    @property
    def patch_tiles(self) -> int:
        return pl.cdiv(self.num_patches, self.tile_patches)

    @property
    def steps(self) -> int:
        return self.byte_tiles + self.patch_tiles - 1


def _tiles(num_bytes: int, num_patches: int, tile_patches: int) -> Tiles:
    if num_bytes > TILE_BYTES:
        tile_bytes = TILE_BYTES
    else:
        tile_bytes = -(-num_bytes // 8) * 8
    return Tiles(num_bytes, num_patches, tile_bytes, min(tile_patches, num_patches))


def pool_tiles(num_bytes: int, num_patches: int) -> Tiles:
    """Tiles of pooling."""
    return _tiles(num_bytes, num_patches, POOL_TILE_PATCHES)


def in_memory(x_BXY, blocks, sums=0) -> int:
    """Bytes that a row of width Y takes in blocks of these dtypes, two buffers each, and sums."""
    return x_BXY.shape[2] * (2 * sum(jnp.dtype(d).itemsize for d in blocks) + 4 * sums)


def attention_tiles(num_bytes: int, num_patches: int, of_byte: int, of_patch: int) -> Tiles:
    """Tiles whose blocks fit the core's memory: of_byte and of_patch are the bytes that a byte and
    a patch take of it, in all blocks (two buffers each) and sums."""
    tiles = _tiles(num_bytes, num_patches, ATTENTION_TILE_PATCHES)
    tile_bytes, tile_patches = tiles.tile_bytes, tiles.tile_patches
    while tile_bytes * of_byte + tile_patches * of_patch > VMEM_BUDGET:
        for_bytes = tile_bytes * of_byte > tile_patches * of_patch
        if tile_bytes > LEAST_TILE_BYTES and (for_bytes or tile_patches <= LEAST_TILE_PATCHES):
            tile_bytes = LEAST_TILE_BYTES
        elif tile_patches > LEAST_TILE_PATCHES:
            tile_patches = max(tile_patches // 16 * 8, LEAST_TILE_PATCHES)
        else:
            raise NotImplementedError(
                f"the TPU kernel: {tile_bytes} bytes of {of_byte} and {tile_patches} patches of "
                f"{of_patch} in blocks and sums do not fit the {VMEM_BUDGET} of a core"
            )
    return dataclasses.replace(tiles, tile_bytes=tile_bytes, tile_patches=tile_patches)


def tile_path(rows_BT: jax.Array, seen_BT: jax.Array, tiles: Tiles) -> jax.Array:
    """The (byte tile, patch tile) of every step: int32[2, B, steps], neither ever decreasing.

    Every pair that shares a seen byte is on the path, and every tile of either side at least once.
    """
    last_BN = jnp.where(seen_BT, rows_BT, 0).reshape(len(rows_BT), tiles.byte_tiles, -1).max(2)
    last_BN = lax.cummax(last_BN, axis=1) // tiles.tile_patches
    # Byte tile n leaves its last patch tile m at step n + m.
    leaves_BN = last_BN + jnp.arange(tiles.byte_tiles, dtype=jnp.int32)[None]
    step_S = jnp.arange(tiles.steps, dtype=jnp.int32)
    byte_tile_BS = jax.vmap(lambda leaves_N: jnp.searchsorted(leaves_N, step_S))(leaves_BN)
    byte_tile_BS = jnp.minimum(byte_tile_BS.astype(jnp.int32), tiles.byte_tiles - 1)
    return jnp.stack([byte_tile_BS, step_S[None] - byte_tile_BS])
