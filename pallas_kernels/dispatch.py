"""The choice among the implementations of an operation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.extend
from jax import lax
from jax.interpreters import ad, batching, mlir

Form = TypeVar("Form")
IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu", "interpret")


def choose(operation: str, implementation, forms: Mapping[str | None, Form]) -> Form:
    """Returns the form of `operation` that `implementation` names.

    `forms` maps names to functions (or sets of functions) with equal signatures and holds at least
    "xla"; the form under None, "xla" if there is none, is taken for None. Raises ValueError for a
    name nobody knows, TypeError for what is no name, NotImplementedError for a known one that this
    operation does not have.
    """
    if implementation is None:
        return forms.get(None, forms["xla"])
    allowed = ", ".join(repr(name) for name in forms if name is not None)
    if not isinstance(implementation, str):
        raise TypeError(
            f"{operation}: implementation={implementation!r:.40} must be None or a string; "
            f"allowed are None, {allowed}"
        )
    if implementation in forms:
        return forms[implementation]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={implementation!r} is unknown; "
            f"allowed are None, {allowed}"
        )
    raise NotImplementedError(
        f"{operation}: implementation={implementation!r} does not exist; "
        f"allowed are None, {allowed}"
    )


def by_platform(
    *args: Any,
    xla: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """Calls the form for the platform that the program is compiled for, `xla` where there is none.

    All forms return equal shapes and dtypes. To be called inside the forward and the backward
    function of a `custom_vjp`: kernels cannot be differentiated through, and what is derived from
    a call of this function is the portable form. Device kernels cannot be
    partitioned automatically either: under a mesh of several devices (`jax.set_mesh`) they are
    taken inside `jax.shard_map` only, and `xla` outside it.
    """
    forms = {"tpu": tpu, "cuda": gpu}
    forms = {platform: form for platform, form in forms.items() if form is not None}
    if not forms or automatically_partitioned():
        return xla(*args)
    leaves, tree = jax.tree.flatten(args)

    def flat(form, *leaves):
        return form(*jax.tree.unflatten(tree, leaves))

    portable, out = jax.make_jaxpr(functools.partial(flat, xla), return_shape=True)(*leaves)
    forms = tuple((platform, functools.partial(flat, form)) for platform, form in forms.items())
    outputs = _by_platform_p.bind(*leaves, portable=portable, forms=forms)
    return jax.tree.unflatten(jax.tree.structure(out), outputs)


_by_platform_p = jax.extend.core.Primitive("by_platform")
"""`lax.platform_dependent`, but for what is traced: the portable form always, a device's form when
a program is made for that device. Tracing a kernel takes as long as tracing some model layers.

portable: a jaxpr; forms: pairs (platform, function of the flat arguments)."""
_by_platform_p.multiple_results = True


def _form_for(platform: str | None, portable, forms) -> Callable[..., list[jax.Array]]:
    form = dict(forms).get(platform)
    if form is None:
        return jax.extend.core.jaxpr_as_fun(portable)
    return lambda *leaves: jax.tree.leaves(form(*leaves))


def _evaluate(*leaves, portable, forms):
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    # Where JAX computes: beside a committed array, otherwise where the arrays are.
    first = min(arrays, key=lambda x: not x.committed, default=None)
    platform = jax.default_backend() if first is None else next(iter(first.devices())).platform
    return _form_for({"gpu": "cuda"}.get(platform, platform), portable, forms)(*leaves)


def _shapes(*_, portable, forms):
    del forms
    return portable.out_avals


def _differentiate(leaves, tangents, *, portable, forms):
    """Of the portable form: derivatives of the first order are the callers' own (`custom_vjp`)."""
    del forms
    tangents = map(ad.instantiate_zeros, tangents)
    return jax.jvp(jax.extend.core.jaxpr_as_fun(portable), leaves, tuple(tangents))


def _batch(leaves, axes, *, portable, forms):
    portable = jax.extend.core.jaxpr_as_fun(portable)
    forms = {platform: jax.vmap(form, axes) for platform, form in forms}
    outputs = by_platform(
        *leaves, xla=jax.vmap(portable, axes), tpu=forms.get("tpu"), gpu=forms.get("cuda")
    )
    outputs = jax.tree.leaves(outputs)
    return outputs, (0,) * len(outputs)


def _lower(ctx, *leaves, portable, forms, platform=None):
    lower = mlir.lower_fun(_form_for(platform, portable, forms), multiple_results=True)
    return lower(ctx, *leaves)


_by_platform_p.def_impl(_evaluate)
_by_platform_p.def_abstract_eval(_shapes)
ad.primitive_jvps[_by_platform_p] = _differentiate
batching.primitive_batchers[_by_platform_p] = _batch
mlir.register_lowering(_by_platform_p, _lower)
for _platform in ("tpu", "cuda"):
    mlir.register_lowering(
        _by_platform_p, functools.partial(_lower, platform=_platform), platform=_platform
    )


def pallas_call(*args: Any, **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, traced with 32-bit integers: Mosaic knows no others, and literals in
    kernels and index maps would have 64 bits under `jax_enable_x64`."""
    from jax.experimental import pallas as pl

    def call(*operands):
        with jax.enable_x64(False):
            return pl.pallas_call(*args, **options)(*operands)

    return call


def gathered(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays whole on every device where a mesh partitions automatically: collectives inside
    of loops over data, which devices reach in different orders, can wait for each other for ever.
    """
    if not automatically_partitioned():
        return arrays
    return lax.with_sharding_constraint(arrays, jax.sharding.PartitionSpec())


def automatically_partitioned() -> bool:
    """Whether the compiler divides this program over devices, outside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    return any(size > 1 for name, size in mesh.shape.items() if name not in manual)
