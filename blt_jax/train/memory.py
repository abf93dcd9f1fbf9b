"""Whether a run fits the machine, said before anything is allocated."""

import math
import os
import pathlib
from typing import Any

import jax

from blt_jax.train.state import TrainState


def host_memory() -> int:
    """Bytes of memory of this machine, or of its container if that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total


def device_memory(device: jax.Device) -> int:
    """Bytes that one device may hold; CPU devices of one host share its memory."""
    if device.platform == "cpu":
        return host_memory() // len(jax.local_devices())
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0)


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes of a tree on one device under these shardings."""

    def size(leaf, sharding):
        shape = sharding.shard_shape(leaf.shape)
        return math.prod(shape) * (8 if _is_key(leaf) else leaf.dtype.itemsize)

    return sum(jax.tree.leaves(jax.tree.map(size, abstract, shardings)))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def check_memory(abstract: TrainState, shardings: TrainState, device: jax.Device) -> str:
    """One line with the bytes per device of parameters, optimizer and gradients.

    Raises MemoryError if they do not fit; activations come on top.
    """
    params = bytes_per_device(abstract.params, shardings.params)
    optimizer = bytes_per_device(abstract.opt_state, shardings.opt_state)
    average = bytes_per_device(abstract.average, shardings.average)
    needed, limit = 2 * params + optimizer + average, device_memory(device)
    gib = 2.0**30
    line = (
        f"memory per device: parameters {params / gib:.2f} GiB, gradients {params / gib:.2f} GiB, "
        f"optimizer {optimizer / gib:.2f} GiB, average {average / gib:.2f} GiB"
    )
    if limit and needed > limit:
        raise MemoryError(
            f"this run cannot fit the machine: it needs {needed / gib:.1f} GiB on each device "
            f"before activations ({line}), and a device ({device.device_kind}) has "
            f"{limit / gib:.1f} GiB. Use more devices or a smaller model; `python -m "
            "blt_jax.compile` with the same --config and a --topology shows what a run needs."
        )
    return line
