"""`vmap` of a product whose loop bounds and branches depend on the sizes of the groups."""

from collections.abc import Callable

import jax


def one_by_one(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, run once per element under `vmap`, so that every element keeps its own bounds."""
    return jax.custom_batching.sequential_vmap(function)
