"""The one place where device meshes are made."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "expert", "context")


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis means all devices that the others leave.

    slices: groups of devices with a fast network inside and a slower one between: TPU slices, or
    the hosts of a GPU cluster. -1 counts the TPU slices. The groups divide the `data` axis, so
    that only the sum of gradients crosses them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    slices: int = -1

    def __post_init__(self):
        for name in (*AXES, "slices"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ValueError(f"MeshConfig.{name}={getattr(self, name)}: must be >= 1, or -1")
        if sum(getattr(self, name) == -1 for name in AXES) > 1:
            raise ValueError("MeshConfig: at most one axis may be -1 (all remaining devices)")

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of the axes `AXES` for `num_devices`; ValueError if they do not multiply to it."""
        sizes = [getattr(self, name) for name in AXES]
        named = dict(zip(AXES, sizes, strict=True))
        fixed = math.prod(size for size in sizes if size > 0)
        if -1 in sizes:
            if num_devices % fixed:
                raise ValueError(f"mesh {named}: {num_devices} devices cannot be divided by {fixed}")
            sizes[sizes.index(-1)] = num_devices // fixed
        if math.prod(sizes) != num_devices:
            raise ValueError(
                f"mesh {named} needs {math.prod(sizes)} devices, but there are {num_devices}"
            )
        return tuple(sizes)


def _num_slices(config: MeshConfig, devices: list[Any]) -> tuple[int, bool]:
    """Number of slices, and whether a slice is what one process holds (GPU hosts)."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if config.slices in (-1, len(slices)):
        return len(slices), False
    processes = {device.process_index for device in devices}
    if config.slices not in (1, len(processes)):
        raise ValueError(
            f"MeshConfig.slices={config.slices}: the {len(devices)} devices are in "
            f"{len(slices)} slices and belong to {len(processes)} processes"
        )
    return config.slices, config.slices > 1


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh over `devices` (default: all) with axes data, fsdp, tensor, expert, context.

    Axes are of type Auto, which the partitioner needs; enter it with `jax.set_mesh(mesh)`. Slices
    follow each other along `data`.
    Raises ValueError if the axes do not multiply to the devices, or slices do not divide `data`.
    """
    from jax.experimental import mesh_utils

    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    data, *rest = shape = config.shape(len(devices))
    slices, by_process = _num_slices(config, devices)
    if data % slices:
        raise ValueError(
            f"mesh axis data={data} cannot be divided over {slices} slices: only data "
            "parallelism crosses slices"
        )
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *rest),
            (slices, *(1,) * len(rest)),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """What a program is made for: the platform of the current mesh's devices ("cpu", "gpu", "tpu"),
    which need not be here, or the default one outside a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
