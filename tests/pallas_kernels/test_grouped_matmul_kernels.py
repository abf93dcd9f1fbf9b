"""The device kernels of the grouped products, run by Pallas' interpreter."""

import sys

import jax
import numpy as np
import pytest
from grouped_products import (
    BY_NAME,
    GroupedProducts,
    arrays_of,
    assert_all_close,
    numpy_truth,
    products,
)

import pallas_kernels
from pallas_kernels import evidence
from pallas_kernels.grouped_matmul import tiling
from pallas_kernels.grouped_matmul.shapes import make_arguments


class TestTPU(GroupedProducts):
    implementation = "interpret"
    half_precision = ("bfloat16",)

    @pytest.mark.parametrize(
        "tiling", [(8, 128, 128), (32, 16, 8), (16, 24, 40), (256, 128, 128), (384, 16, 40)]
    )
    def test_any_tiling(self, tiling):
        # Split and ragged contractions among them, each in its direction.
        shape = BY_NAME["many_tiles"]
        a = make_arguments(shape)
        run = products_with_tiles(shape, self.implementation, tiling)
        assert_all_close(run, numpy_truth(shape, a), 1e-5)


class TestGPU(GroupedProducts):
    implementation = "interpret_gpu"

    @pytest.mark.parametrize("tiling", [(16, 16, 16), (256, 32, 16)])
    def test_any_tiling(self, tiling):
        shape = BY_NAME["many_tiles"]
        a = make_arguments(shape)
        run = products_with_tiles(shape, self.implementation, tiling)
        assert_all_close(run, numpy_truth(shape, a), 1e-5)

    @pytest.mark.parametrize("tiling", [(24, 16, 16), (8, 16, 16), (16, 16, 48)])
    def test_refuses_tiles_that_are_no_powers_of_two(self, tiling):
        a = make_arguments(BY_NAME["uneven"])
        with pytest.raises(NotImplementedError, match="powers of two from 16"):
            pallas_kernels.gmm(
                a.lhs, a.rhs, a.group_sizes, tiling=tiling, implementation="interpret_gpu"
            )


def products_with_tiles(shape, implementation, tiling):
    a = make_arguments(shape)
    return products(shape, implementation, tile_rows=tiling[0], tiling=tiling)(*arrays_of(a))


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("interpret", "float16"), ("tpu", "float16"), ("gpu", "float64")]
)
def test_refused_dtypes(implementation, dtype):
    a = make_arguments(BY_NAME["uneven"])
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=f"lhs has dtype {dtype}"):
        pallas_kernels.gmm(
            a.lhs.astype(dtype), a.rhs.astype(dtype), a.group_sizes, implementation=implementation
        )


@pytest.mark.parametrize("tile_rows", [8192, 65536])
def test_tiles_of_too_many_rows(tile_rows):
    problem = tiling.Problem(65536, 4096, 4096, 8, tile_rows, itemsize=4, out_itemsize=4)
    for choose, memory in (
        (tiling.gmm_tiles, tiling._gmm_memory),
        (tiling.tgmm_tiles, tiling._tgmm_memory),
    ):
        if tile_rows == 8192:
            assert memory(problem, choose(problem)) <= tiling.VMEM_BUDGET
        else:
            with pytest.raises(NotImplementedError, match="tile_rows=65536"):
                choose(problem)


def test_swiglu_of_a_split_contraction_is_not_fused():
    rng = np.random.default_rng(0)
    lhs, rhs = (rng.normal(size=s).astype(np.float32) for s in ((16, 256), (2, 256, 512)))
    sizes = np.array([8, 8], np.int32)

    def product(implementation, **options):
        return lambda lhs, rhs: pallas_kernels.gmm(
            lhs, rhs, sizes, activation="swiglu", implementation=implementation, **options
        )

    split = product("interpret", tiling=(16, 128, 128))
    (call,) = evidence.kernel_traffic(split, lhs, rhs)
    assert call.results == (16 * 512 * 4,)  # the pre-activations
    assert_all_close(split(lhs, rhs), product("reference")(lhs, rhs), 1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
