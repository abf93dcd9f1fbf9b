import pytest

from pallas_kernels import gpu_evidence


@pytest.fixture(scope="session")
def gpu_compiler():
    """Skips where `gpu_evidence.compile_for_gpu` cannot run."""
    if reason := gpu_evidence.gpu_compiler_missing():
        pytest.skip(f"{reason}; pallas_kernels/gpu_evidence.py says how to get it")
