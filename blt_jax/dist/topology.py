"""Devices that are not here: TPU topologies for libtpu's compiler, abstract ones for lowering."""

import os
from collections.abc import Sequence
from typing import Any

TPU_CHIPS = ("v4", "v5e", "v5p", "v6e")


def set_environment(topology: str) -> None:
    """Settings that jax and libtpu read when they are loaded: call it before `import jax`.

    Variables that are set already stay.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{topology.split(':')[0]}-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def is_tpu(topology: str) -> bool:
    """Whether it names a TPU topology ("v5p:4x4x4") rather than GPUs ("cuda:8").

    Raises ValueError for anything else.
    """
    kind, _, shape = topology.partition(":")
    sizes = shape.split("x")
    if kind in TPU_CHIPS and all(size.isdigit() for size in sizes):
        return True
    if kind == "cuda" and shape.isdigit() and int(shape) > 0:
        return False
    raise ValueError(
        f"--topology={topology}: write chip:AxB or AxBxC with a chip of {', '.join(TPU_CHIPS)} "
        "(v5p:4x4x4), or cuda:N for N GPUs"
    )


def mesh(topology: str, config: Any, slices: int = 1) -> Any:
    """The mesh of a MeshConfig over a topology: of libtpu's devices, or abstract for "cuda:N" (whose
    kind is taken to be NVIDIA H100 80GB HBM3).

    Raises ValueError where libtpu does not know the topology or the axes do not multiply to it,
    RuntimeError without libtpu.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    from blt_jax.dist.mesh import AXES, make_mesh

    if is_tpu(topology):
        return make_mesh(config, _tpu_devices(topology, slices))
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    shape = config.shape(int(topology.partition(":")[2]))
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh(shape, AXES, axis_types=types, abstract_device=gpu)


def _tpu_devices(topology: str, slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:
        if "libtpu" in str(error).lower():
            raise RuntimeError(
                f"--topology={topology}: the TPU compiler is missing, pip install libtpu ({error})"
            ) from error
        raise ValueError(f"--topology={topology}: libtpu does not know it ({error})") from error
