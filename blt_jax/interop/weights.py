"""Tables of weights: which tensor of a foreign checkpoint is which parameter of ours, and how its
values are laid out. One table serves reading, writing and shape checks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from blt_jax.dist.sharding import param_shapes, param_shardings
from blt_jax.interop.tensor_files import SplitFiles, TensorFiles, check_names
from blt_jax.layers.rope import RopeLayout

Transform = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter of ours at `path`.

    name: the foreign tensor, with `{layer}` where `layers` > 0 tensors are stacked on our leading
    axis. start: first index of our parameter along `axis` of a foreign tensor that joins several.
    to_theirs and to_ours only reshape and transpose one tensor.
    """

    path: tuple[str, ...]
    name: str
    layers: int = 0
    start: int | None = None
    axis: int = 0
    to_theirs: Transform
    to_ours: Transform

    def names(self) -> list[str]:
        return [self.name.format(layer=i) for i in range(self.layers)] or [self.name]


def same(path, name, **options) -> Weight:
    """Norm weights and embedding tables: equal on both sides."""
    return Weight(path=path, name=name, to_theirs=lambda x: x, to_ours=lambda x: x, **options)


def linear(path, name, **options) -> Weight:
    """Ours [in, out], theirs [out, in]."""
    return Weight(path=path, name=name, to_theirs=np.transpose, to_ours=np.transpose, **options)


def reshaped(path, name, ours: tuple[int, ...], theirs: tuple[int, ...], **options) -> Weight:
    """The same numbers in another shape."""
    to_theirs, to_ours = (lambda x, shape=shape: x.reshape(shape) for shape in (theirs, ours))
    return Weight(path=path, name=name, to_theirs=to_theirs, to_ours=to_ours, **options)


