"""The choice among the implementations of an operation."""

from collections.abc import Callable, Mapping
from typing import Any

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu", "interpret")


def choose(
    operation: str, implementation: str | None, forms: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Returns the form of `operation` that `implementation` names.

    `forms` maps names to functions with equal signatures and holds at least "xla". None takes
    the portable form on every platform as long as `forms` has no device kernel.
    Raises ValueError for a name nobody knows, NotImplementedError for a known one that
    this operation does not have.
    """
    if implementation is None:
        return forms["xla"]
    if implementation in forms:
        return forms[implementation]
    allowed = ", ".join(repr(name) for name in forms)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={implementation!r} is unknown; "
            f"allowed are None, {allowed}"
        )
    raise NotImplementedError(
        f"{operation}: implementation={implementation!r} does not exist, only the portable forms "
        f"do so far; allowed are None, {allowed}"
    )
