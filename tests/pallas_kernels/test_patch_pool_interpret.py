"""The TPU kernels of the patch operations in the Pallas interpreter."""

import sys

import pytest
from patch_operations import PatchOperations


class TestInterpret(PatchOperations):
    implementation = "interpret"
    modes = ("max", "mean")
    compiler_options = (("xla_backend_optimization_level", 0),)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
