"""Settings of every test: strict promotion, eight CPU devices, shape checks, warnings as errors."""

import gc
import os

# libtpu may be installed: say "cpu" before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"

import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

from jaxtyping import install_import_hook  # noqa: E402

# Before the packages are imported by any test file.
install_import_hook(["blt_jax", "pallas_kernels"], "beartype.beartype")


def _compilation_cache_dir() -> str:
    # One directory per worker: jax writes entries in place, others could read half of one.
    root = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    path = pathlib.Path(root) / f"blt_jax_tests_{os.getuid()}" / worker
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


jax.config.update("jax_compilation_cache_dir", _compilation_cache_dir())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of a file are dropped after it: thousands of them in one process reach
    the number of memory mappings that Linux allows (65,530), and the next compile aborts."""
    yield
    jax.clear_caches()
    gc.collect()


OWN_PACKAGES = r"(blt_jax|pallas_kernels)(\.|$)"


def pytest_configure(config):
    # A warning attributed to our own modules is an error, whichever its category.
    config.addinivalue_line("filterwarnings", f"error:::{OWN_PACKAGES}")
    # flax only warns when nn.scan drops a keyword argument; the result is then wrong.
    config.addinivalue_line("filterwarnings", "error:kwargs are not supported in scan")
