"""The choice among the implementations of an operation."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax import lax

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
    function of a `custom_vjp`: kernels cannot be differentiated through. Device kernels cannot be
    partitioned automatically either: under a mesh of several devices (`jax.set_mesh`) they are
    taken inside `jax.shard_map` only, and `xla` outside it.
    """
    forms = {"tpu": tpu, "cuda": gpu}
    forms = {platform: form for platform, form in forms.items() if form is not None}
    if not forms or _automatically_partitioned():
        return xla(*args)
    return lax.platform_dependent(*args, default=xla, **forms)


def gathered(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays whole on every device where a mesh partitions automatically: collectives inside
    of loops over data, which devices reach in different orders, can wait for each other for ever.
    """
    if not _automatically_partitioned():
        return arrays
    return lax.with_sharding_constraint(arrays, jax.sharding.PartitionSpec())


def _automatically_partitioned() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    return any(size > 1 for name, size in mesh.shape.items() if name not in manual)
