"""Logical axis names, the rules that map them to mesh axes, and sharded initialisation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ShardingRules:
    """Mesh axes of every logical axis; an empty tuple replicates.

    Activations: batch, length, patches, embed_act, heads_act, mlp_act, vocab_act.
    Parameters: the others. A mesh axis may be used once per array.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("context",)
    patches: tuple[str, ...] = ("context",)
    embed_act: tuple[str, ...] = ()
    heads_act: tuple[str, ...] = ("tensor",)
    mlp_act: tuple[str, ...] = ("tensor",)
    vocab_act: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    ngram: tuple[str, ...] = ("fsdp", "tensor")
    patch_vectors: tuple[str, ...] = ("tensor",)
    norm: tuple[str, ...] = ()

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """PartitionSpec of an array whose axes have these logical names (None: replicated).

        Raises ValueError for an unknown name, and for a mesh axis that would be used twice.
        """
        axes = []
        for name in names:
            if name is not None and not hasattr(self, name):
                allowed = [field.name for field in dataclasses.fields(self)]
                raise ValueError(f"logical axis {name!r} in {names}: allowed are {allowed}")
            axes.append(() if name is None else tuple(getattr(self, name)))
        used = [axis for group in axes for axis in group]
        if len(used) != len(set(used)):
            raise ValueError(
                f"a mesh axis is used twice: logical names {names} map to mesh axes {axes}"
            )
        return PartitionSpec(
            *(group if len(group) > 1 else next(iter(group), None) for group in axes)
        )


def constrain(x: jax.Array, names: tuple[str | None, ...], rules: ShardingRules) -> jax.Array:
    """Constrains `x` to the sharding of its logical axis names; nothing outside a mesh.

    Raises ValueError as `rules.spec` (also outside a mesh), and if the names do not fit the rank or
    a dimension cannot be divided.
    """
    if len(names) != x.ndim:
        raise ValueError(f"array of shape {x.shape} has {x.ndim} axes, but names are {names}")
    spec = rules.spec(names)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    _check_divisible(x.shape, names, spec, dict(mesh.shape))
    return jax.lax.with_sharding_constraint(x, spec)


def shard_by_names(
    function: Callable[..., Any],
    in_names: Sequence[tuple[str | None, ...]],
    out_names: Any,
    rules: ShardingRules,
) -> Callable[..., Any]:
    """`function` run by every device on its parts of the arguments, as their logical names say.

    in_names: per argument, of the leading axes of its arrays (an argument may be a pytree).
    out_names: a tuple of names per result (or a pytree of such). Inside, no array is divided any
    further, collectives name mesh axes (`axes_of`), and kernels may be called. Outside a mesh, and
    inside another such function, it is `function` itself.
    Raises ValueError as `rules.spec`, and when called if a dimension cannot be divided.
    """
    in_specs = tuple(rules.spec(names) for names in in_names)
    out_specs = jax.tree.map(rules.spec, out_names, is_leaf=_is_names)

    @functools.wraps(function)
    def sharded(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*arguments)
        for argument, names, spec in zip(arguments, in_names, in_specs, strict=True):
            for x in jax.tree.leaves(argument):
                _check_divisible(x.shape[: len(names)], names, spec, dict(mesh.shape))
        # Kernels do not say over which axes their results vary, which the check would ask for.
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
            *arguments
        )

    return sharded


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(x is None or isinstance(x, str) for x in node)


def axes_of(name: str, rules: ShardingRules) -> tuple[str, ...]:
    """The mesh axes that divide a logical axis over more than one device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in getattr(rules, name) if mesh.shape.get(axis, 1) > 1)


def parts_of(name: str, rules: ShardingRules) -> int:
    """Number of parts in which the current mesh divides a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes_of(name, rules))


def _check_divisible(shape, names, spec, mesh_shape) -> None:
    for size, name, axes in zip(shape, names, spec, strict=True):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in mesh_shape:
                raise ValueError(
                    f"logical axis {name!r} maps to mesh axis {axis!r}: "
                    f"the mesh has {tuple(mesh_shape)}"
                )
        parts = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            parts *= mesh_shape[axis]
        if size % parts:
            raise ValueError(
                f"axis {name!r} of size {size} (array {shape}) cannot be divided "
                f"over mesh axes {axes} of {parts} devices"
            )


def _init(model: nn.Module, key: jax.Array):
    # Example inputs are small: their activations could not be divided over a mesh.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return model.init(key, *model.example_inputs())["params"]


@functools.lru_cache(maxsize=16)
def _boxed_init(model: nn.Module):
    # Tracing a large model takes seconds, and a run asks for its shapes a dozen times.
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def param_shapes(model: nn.Module) -> dict[str, Any]:
    """Tree of ShapeDtypeStruct, one per parameter of `model`; nothing is computed."""
    return nn.unbox(_boxed_init(model))


def logical_axes(model: nn.Module) -> dict[str, Any]:
    """Tree of tuples of logical names, one per parameter axis, beside the params of `model`."""
    boxed = _boxed_init(model)
    specs, shapes = nn.get_partition_spec(boxed), nn.unbox(boxed)
    return jax.tree.map(
        lambda leaf, spec: tuple(spec) + (None,) * (leaf.ndim - len(spec)), shapes, specs
    )


def param_shardings(model: nn.Module, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Tree of NamedSharding for the params of `model` on `mesh`, by `model.sharding`."""

    def sharding(leaf, names):
        spec = model.sharding.spec(names)
        _check_divisible(leaf.shape, names, spec, dict(mesh.shape))
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, param_shapes(model), logical_axes(model))


def init_params(model: nn.Module, key: jax.Array, mesh: Mesh | None = None) -> dict[str, Any]:
    """Plain nested dict of parameter arrays, created already sharded when a mesh is given."""

    def init(key):
        return nn.unbox(_init(model, key))

    if mesh is None:
        return jax.jit(init)(key)
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=param_shardings(model, mesh))(key)


def sharding_report(model: nn.Module, mesh: Mesh | AbstractMesh) -> list[dict[str, Any]]:
    """Where every parameter lies: name, shape, logical and mesh axes, bytes on one device."""

    def row(path, leaf, names, sharding):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return {
            "name": "/".join(str(key.key) for key in path),
            "shape": list(leaf.shape),
            "logical": list(names),
            "physical": [list((axes,) if isinstance(axes, str) else axes or ()) for axes in sharding.spec],
            "bytes_per_device": size,
        }

    shapes = param_shapes(model)
    is_names = lambda node: isinstance(node, tuple)  # noqa: E731
    names = jax.tree.leaves(logical_axes(model), is_leaf=is_names)
    shardings = jax.tree.leaves(param_shardings(model, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return [row(*leaf, *rest) for leaf, *rest in zip(leaves, names, shardings, strict=True)]
