"""The TPU kernels of the patch operations in the Pallas interpreter."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_operations import (
    BY_NAME,
    Kernels,
    PatchOperations,
    assert_all_close,
    operations_of,
    value_and_gradients,
)

from pallas_kernels.patch_pool import tpu
from pallas_kernels.patch_pool.shapes import make_arguments


class TestInterpret(Kernels, PatchOperations):
    implementation = "interpret"

    def test_pooling_in_the_other_modes(self):
        shape = BY_NAME["several_tiles"]
        arguments = make_arguments(shape)
        for mode in ("min", "sum"):
            forms = [
                next(operations_of(shape, arguments, i, (mode,)))
                for i in ("interpret", "reference")
            ]
            found, expected = (
                jax.jit(functools.partial(value_and_gradients, f))(x) for f, x in forms
            )
            assert_all_close(found, expected, 1e-5)


def test_path_of_tiles():
    # Patches 0, 1 | 1, 1 | 1, 6 in tiles of two bytes and three patches: patch 1 spans three tiles.
    rows = jnp.array([[0, 1, 1, 1, 1, 6], [2, 2, 2, 2, 2, 2]], jnp.int32)
    tiles = tpu.Tiles(num_bytes=6, num_patches=7, tile_bytes=2, tile_patches=3)
    byte_tile, patch_tile = tpu.tile_path(rows, jnp.ones(rows.shape, bool), tiles)
    np.testing.assert_array_equal(byte_tile, [[0, 1, 2, 2, 2], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(patch_tile, [[0, 0, 0, 1, 2], [0, 0, 0, 1, 2]])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
