"""Large pages for the temporaries of CPU programs."""

import os
import platform
import sys

_TUNABLE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this program again with glibc's huge pages for large allocations, once.

    On CPU the buffers of every step are mapped and unmapped, and touching them 4 KiB at a time
    took 19 % of a training step (benchmarks/results). Only where it can help: Linux with glibc
    2.35 or newer, on CPU, and no GLIBC_TUNABLES set by the user. Call it before jax is imported,
    from a `python -m` program; values and results do not change.
    """
    library, version = platform.libc_ver()
    if (
        sys.platform != "linux"
        or library != "glibc"
        or tuple(int(part) for part in version.split(".")[:2]) < (2, 35)
        or "GLIBC_TUNABLES" in os.environ
        or not os.environ.get("JAX_PLATFORMS", "cpu").startswith("cpu")
    ):
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLE
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)
