"""A mixture-of-experts MLP whose experts are spread over a mesh axis, for use inside `shard_map`.

Axis letters: T tokens of this shard, K experts per token, E experts of all shards, S shards,
D model width, F MLP width. Shard s holds the experts s * E/S .. (s + 1) * E/S - 1.

Rows are sorted by expert, so those for one shard lie together; they travel there, are sorted by
expert again (they arrive by source), pass the two products, and travel back the same way.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from pallas_kernels.arguments import floating, number
from pallas_kernels.grouped_matmul import api, routing

EXCHANGES = ("padded", "ragged")


def expert_parallel_ffn(
    x: ArrayLike,
    expert_ids: ArrayLike,
    weights: ArrayLike,
    gate_up: ArrayLike,
    down: ArrayLike,
    *,
    axis_name: str,
    exchange: str = "padded",
    capacity_factor: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """sum_j weights[t, j] * SwiGLU_MLP(expert_ids[t, j])(x[t]) on every shard of `axis_name`.

    x[T, D], expert_ids[T, K], weights[T, K], gate_up[E/S, D, 2F] = [gate | up], down[E/S, F, D]
    -> [T, D]. Ids outside 0 .. E - 1 contribute 0.
    exchange: "ragged" moves exactly the rows there are (`lax.ragged_all_to_all`, not implemented
    by XLA for CPU); "padded" moves equal blocks and runs everywhere.
    capacity_factor: None drops nothing, its buffers hold the worst case of S * T * K rows. A
    number f bounds them to f * T * K rows per shard: "padded" keeps the first f * T * K / S rows
    for every pair of shards, "ragged" the first f * T * K that arrive, in the order of the shards.
    To be called inside `jax.shard_map(..., check_vma=False)`.
    """
    x, weights = floating("x", x, 2), floating("weights", weights, 2)
    gate_up, down = floating("gate_up", gate_up, 3), floating("down", down, 3)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown; allowed are {', '.join(EXCHANGES)}")
    if capacity_factor is not None:
        capacity_factor = number("capacity_factor", capacity_factor)
        if not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor={capacity_factor} must be positive and finite")
    _check_shapes(x, expert_ids, weights, gate_up, down)
    shards, local_experts = lax.axis_size(axis_name), gate_up.shape[0]
    route = routing.sort_by_expert(expert_ids, shards * local_experts)
    sizes = route.group_sizes.reshape(shards, local_experts)
    plan = _padded if exchange == "padded" else _ragged
    travel = plan(sizes, route.order.shape[0], axis_name, capacity_factor)

    arrived = travel.send(routing.sort_rows(x, route))
    inner = routing.sort_by_expert(travel.expert_ids[:, None], local_experts)
    metadata = api.make_group_metadata(inner.group_sizes, arrived.shape[0])
    product = functools.partial(api.gmm, group_sizes=metadata, implementation=implementation)
    hidden = product(arrived, gate_up, routing=inner, activation="swiglu")
    out = product(hidden, down)
    ones = jnp.ones((arrived.shape[0], 1), weights.dtype)
    returned = travel.send_back(routing.unsort_rows(out, ones, inner))
    return routing.unsort_rows(returned, weights, route)


class _Travel(NamedTuple):
    """send: rows[R, D] -> [B, D] on their experts' shards; send_back: the way back.

    expert_ids[B]: the local expert of every arrived row, E/S where there is none.
    """

    send: Any
    send_back: Any
    expert_ids: Any


def _padded(sizes, num_rows: int, axis_name: str, capacity_factor) -> _Travel:
    """One block of C rows for every pair of shards. sizes[S, E/S]: rows here per expert."""
    shards = sizes.shape[0]
    capacity = num_rows
    if capacity_factor is not None:
        capacity = min(math.ceil(capacity_factor * num_rows / shards), num_rows)
    totals = sizes.sum(1, dtype=jnp.int32)
    behind = jnp.cumsum(totals, dtype=jnp.int32)
    starts = behind - totals
    slot = jnp.arange(capacity, dtype=jnp.int32)
    to_block = jnp.where(slot[None] < totals[:, None], starts[:, None] + slot[None], -1)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    shard = jnp.searchsorted(behind, row, side="right").astype(jnp.int32)
    position = row - starts[jnp.minimum(shard, np.int32(shards - 1))]
    kept = (shard < shards) & (position < capacity)
    to_row = jnp.where(kept, shard * capacity + position, -1)
    arrived = lax.all_to_all(_cut(sizes, capacity), axis_name, 0, 0)

    def exchange(blocks):
        blocks = blocks.reshape(shards, capacity, -1)
        return lax.all_to_all(blocks, axis_name, 0, 0).reshape(shards * capacity, -1)

    return _Travel(
        send=lambda rows: exchange(_permute(rows, to_block.reshape(-1), to_row)),
        send_back=lambda out: _permute(exchange(out), to_row, to_block.reshape(-1)),
        expert_ids=_experts_at(jnp.repeat(arrived, capacity, axis=0), jnp.tile(slot, shards)),
    )


def _ragged(sizes, num_rows: int, axis_name: str, capacity_factor) -> _Travel:
    """The rows there are, one source after the other."""
    shards = sizes.shape[0]
    length = shards * num_rows
    if capacity_factor is not None:
        length = min(math.ceil(capacity_factor * num_rows), length)
    here = lax.axis_index(axis_name)
    of_all = lax.all_gather(sizes, axis_name)  # [source, destination, E/S]
    moved = of_all.sum(2, dtype=jnp.int32)
    begin = jnp.cumsum(moved, axis=1, dtype=jnp.int32) - moved
    behind = jnp.minimum(jnp.cumsum(moved, axis=0, dtype=jnp.int32), np.int32(length))
    kept = jnp.diff(behind, axis=0, prepend=np.int32(0))
    first = behind - kept
    out_of = (begin[here], kept[here], first[here], kept[:, here])
    back = (first[:, here], kept[:, here], begin[:, here], kept[here])

    def exchange(rows, new_length, offsets):
        empty = jnp.zeros((new_length, rows.shape[1]), rows.dtype)
        return lax.ragged_all_to_all(rows, empty, *offsets, axis_name=axis_name)

    arrived = _cut(of_all[:, here], kept[:, here, None])
    row = jnp.arange(length, dtype=jnp.int32)
    source = jnp.searchsorted(behind[:, here], row, side="right").astype(jnp.int32)
    source = jnp.minimum(source, np.int32(shards - 1))
    return _Travel(
        send=lambda rows: exchange(rows, length, out_of),
        send_back=lambda out: exchange(out, num_rows, back),
        expert_ids=_experts_at(arrived[source], row - first[source, here]),
    )


def _cut(sizes, limit) -> jax.Array:
    """sizes[S, E/S] of which every row keeps its first `limit` members."""
    behind = jnp.minimum(jnp.cumsum(sizes, axis=1, dtype=jnp.int32), limit)
    return jnp.diff(behind, axis=1, prepend=np.int32(0))


def _experts_at(sizes, position) -> jax.Array:
    """The expert of a row at position[N] among rows sorted by expert, sizes[N, E/S]."""
    behind = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)
    return (position[:, None] >= behind).sum(1, dtype=jnp.int32)


@jax.custom_vjp
def _permute(x, source, target) -> jax.Array:
    """x[source], 0 where source is -1. `target` is the inverse: out[target] is x where kept."""
    rows = jnp.asarray(x).at[jnp.maximum(source, 0)].get(mode="promise_in_bounds")
    return jnp.where((source >= 0)[:, None], rows, jnp.zeros((), x.dtype))


def _permute_forward(x, source, target):
    return _permute(x, source, target), (source, target)


def _permute_backward(residuals, g):
    source, target = residuals
    return _permute(g, target, source), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _check_shapes(x, expert_ids, weights, gate_up, down) -> None:
    if np.shape(expert_ids) != weights.shape or weights.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"expert_ids and weights have shapes {np.shape(expert_ids)} and {weights.shape}; "
            f"[{x.shape[0]}, K] is needed beside x {x.shape}"
        )
    if gate_up.shape[1] != x.shape[1] or gate_up.shape[2] % 2:
        raise ValueError(f"gate_up has shape {gate_up.shape}; [E/S, {x.shape[1]}, 2F] is needed")
    experts, width, columns = gate_up.shape
    if down.shape != (experts, columns // 2, width):
        raise ValueError(
            f"down has shape {down.shape}; {(experts, columns // 2, width)} is needed beside "
            f"gate_up {gate_up.shape}"
        )
    for name, matrices in (("gate_up", gate_up), ("down", down)):
        if matrices.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {matrices.dtype}; x's dtype {x.dtype} is needed")