def change_rope_layout(
    x: np.ndarray | jax.Array, source: RopeLayout, target: RopeLayout
) -> np.ndarray | jax.Array:
    """Reorders the last axis, a head's features, so that the same features rotate together."""
    if source is target:
        return x
    split = (x.shape[-1] // 2, 2) if source is RopeLayout.INTERLEAVED else (2, x.shape[-1] // 2)
    return x.reshape(*x.shape[:-1], *split).swapaxes(-1, -2).reshape(x.shape)


def heads_in(
    path,
    name,
    heads: int,
    *,
    ours: RopeLayout = RopeLayout.INTERLEAVED,
    theirs: RopeLayout = RopeLayout.INTERLEAVED,
    **options,
) -> Weight:
    """Ours [D, H, K], theirs [H K, D]; ours, theirs: rotary layouts, equal for values."""

    def to_theirs(x_DHK):
        D, H, K = x_DHK.shape
        return change_rope_layout(x_DHK, ours, theirs).reshape(D, H * K).T

    def to_ours(x_AD):
        A, D = x_AD.shape
        x_DHK = x_AD.T.reshape(D, heads, A // heads)
        return change_rope_layout(x_DHK, theirs, ours)

    return Weight(path=path, name=name, to_theirs=to_theirs, to_ours=to_ours, **options)


def heads_out(path, name, heads: int, **options) -> Weight:
    """Ours [H, K, D], theirs [D, H K]."""

    def to_theirs(x_HKD):
        H, K, D = x_HKD.shape
        return x_HKD.reshape(H * K, D).T

    def to_ours(x_DA):
        D, A = x_DA.shape
        return x_DA.T.reshape(heads, A // heads, D)

    return Weight(path=path, name=name, to_theirs=to_theirs, to_ours=to_ours, **options)


def _flat_shapes(model: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(param_shapes(model))
    return {path: leaf.shape for path, leaf in flat.items()}


def _their_shape(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    one = np.broadcast_to(np.False_, shape[1:] if weight.layers else shape)
    return weight.to_theirs(one).shape


def foreign_shapes(table: list[Weight], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every foreign tensor, in the table's order, from the shapes of our parameters.

    Raises ValueError when table and model do not name the same parameters.
    """
    ours = _flat_shapes(model)
    check_names(
        ("/".join(path) for path in ours),
        ("/".join(weight.path) for weight in table),
        "table of weights",
    )
    shapes: dict[str, tuple[int, ...]] = {}
    pairs = [(weight, _their_shape(weight, ours[weight.path])) for weight in table]
    by_layer = sorted(
        ((layer, *pair) for pair in pairs for layer in range(pair[0].layers or 1)),
        key=lambda item: item[0],
    )
    for layer, weight, shape in by_layer:
        name = weight.names()[layer]
        if weight.start is not None:
            axis, end = weight.axis, weight.start + shape[weight.axis]
            end = max(end, shapes[name][axis] if name in shapes else 0)
            shape = (*shape[:axis], end, *shape[axis + 1 :])
        shapes[name] = shape
    return shapes


def read_params(
    files: TensorFiles | SplitFiles,
    table: list[Weight],
    model: nn.Module,
    *,
    mesh: Mesh | None = None,
    dtype: np.dtype | None = np.dtype(np.float32),
) -> dict[str, Any]:
    """Our params, tensor by tensor; with a mesh every process keeps only its own shards.

    dtype None keeps the type of the files. Raises ValueError for a tensor of another shape than
    the config says. Tensors of `files` that the table does not name are not looked at.
    """
    wrong = [
        f"{name}: {files.shapes[name]}, the config says {shape}"
        for name, shape in foreign_shapes(table, model).items()
        if files.shapes[name] != shape
    ]
    if wrong:
        raise ValueError(f"{files.path}: shapes that do not fit the config: {wrong}")
    shapes = _flat_shapes(model)
    shardings = {}
    if mesh is not None:
        shardings = flax.traverse_util.flatten_dict(param_shardings(model, mesh))
    params = {
        weight.path: _read_param(
            files, weight, shapes[weight.path], shardings.get(weight.path), dtype
        )
        for weight in table
    }
    return flax.traverse_util.unflatten_dict(params)


def _read_param(files, weight, shape, sharding, dtype) -> jax.Array:
    everything = tuple(slice(0, size) for size in shape)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {
        device: tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers: dict[tuple, np.ndarray] = {}
    for layer, name in enumerate(weight.names()):
        tensor = files.read(name)
        if weight.start is not None:
            end = weight.start + _their_shape(weight, shape)[weight.axis]
            own = slice(weight.start, end)
            tensor = tensor[(*[slice(None)] * weight.axis, own)]
        tensor = weight.to_ours(tensor)
        for index in {_key(index): index for index in places.values()}.values():
            if _key(index) not in buffers:
                sizes = [s.stop - s.start for s in index]
                buffers[_key(index)] = np.empty(sizes, dtype or tensor.dtype)
            buffer = buffers[_key(index)]
            if not weight.layers:
                buffer[...] = tensor[index]
            elif index[0].start <= layer < index[0].stop:
                buffer[layer - index[0].start] = tensor[index[1:]]
    if places == {jax.devices()[0]: everything}:
        return jax.numpy.asarray(buffers[_key(everything)])
    arrays = [jax.device_put(buffers[_key(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _key(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in index)


def foreign_reader(table: list[Weight], params: dict[str, Any]) -> Callable[[str], np.ndarray]:
    """A function from a foreign name to its tensor, made from our params when asked."""
    flat = flax.traverse_util.flatten_dict(params)
    sources: dict[str, list[tuple[Weight, int]]] = {}
    for weight in table:
        for layer, name in enumerate(weight.names()):
            sources.setdefault(name, []).append((weight, layer))

    def read(name: str) -> np.ndarray:
        pieces = []
        for weight, layer in sorted(sources[name], key=lambda item: item[0].start or 0):
            leaf = flat[weight.path]
            pieces.append(weight.to_theirs(np.asarray(leaf[layer] if weight.layers else leaf)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=weight.axis)

    return read
