import jax
import pytest

from pallas_kernels import gpu_evidence


@pytest.fixture(scope="session")
def gpu_compiler():
    """Fails where `gpu_evidence.compile_for_gpu` cannot run; for tests with the marker."""
    if reason := gpu_evidence.gpu_compiler_missing():
        pytest.fail(f"{reason}; pallas_kernels/gpu_evidence.py says how to get it")


@pytest.fixture(scope="module")
def promotion_allowed():
    """Ranks promote freely, as in what the compilers of devices trace."""
    with jax.numpy_rank_promotion("allow"):
        yield
