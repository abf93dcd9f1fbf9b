"""Tokens to rows sorted by expert, and back, by gathers in both directions.

Axis letters: T tokens, K experts per token, E experts, D width; rows = T * K.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from pallas_kernels.arguments import array, floating, int32_ids, integers, of_shape, whole
from pallas_kernels.grouped_matmul.reference import accumulator


class Routing(NamedTuple):
    """order[rows]: the flat (token, choice) of every row; inverse[T, K]: the row of every choice.

    group_sizes[E]: rows of each expert. Rows behind their sum belong to no expert.
    """

    order: Any
    inverse: Any
    group_sizes: Any


def sort_by_expert(expert_ids: ArrayLike, num_experts: int) -> Routing:
    """The stable order of the choices expert_ids[T, K] by expert.

    Ids outside 0 .. num_experts - 1 mark dropped choices: their rows come last, in no group.
    """
    expert_ids = integers("expert_ids", expert_ids)
    if expert_ids.ndim != 2 or 0 in expert_ids.shape:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}; [T, K] of at least 1 is needed")
    num_experts = whole("num_experts", num_experts)
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    ids = int32_ids(expert_ids).reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < num_experts), ids, np.int32(num_experts))
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)
    sorted_ids, order = jax.lax.sort_key_val(ids, rows, is_stable=True)
    inverse = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
    behind = jnp.searchsorted(
        sorted_ids, jnp.arange(num_experts, dtype=jnp.int32), side="right"
    ).astype(jnp.int32)
    sizes = jnp.diff(behind, prepend=np.int32(0))
    return checkpoint_name(Routing(order, inverse.reshape(expert_ids.shape), sizes), "routing")


def sort_rows(x: ArrayLike, routing: Routing) -> jax.Array:
    """The token of every row: x[T, D] -> [rows, D]."""
    x, tokens = array("x", x), checked(routing).inverse.shape[0]
    if x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(f"x has shape {x.shape}; [{tokens}, D] is needed for the routing")
    return _sort_rows(x, routing)


@jax.custom_vjp
def _sort_rows(x, routing) -> jax.Array:
    return _take(x, routing.order // np.int32(routing.inverse.shape[1]))


def _sort_rows_forward(x, routing):
    return _sort_rows(x, routing), routing


def _sort_rows_backward(routing, g):
    return sum_of_choices(g, routing.inverse).astype(g.dtype), None


_sort_rows.defvjp(_sort_rows_forward, _sort_rows_backward)


def unsort_rows(rows: ArrayLike, weights: ArrayLike, routing: Routing) -> jax.Array:
    """The weighted sum of every token's rows: rows[rows, D], weights[T, K] -> [T, D]."""
    rows, count = floating("rows", rows, 2), checked(routing).order.shape[0]
    if rows.shape[0] != count:
        raise ValueError(f"rows has shape {rows.shape}; [{count}, D] is needed for the routing")
    weights = floating("weights", weights, 2)
    of_shape("weights", weights, routing.inverse.shape, " for the routing")
    return _unsort_rows(rows, weights, routing)


def checked(routing) -> Routing:
    """Raises TypeError unless it is a Routing."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing={routing!r:.40} must be what sort_by_expert returns")
    return routing


@jax.custom_vjp
def _unsort_rows(rows, weights, routing) -> jax.Array:
    return sum_of_choices(rows, routing.inverse, weights).astype(rows.dtype)


def _unsort_rows_forward(rows, weights, routing):
    return _unsort_rows(rows, weights, routing), (rows, weights, routing)


def _unsort_rows_backward(residuals, g):
    rows, weights, routing = residuals
    of_row = _take(g, routing.order // np.int32(weights.shape[1]))
    row_weights = _take(weights.reshape(-1), routing.order).astype(accumulator(rows.dtype))
    d_rows = (of_row.astype(row_weights.dtype) * row_weights[:, None]).astype(rows.dtype)
    products = [
        (_take(rows, chosen).astype(row_weights.dtype) * g.astype(row_weights.dtype)).sum(-1)
        for chosen in routing.inverse.T
    ]
    return d_rows, jnp.stack(products, axis=1).astype(weights.dtype), None


_unsort_rows.defvjp(_unsort_rows_forward, _unsort_rows_backward)


def sum_of_choices(rows, inverse, weights=None) -> jax.Array:
    """The sum of every token's rows, weighted or not, in the type in which products are summed."""
    total = 0
    for choice in range(inverse.shape[1]):
        taken = _take(rows, inverse[:, choice]).astype(accumulator(rows.dtype))
        if weights is not None:
            taken = taken * weights[:, choice, None].astype(taken.dtype)
        total = taken + total
    return total


def _take(x, rows) -> jax.Array:
    return jnp.asarray(x).at[rows].get(mode="promise_in_bounds")
