"""The GPU kernels of the patch operations in the Pallas interpreter (no GPU is needed)."""

import functools
import sys

import pytest
from patch_operations import Isolated, Kernels

from pallas_kernels.patch_pool import gpu, vjp


class TestGPUInterpreted(Kernels, Isolated):
    implementation = "gpu"
    half_precision = ("bfloat16", "float16")

    @pytest.fixture(autouse=True)
    def interpreted(self, monkeypatch):
        def kernel(form, name):
            assert form == "gpu"
            return functools.partial(getattr(gpu, name), interpret=True)

        monkeypatch.setattr(vjp, "_kernel", kernel)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
