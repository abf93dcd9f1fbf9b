"""The one place where device meshes are made."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "expert", "context")


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig:
    """Devices along each mesh axis; 0 on one axis means all devices that the others leave."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self):
        for name in AXES:
            if getattr(self, name) < 0:
                raise ValueError(f"MeshConfig.{name}={getattr(self, name)}: must be >= 0")
        if sum(getattr(self, name) == 0 for name in AXES) > 1:
            raise ValueError("MeshConfig: at most one axis may be 0 (all remaining devices)")

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of the axes `AXES` for `num_devices`; ValueError if they do not multiply to it."""
        sizes = [getattr(self, name) for name in AXES]
        fixed = math.prod(size for size in sizes if size)
        if 0 in sizes:
            if num_devices % fixed:
                raise ValueError(
                    f"mesh {dict(zip(AXES, sizes, strict=True))}: {num_devices} "
                    f"devices cannot be divided by {fixed}"
                )
            sizes[sizes.index(0)] = num_devices // fixed
        if math.prod(sizes) != num_devices:
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} needs "
                f"{math.prod(sizes)} devices, but there are {num_devices}"
            )
        return tuple(sizes)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh over `devices` (default: all) with axes data, fsdp, tensor, expert, context.

    Axes are of type Auto, which the partitioner needs; enter it with `jax.set_mesh(mesh)`.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    shape = (config or MeshConfig()).shape(len(devices))
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
