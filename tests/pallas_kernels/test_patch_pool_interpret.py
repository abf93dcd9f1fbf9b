"""The TPU kernels of the patch operations in the Pallas interpreter."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from patch_operations import Kernels

from pallas_kernels.patch_pool import tiling


class TestInterpret(Kernels):
    implementation = "interpret"


def test_path_of_tiles():
    # Patches 0, 1 | 1, 1 | 1, 6 in tiles of two bytes and three patches: patch 1 spans three tiles.
    rows = jnp.array([[0, 1, 1, 1, 1, 6], [2, 2, 2, 2, 2, 2]], jnp.int32)
    tiles = tiling.Tiles(num_bytes=6, num_patches=7, tile_bytes=2, tile_patches=3)
    byte_tile, patch_tile = tiling.tile_path(rows, jnp.ones(rows.shape, bool), tiles)
    np.testing.assert_array_equal(byte_tile, [[0, 1, 2, 2, 2], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(patch_tile, [[0, 0, 0, 1, 2], [0, 0, 0, 1, 2]])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
