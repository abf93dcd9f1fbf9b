"""Causal self-attention on a mesh: every device attends with its own rows, heads and queries.

With rows divided along their length (context parallelism), a window is served by the keys just
before a device's tokens, sent by its neighbour; without a window every device gathers the keys of
whole rows (as in Llama 3, arXiv 2407.21783, section 3.3.2: few kv heads make them cheap).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from blt_jax.dist.sharding import ShardingRules, axes_of, constrain, parts_of, shard_by_names
from blt_jax.layers import row_pieces
from blt_jax.layers.attention import causal_attention
from blt_jax.layers.block_attention import block_attention
from blt_jax.layers.prefix import Prefix


def sharded_causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G J"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int = 0,
    scale: float | None = None,
    sharding: ShardingRules,
    pieces: int = 1,
    slopes: Float[Array, " H"] | None = None,
    sink: Float[Array, " H"] | None = None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T H J"]:
    """`causal_attention` divided over the current mesh by `sharding`.

    pieces: into which the rows are cut, with padding between them that the window does not count.
    Slopes and sink are divided like the query heads, the keys of a prefix like the others.
    Raises ValueError if the window reaches farther than one piece, or sizes cannot be divided, and
    for slopes with pieces, whose padding they would count.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    devices, cut = parts_of("length", sharding), pieces > 1
    pieces = pieces if cut else devices
    row_pieces.check_divisible(q.shape[1], pieces, devices)
    size = q.shape[1] // pieces
    if cut and window > size:
        raise ValueError(
            f"attention window {window} is longer than a piece of {size} tokens: use fewer than "
            f"{pieces} pieces"
        )
    if cut and slopes is not None:
        raise ValueError(f"pieces={pieces}: must be 1 with slopes, which would count padding")
    if pieces > 1 and 0 < window <= size:
        attend = _windowed(window, scale, pieces // devices, cut, sharding)
    elif devices > 1:
        attend = _gathered(window, scale, sharding)
    else:
        attend = _apart(window, scale)
    names = ("batch", "length", "heads_act", None)
    k, v = (_divisible_heads(x, names, q.shape[2], sharding) for x in (k, v))
    shared, distance = None, None
    if prefix is not None:
        shared = tuple(
            _divisible_heads(x, (None, "heads_act", None), q.shape[2], sharding)
            for x in (prefix.key, prefix.value)
        )
        distance = prefix.distance
    of_rows, of_heads, of_prefix = names[:2], ("heads_act",), (None, "heads_act", None)
    in_names = (names, names, names, of_rows, of_heads, of_heads, of_prefix, of_rows)
    run = shard_by_names(attend, in_names, names, sharding)
    return run(q, k, v, segment_ids, slopes, sink, shared, distance)


def _divisible_heads(x: jax.Array, names, num_heads: int, sharding: ShardingRules) -> jax.Array:
    """Keys or values with as few repeated heads as it takes to divide them like the queries."""
    axis = names.index("heads_act")
    devices, heads = parts_of("heads_act", sharding), x.shape[axis]
    if heads % devices == 0:
        return x
    wanted = devices if devices % heads == 0 and num_heads % devices == 0 else num_heads
    return constrain(jnp.repeat(x, wanted // heads, axis=axis), names, sharding)


def _options(slopes, sink, shared, distance) -> dict:
    prefix = None if shared is None else Prefix(*shared, distance)
    return dict(slopes=slopes, sink=sink, prefix=prefix)


def _apart(window: int, scale: float):
    """Attention of whole rows."""

    def attend(q, k, v, segment_ids, *rest):
        options = _options(*rest)
        return causal_attention(q, k, v, segment_ids, window=window, scale=scale, **options)

    return attend


def _gathered(window: int, scale: float, sharding: ShardingRules):
    """Attention of a device's queries to the keys of the whole rows."""
    axes = axes_of("length", sharding)

    def attend(q, k, v, segment_ids, *rest):
        keys = [lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v, segment_ids)]
        first, options = lax.axis_index(axes) * q.shape[1], _options(*rest)
        arguments = (q, keys[0], keys[1], segment_ids, keys[2], first)
        return block_attention(*arguments, window=window, scale=scale, **options)

    return attend


def _windowed(window: int, scale: float, pieces: int, cut: bool, sharding: ShardingRules):
    """Attention inside each of `pieces` pieces and to the window - 1 tokens before it."""
    axes = axes_of("length", sharding)

    def attend(q, k, v, segment_ids, slopes, sink, shared, distance):
        segments = row_pieces.split(segment_ids, pieces)
        real = segments > 0 if cut else None

        def keys(x, mask=False):
            x = row_pieces.split(x, pieces)
            last, there = row_pieces.last_tokens(x, real, window - 1)
            last = jnp.where(there, last, 0) if mask else last
            x = jnp.concatenate([row_pieces.from_previous(last, axes), x], axis=2)
            return x.reshape(-1, *x.shape[2:])

        def by_piece(x):
            return x.reshape(-1, x.shape[1] // pieces, *x.shape[2:])

        distance = None if distance is None else by_piece(distance)
        out = block_attention(
            by_piece(q),
            keys(k),
            keys(v),
            by_piece(segment_ids),
            keys(segment_ids, mask=True),
            window - 1,
            window=window,
            scale=scale,
            **_options(slopes, sink, shared, distance),
        )
        return out.reshape(*q.shape[:3], v.shape[3])

    return attend
