"""Several processes: joining the cluster, exchanging small texts, parameters on one process."""

import os
from typing import Any

import jax
import numpy as np

# How many processes a launcher started, of which this is one: Open MPI, others of MPI, SLURM.
PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> bool:
    """Joins the cluster this process was started in; returns whether there is one.

    Without arguments jax looks for a TPU pod, SLURM, Open MPI 4 or a Kubernetes job, and a lone
    host is not an error. With them (`host:port` of process 0, how many, which one) it does not
    look. To be called before anything touches a device.
    Raises ValueError if only some arguments are given, if the number of the process is too large,
    and if a launcher that jax does not know started several processes.
    """
    if jax.distributed.is_initialized():
        return True
    check_cluster(coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        # The one way in which jax says that it found no cluster.
        if coordinator is not None or "coordinator_address" not in str(error):
            raise
        _check_alone()
        return False
    return True


def _check_alone() -> None:
    for name in PROCESS_COUNTS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise ValueError(
                f"{name}={count}: a launcher started several processes, but jax found no cluster "
                "(of MPI it knows Open MPI 4, of SLURM the tasks of srun): give --coordinator, "
                f"--num_processes and --process_id, or unset {name} for one process alone"
            )


def check_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """ValueError unless all three are given, fitting each other, or none."""
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing: give --coordinator, --num_processes and --process_id, "
            "or none of them on a cluster that jax knows"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(f"--coordinator={coordinator}: must be host:port, of process 0")
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes}: must be >= 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id}: must be in 0..{num_processes - 1}")


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def text_of_first(text: str) -> str:
    """The text of process 0, on every process."""
    return gather(text)[0]


def local_copy(tree: Any) -> Any:
    """Arrays as this process can use them alone: those on devices of others are fetched whole."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
