"""Start-up on several hosts: TPU pods, SLURM and MPI are found by jax itself."""

import jax


def initialize() -> bool:
    """Joins the cluster this process was started in; returns whether there is one.

    To be called before anything touches a device. A lone host is not an error.
    """
    if jax.distributed.is_initialized():
        return True
    try:
        jax.distributed.initialize()
    except ValueError as error:
        # The one way in which jax says that it found no cluster.
        if "coordinator_address" not in str(error):
            raise
        return False
    return True
