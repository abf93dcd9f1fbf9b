"""The TPU kernels by the real TPU compiler, without a TPU."""

import sys

import jax.numpy as jnp
import pytest
from grouped_calls import MODEL_SHAPE, forward_and_backward, swiglu

from pallas_kernels import evidence
from pallas_kernels.grouped_matmul.shapes import MODEL_SHAPES, SHAPES, draw_sizes

pytestmark = pytest.mark.usefixtures("promotion_allowed")


@pytest.mark.parametrize("shape", SHAPES + MODEL_SHAPES, ids=lambda shape: shape.name)
def test_compiles_for_tpu_v5p(shape):
    compiled = evidence.compile_for_tpu(*forward_and_backward(shape, "tpu"))
    assert compiled.cost_analysis()["flops"] > 0


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", ["moma_1b4", "mixtral_8x7b_decode", "fine_grained", "large_tiles"])
def test_compiles_for_other_tpus(chip, name):
    (shape,) = (shape for shape in SHAPES + MODEL_SHAPES if shape.name == name)
    arguments = forward_and_backward(shape, "tpu")
    compiled = evidence.compile_for_tpu(*arguments, evidence.TOPOLOGIES[chip])
    assert compiled.cost_analysis()["flops"] > 0


def test_default_compiles_to_the_kernels_on_tpu():
    text = evidence.compile_for_tpu(*forward_and_backward(SHAPES[0], None)).as_text()
    assert text.count("tpu_custom_call") >= 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fused_swiglu_compiles_for_tpu(dtype):
    run, arguments = swiglu(2048, 1024, 2048, 4, "tpu", dtype)
    evidence.compile_for_tpu(run, arguments)
    sizes = jnp.asarray(draw_sizes(MODEL_SHAPE["moma_1b4"].sizes, 2048, 4))
    (call,) = evidence.kernel_traffic(run, *arguments[:2], sizes)
    assert call.declared == call.total


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
