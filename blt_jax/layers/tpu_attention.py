"""Causal self-attention by the splash kernel that jax brings for TPU, and its FLOPs."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Most queries and keys per step of the kernel."""

LANES = 128


MAX_BLOCK_VALUES = BLOCK * 512
"""Most values of a block of queries or keys and their outputs: wider heads take shorter blocks, or
the core's memory would not hold the accumulators of the backward pass."""


def _block(length: int, width: int) -> int:
    """Queries and keys per step for rows of `length`; width: of a key and a value together."""
    block = BLOCK if length >= BLOCK else LANES
    while block > LANES and block * width > MAX_BLOCK_VALUES:
        block //= 2
    return block


def splash_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int,
    scale: float,
    sink: Float[Array, " H"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H J"]:
    """As `block_attention`, with scores that never leave the core. Rows are padded to whole blocks.

    sink: a logit per query head that takes part in the softmax and has no value. On several devices
    only inside `jax.shard_map`. interpret: run the kernel's body without a TPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q.shape[1:3]
    block = _block(T, k.shape[3] + v.shape[3])
    padding = -T % block
    length = T + padding
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)))

    def by_head(x):
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)

    shape = (length, length)
    if window and window < length:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    rows = (by_head(scaled), by_head(k), by_head(v), splash.SegmentIds(q=segments, kv=segments))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(*rows, sink)
    out = jnp.where(segments[:, None, :, None] > 0, out, 0)
    return jnp.swapaxes(out, 1, 2)[:, :T].astype(v.dtype)


_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Products of a block of queries with a block of keys in each kernel: over features of keys, and of
values."""


def splash_flops(call: Any) -> float:
    """FLOPs of the blocks that a splash kernel computes; `call` is the equation of its pallas_call.

    Raises ValueError for another kernel.
    """
    match = re.match(r"splash_mha_(fwd|dq|dkv)", call.params["name"] or "")
    if match is None:
        raise ValueError(f"Pallas call {call.params['name']} is no splash kernel")
    grid = call.params["grid_mapping"].grid
    floating = [x.aval.shape for x in call.invars if jnp.issubdtype(x.aval.dtype, jnp.floating)]
    (T, K), J = floating[0][-2:], floating[2][-1]
    block = _block(T, K + J)
    blocks = T // block
    # Blocks above the diagonal are steps of the grid without work; a window has none of them.
    share = (blocks + 1) / (2 * blocks) if grid[-1] == blocks else 1.0
    of_keys, of_values = _PRODUCTS[match.group(1)]
    return share * math.prod(grid) * 2.0 * block**2 * (of_keys * K + of_values * J)
