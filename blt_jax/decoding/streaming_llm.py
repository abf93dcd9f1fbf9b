"""Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).

Softmax has to put its mass somewhere, and trained models put what they do not need on the first
tokens of a text, the attention sinks; a sliding window that drops these breaks the model. Keeping
the keys and values of a few first tokens beside a window of recent ones, with positions counted
inside the cache, lets a model trained on short rows read streams without end, at constant memory
and time per token. Nothing is retrained, and what left the window is gone: the context does not
get longer.

Axes: B batch, T tokens, S sinks, W recent tokens, C = S + W slots, H query heads, G key-value
heads, K head width, J width of the values, N blocks of queries, V vocabulary, L layers.

| paper | here |
|---|---|
| section 3.2, Fig. 4: sinks and rolling cache | `SinkCache`, `stream_step`, `extend` |
| section 3.2: positions inside the cache | `Positions`, `query_positions` |
| keys cached before rotation, rotated in every step | `Rotation.IN_CACHE` |
| section 3.1, Fig. 3, Table 1: dense, window, re-computation | `streaming_decoder` |
| section 3.3: zero sink, sink token | `TransformerConfig.softmax`, `Llama3Config.sink_tokens` |
| section 4.1: perplexity of a long stream | `streaming_scores.streaming_nats` |

Departures. The published code shifts its arrays and keeps S + W tokens beside the current one: here
slots are overwritten in a ring, and S + W counts the current token unless `include_current` is
False. `Rotation.TWO_PHASE` caches rotated keys instead: relative to a recent key the position in
the cache and in the stream agree, and only the sinks need a query of their own. A prompt or a whole
stream is read in blocks with the same cache (`extend`), the same function as one token at a time;
the published code evaluates token by token, and frees room for a chat prompt beforehand, which
cannot be longer than the window; here a conversation is one stream (`sampling.generate` with
`previous`). With a linear position bias (ALiBi) the distance to a sink is the one inside the cache.
Sink tokens of a model (section 3.3) are the first tokens of every row; they count as sinks here,
and are in front of what RECOMPUTE and DENSE read. Learned absolute positions are not supported; no
model here has them. Megalodon needs none of this: its state has a constant size by construction.

Measured here: on bigram-backcopy, after 1,500 steps with a BOS, 48 keys cost 2.093 nats per token
in a window and 1.991 with sinks, at positions 64-512 of streams (mean of three seeds, which differ
by 0.03 to 0.21; run `proof_seeds`, one CPU core, 2026-11-22).
"""

import dataclasses
import enum
import functools
import warnings
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers import step
from blt_jax.layers.cache import LayerCache, RowCache, ring_index
from blt_jax.layers.masks import NEGATIVE
from blt_jax.layers.rope import RopeConfig, rope_frequencies, rotate
from blt_jax.layers.transformer import TransformerConfig

MAX_TOKENS = 2**31 - 1
"""Tokens of a row: positions are int32."""

BLOCK = 128
"""Most queries of a block of `extend`."""

PIECE = 1024
"""Tokens that are read at once in a long prompt or stream."""


# ------------------------------------------------------------------------------------ options


class Policy(enum.Enum):
    """What a token may attend to (Fig. 1): the first and the recent tokens, the recent ones, all
    before it, or the recent ones read anew for every token."""

    SINKS = "sinks"
    WINDOW = "window"
    DENSE = "dense"
    RECOMPUTE = "recompute"


class Positions(enum.Enum):
    """Where a key counts as standing: its rank in the cache, or its index in the text."""

    IN_CACHE = "in_cache"
    ORIGINAL = "original"


class Rotation(enum.Enum):
    """When keys are rotated: all of them in every step, or once, as they enter the cache."""

    IN_CACHE = "in_cache"
    TWO_PHASE = "two_phase"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StreamingConfig:
    """Sizes and options of the cache; `num_sinks` + `window` are the paper's "4+1020".

    include_current: the window counts the token that attends; False keeps one more, as the
    published code does. stride: of RECOMPUTE, tokens predicted per window that is read. Each policy
    reads only the fields that concern it; trained_length: row length of the training, 0 unknown.
    """

    policy: Policy = Policy.SINKS
    num_sinks: int = 4
    window: int = 1020
    positions: Positions = Positions.IN_CACHE
    rotation: Rotation = Rotation.IN_CACHE
    include_current: bool = True
    stride: int = 1
    trained_length: int = 0

    def __post_init__(self):
        name = "StreamingConfig"
        if self.num_sinks < 0:
            raise ValueError(f"{name}.num_sinks={self.num_sinks}: must be >= 0")
        if self.window < 1:
            raise ValueError(f"{name}.window={self.window}: must be >= 1")
        if self.trained_length < 0:
            raise ValueError(f"{name}.trained_length={self.trained_length}: must be >= 0")
        if (self.policy is Policy.SINKS) != (self.num_sinks > 0):
            raise ValueError(
                f"{name}.num_sinks={self.num_sinks}: must be >= 1 with policy SINKS and 0 with "
                f"the others, not with {self.policy.name}"
            )
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"{name}.stride={self.stride}: must be 1..window={self.window}")
        if self.stride > 1 and self.policy is not Policy.RECOMPUTE:
            raise ValueError(f"{name}.stride={self.stride}: only policy RECOMPUTE has strides")

    @property
    def recent(self) -> int:
        """W: recent tokens that are attended to, the current one among them."""
        return self.window if self.include_current else self.window + 1

    @property
    def chunks(self) -> tuple[int, ...]:
        """Slots of the cache: for sinks, if there are any, and for recent tokens."""
        return (self.num_sinks, self.recent) if self.num_sinks else (self.recent,)

    @property
    def size(self) -> int:
        """C: keys that a token attends to once the cache is full."""
        return self.num_sinks + self.recent


def sinks(num_sinks: int, window: int, **options: Any) -> StreamingConfig:
    """Attention sinks and recent tokens, "4+1020"."""
    return StreamingConfig(num_sinks=num_sinks, window=window, **options)


def window(size: int, **options: Any) -> StreamingConfig:
    """Recent tokens alone, "0+1024"."""
    return StreamingConfig(policy=Policy.WINDOW, num_sinks=0, window=size, **options)


def recompute(size: int, stride: int = 1) -> StreamingConfig:
    """The last `size` tokens read from scratch for every `stride` predictions."""
    return StreamingConfig(policy=Policy.RECOMPUTE, num_sinks=0, window=size, stride=stride)


def dense() -> StreamingConfig:
    """Everything before a token."""
    return StreamingConfig(policy=Policy.DENSE, num_sinks=0)


# ------------------------------------------------------------- positions inside the cache (3.2)


def query_positions(
    config: StreamingConfig, position: Int[Array, "*B"]
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """Where the token at index `position` of the text stands to recent tokens and to sinks.

    A recent key at index j counts as j + (first - position), a sink as its index. To recent keys
    only the distance matters, which no shift changes, so the full index serves as well.
    """
    in_cache = jnp.minimum(position, config.size - 1)
    to_sinks = in_cache if config.positions is Positions.IN_CACHE else position
    raw = config.rotation is Rotation.IN_CACHE and config.positions is Positions.IN_CACHE
    return (in_cache if raw else position), to_sinks


@functools.lru_cache(maxsize=32)
def _digit_angles(rope: RopeConfig, head_dim: int, digits: int) -> np.ndarray:
    """complex64 [digits, 256, K / 2]: rotation by every digit of a position to base 256."""
    frequencies = rope_frequencies(rope, head_dim).astype(np.float64)
    positions = 256.0 ** np.arange(digits)[:, None] * np.arange(256)[None, :]
    return np.exp(1j * positions[:, :, None] * frequencies).astype(np.complex64)


def stream_rope(
    positions: Int[Array, "B T"], rope: RopeConfig, head_dim: int, limit: int = MAX_TOKENS
) -> Float[Array, "B T K"]:
    """As `rope.rope_table` for positions 0..limit-1, accurate at any of them.

    A float32 angle of 4 million is off by up to 0.25: here the rotations by the digits of a
    position, worked out in float64, are multiplied.
    """
    digits = max(1, -(-(limit - 1).bit_length() // 8))
    table = _digit_angles(rope, head_dim, digits)
    result = None
    for digit in range(digits):
        index = (positions >> (8 * digit)) & 255
        a, b = (jnp.take(jnp.asarray(part), index, axis=0) for part in _parts(table[digit]))
        if result is None:
            result = a, b
        else:
            cos, sin = result
            result = cos * a - sin * b, sin * a + cos * b
    return jax.lax.optimization_barrier(jnp.concatenate(result, axis=-1))


def _parts(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(table.real), np.ascontiguousarray(table.imag)


# ------------------------------------------------------------- sinks and rolling cache (3.2)


@flax.struct.dataclass
class SinkCache(RowCache):
    """Keys and values of the first S and the last W tokens of every row.

    layers: tuple of LayerCache with the chunks [B, G, S, K] (none without sinks) and [B, G, W, K];
    token p < S lies in slot p, a later one in slot S + (p - S) % W. Keys are unrotated with
    Rotation.IN_CACHE. read: int32 [B], tokens read, with the `sink_tokens` of the model in front.
    config: of the decoder that filled it.
    """

    layers: Any
    read: Any
    config: StreamingConfig = flax.struct.field(pytree_node=False)
    sink_tokens: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def create(
        cls, config: StreamingConfig, stack: TransformerConfig, rows: int, dtype: jnp.dtype
    ) -> "SinkCache":
        """The cache of rows that have read nothing."""
        shapes = [(rows, stack.kv_heads, size, stack.head_width) for size in config.chunks]
        zeros = tuple(jnp.zeros(shape, dtype) for shape in shapes)
        layer = LayerCache(key=zeros, value=zeros)
        layers, read = (layer,) * stack.num_layers, jnp.zeros((rows,), jnp.int32)
        return cls(layers=layers, read=read, config=config)

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: tokens of the text read."""
        return self.read - self.sink_tokens


class _Keys(NamedTuple):
    """Queries [B, T, H, K] with the keys [B, G, S, K] that they are rotated for, the values
    [B, G, S, J], which query sees which, and how far it is from it [B, T, S]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: jax.Array
    distance: jax.Array


def _attend(parts: list[_Keys], slopes, sink) -> jax.Array:
    """One softmax in float32 over the keys of all parts: [B, T, H, J]; slopes [H] of a linear bias
    and the logit [H] of a sink without a value, each or None."""
    (B, T, H, K), G = parts[0].query.shape, parts[0].key.shape[1]
    scores = []
    for part in parts:
        # Heads in front, so that no scores are turned around.
        q_BGRTK = jnp.moveaxis(part.query * K**-0.5, 2, 1).reshape(B, G, H // G, T, K)
        score = jnp.einsum(
            "bgrtk,bgsk->bgrts", q_BGRTK, part.key, preferred_element_type=jnp.float32
        )
        if slopes is not None:
            distance = part.distance.astype(jnp.float32)[:, None, None]
            score -= slopes.reshape(1, G, H // G, 1, 1) * distance
        scores.append(jnp.where(part.mask[:, None, None], score, NEGATIVE))
    # The parts stay apart: joined, all scores would be copied twice.
    highest = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    total = jnp.zeros((), jnp.float32)
    if sink is not None:
        sink_GR = sink.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
        highest = jnp.maximum(highest, sink_GR)
        total = jnp.exp(sink_GR - highest)
    out = jnp.zeros((), jnp.float32)
    for part, score in zip(parts, scores, strict=True):
        weights = jnp.exp(score - highest)
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        product = ("bgrts,bgsj->bgrtj", weights.astype(part.value.dtype), part.value)
        out = out + jnp.einsum(*product, preferred_element_type=jnp.float32)
    out_BHTJ = (out / total).reshape(B, H, T, -1)
    return jnp.moveaxis(out_BHTJ, 1, 2).astype(parts[0].query.dtype)


def _blocks(stack: TransformerConfig, layers, x, caches, attend):
    """All blocks over x [B, T, D], and their caches; attend(cache, sink, q, k, v) gives what one
    layer finds, and its cache."""
    H, G, after = stack.num_heads, stack.kv_heads, []
    for weights, cache in zip(layers, caches, strict=True):
        known = functools.partial(attend, cache, stack.sink_logits(weights.sink))
        x, cache = step.block(
            stack, weights, x, lambda qkv, known=known: known(*jnp.split(qkv, (H, H + G), axis=2))
        )
        after.append(cache)
    return x, tuple(after)


def stream_step(
    config: StreamingConfig,
    stack: TransformerConfig,
    layers: tuple[step.BlockWeights, ...],
    x: Float[Array, "B D"],
    cache: SinkCache,
    active: Bool[Array, " B"] | None = None,
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], SinkCache]:
    """`layers.step.transformer_step` with a SinkCache: one write per row and layer, no shift."""
    active = jnp.ones(x.shape[:1], bool) if active is None else active
    every = jnp.arange(x.shape[0], dtype=jnp.int32) if rows is None else rows
    S, W = config.num_sinks, config.recent
    position = jnp.take(cache.read, every, mode="clip")
    slot = jnp.where(position < S, position, S + (position - S) % W)
    slot = jnp.where(active, slot, S + W)
    token_BW, filled_BW = ring_index(jnp.full_like(position, S), position + 1, W)
    sink_1S = jnp.arange(S, dtype=jnp.int32)[None, :]

    raw = stack.rotates and config.rotation is Rotation.IN_CACHE
    limit = config.size if raw and config.positions is Positions.IN_CACHE else MAX_TOKENS
    table = _rotations(stack)
    to_recent, to_sinks = query_positions(config, position)
    shift_B1 = (to_recent - position)[:, None]
    rope_new = None if raw else table(position[:, None])
    recent = _Part(
        rope_query=table(to_recent[:, None], limit),
        rope_keys=table(jnp.maximum(token_BW + shift_B1, 0), limit) if raw else None,
        mask=filled_BW[:, None],
        distance=(position[:, None] - token_BW)[:, None],
    )
    parts = [recent]
    if S:
        sinks = _Part(
            rope_query=table(to_sinks[:, None], limit),
            rope_keys=table(sink_1S, S) if raw else None,
            mask=(sink_1S <= position[:, None])[:, None],
            distance=(to_sinks[:, None] - sink_1S)[:, None],
        )
        parts = [sinks, recent]

    def attend(layer, sink, q, k, v):
        k = _rotate(k, rope_new, stack.rope)
        layer = layer.write(k[:, 0], v[:, 0], slot, rows)
        keys, values = layer.key, layer.value
        if rows is not None:
            take = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
            keys, values = jax.tree.map(take, (keys, values))
        found = [
            part.keys(q, key, value, stack.rope)
            for part, key, value in zip(parts, keys, values, strict=True)
        ]
        return _attend(found, stack.slopes(), sink), layer

    x, caches = _blocks(stack, layers, x[:, None], cache.layers, attend)
    read = cache.read.at[every].add(active.astype(jnp.int32), mode="drop")
    return x[:, 0], cache.replace(layers=caches, read=read)


class _Part(NamedTuple):
    """What all layers share of one chunk of slots: tables of `stream_rope` for queries and keys
    (None: as they are), mask and distance [B, 1, S]."""

    rope_query: Any
    rope_keys: Any
    mask: jax.Array
    distance: jax.Array

    def keys(self, q, key, value, rope: RopeConfig) -> _Keys:
        key = _rotate_keys(key, self.rope_keys, rope)
        return _Keys(_rotate(q, self.rope_query, rope), key, value, self.mask, self.distance)


def _rotations(stack: TransformerConfig):
    """(positions, limit) -> `stream_rope` of a stack, None if it does not rotate."""

    def table(positions, limit=MAX_TOKENS):
        if not stack.rotates:
            return None
        return stream_rope(positions, stack.rope, stack.head_width, limit)

    return table


def _rotate(x, table, rope: RopeConfig):
    """x [B, T, H, K] rotated by a table [B, T, K], or [1, T, K] for all rows; None: as it is."""
    if table is None:
        return x
    return rotate(x, jnp.broadcast_to(table, (x.shape[0], *table.shape[1:])), rope.layout)


def _rotate_keys(key, table, rope: RopeConfig):
    """Keys [B, G, S, K] rotated as by `_rotate`."""
    return jnp.swapaxes(_rotate(jnp.swapaxes(key, 1, 2), table, rope), 1, 2)


# -------------------------------------------------------------------- many tokens at once


def extend(
    config: StreamingConfig,
    stack: TransformerConfig,
    layers: tuple[step.BlockWeights, ...],
    x: Float[Array, "B T D"],
    cache: SinkCache,
    counts: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], SinkCache]:
    """The first `counts` of T tokens per row, as `stream_step` would read them one after another.

    What is cached of a token depends on its own hidden state alone, so a layer can read all tokens
    before the next one does. Queries go in blocks, each with the W keys before its own ones and the
    sinks. Raises ValueError if T is no multiple of `block_size` and, outside jit, for counts that
    are not 0..T.
    """
    (B, T, _), S, W = x.shape, config.num_sinks, config.recent
    Q, first = block_size(config, T), cache.read
    if T % Q:
        raise ValueError(f"extend: {T} tokens are no multiple of the block of {Q}")
    if not isinstance(counts, jax.core.Tracer):
        known = np.asarray(counts)
        if known.shape != (B,) or known.min() < 0 or known.max() > T:
            raise ValueError(f"counts={known.tolist()}: must be one of 0..{T} for each of {B} rows")
    N, G, K = T // Q, stack.kv_heads, stack.head_width
    raw = stack.rotates and config.rotation is Rotation.IN_CACHE
    position_BT = first[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    table = _rotations(stack)

    # Kept tokens in order, then the new ones: number e has the index first - W + e of the text.
    index_E = jnp.arange(W + T, dtype=jnp.int32)
    token_BE = first[:, None] - W + index_E[None, :]
    old_BW = (token_BE[:, :W] - S) % W
    after_BW, _ = ring_index(jnp.full_like(first, S), first + counts, W)
    after_BW = jnp.clip(after_BW - first[:, None] + W, 0, W + T - 1)
    rope_E = table(index_E[None, :], W + T) if raw else None
    rope_BT = rope_E[:, W:] if raw else table(position_BT)
    if S:
        sink_S = jnp.arange(S, dtype=jnp.int32)
        new_BS = jnp.clip(sink_S[None, :] - first[:, None], 0, T - 1)
        is_new = sink_S[None, :] >= first[:, None]
        is_new &= sink_S[None, :] < (first + counts)[:, None]
        rope_S = table(sink_S[None, :], S)
        to_sinks = query_positions(config, position_BT)[1]
        rope_sinks = table(to_sinks)

    # Query i of a block sees the numbers i + 1 .. i + W of the keys from the block's start on.
    block_NF = (jnp.arange(N, dtype=jnp.int32) * Q)[:, None] + jnp.arange(W + Q)[None, :]
    distance_QF = jnp.arange(W + Q)[None, :] - jnp.arange(Q)[:, None]
    near_QF = (distance_QF > 0) & (distance_QF <= W)
    later_BNF = jnp.take(token_BE >= S, block_NF, axis=1)
    recent_mask = (later_BNF[:, :, None] & near_QF[None, None]).reshape(B * N, Q, W + Q)
    recent_distance = jnp.broadcast_to((W - distance_QF)[None], recent_mask.shape)

    def blocks(x_BTHK):
        return x_BTHK.reshape(B * N, Q, *x_BTHK.shape[2:])

    def key_blocks(x_BGEK):
        x = jnp.moveaxis(jnp.take(x_BGEK, block_NF, axis=2), 2, 1)
        return x.reshape(B * N, G, W + Q, K)

    def gather(x_BGSK, index_BS):
        return jnp.take_along_axis(x_BGSK, index_BS[:, None, :, None], axis=2)

    def attend(layer, sink, q, k, v):
        rotated = _rotate(k, rope_BT, stack.rope)
        # What is cached, and what is attended to.
        new_k, new_v = (jnp.swapaxes(x, 1, 2) for x in (k if raw else rotated, v))
        key, value = (
            jnp.concatenate([gather(chunks[-1], old_BW), new], axis=2)
            for chunks, new in ((layer.key, new_k), (layer.value, new_v))
        )
        kept = [[gather(x, after_BW)] for x in (key, value)]
        seen = _rotate_keys(key, rope_E, stack.rope)
        q_recent = _rotate(q, rope_BT, stack.rope)
        keys = (key_blocks(seen), key_blocks(value))
        parts = [_Keys(blocks(q_recent), *keys, recent_mask, recent_distance)]
        if S:
            mask = is_new[:, None, :, None]
            first_tokens = [
                jnp.where(mask, gather(new, new_BS), chunks[0])
                for chunks, new in ((layer.key, new_k), (layer.value, new_v))
            ]
            kept = [[a, *b] for a, b in zip(first_tokens, kept, strict=True)]
            key, value = first_tokens
            key = _rotate_keys(key, rope_S if raw else None, stack.rope)
            keys = (jnp.repeat(x, N, axis=0) for x in (key, value))
            q_sinks = blocks(_rotate(q, rope_sinks, stack.rope))
            visible = blocks(sink_S[None, None, :] <= position_BT[:, :, None])
            distance = blocks(to_sinks[:, :, None] - sink_S[None, None, :])
            parts.insert(0, _Keys(q_sinks, *keys, visible, distance))
        out = _attend(parts, stack.slopes(), sink).reshape(B, T, *q.shape[2:])
        return out, LayerCache(key=tuple(kept[0]), value=tuple(kept[1]))

    x, caches = _blocks(stack, layers, x, cache.layers, attend)
    return x, cache.replace(layers=caches, read=first + counts)


def block_size(config: StreamingConfig, length: int) -> int:
    """Queries per block of `extend` for `length` tokens."""
    return min(BLOCK, config.recent, length)


def piece_size(config: StreamingConfig, length: int) -> int:
    """Tokens read at once of prompts or streams of `length` tokens: whole blocks, about PIECE."""
    block = block_size(config, length)
    return block * max(1, min(PIECE // block, -(-length // block)))


# ------------------------------------------------------------------------------------- checks


def check_stack(config: StreamingConfig, stack: TransformerConfig) -> None:
    """Raises ValueError for a stack whose own window is shorter than the cache; warns for a cache
    longer than the rows of the training."""
    if 0 < stack.window < config.size:
        raise ValueError(
            f"num_sinks + window = {config.size}: the model attends to window={stack.window} "
            "tokens at most, the cache must not be larger"
        )
    if 0 < config.trained_length < config.size:
        warnings.warn(
            f"the cache has {config.size} positions, the model was trained on "
            f"{config.trained_length}: it may fail beyond them",
            stacklevel=3,
        )


def check_cache(
    config: StreamingConfig, stack: TransformerConfig, cache: SinkCache, rows: int
) -> None:
    """Raises ValueError for a cache of another config, model or number of rows, TypeError for one
    of another kind of decoder."""
    if not isinstance(cache, SinkCache):
        raise TypeError(f"cache is a {type(cache).__name__}: must be a SinkCache")
    if cache.config != config:
        raise ValueError(f"cache is one of {cache.config}: must be one of {config}")
    layer = cache.layers[0]
    sizes = tuple(chunk.shape[2] for chunk in layer.key)
    B, G, _, K = layer.key[0].shape
    found = (B, len(cache.layers), sizes, G, K)
    wanted = (rows, stack.num_layers, config.chunks, stack.kv_heads, stack.head_width)
    if found != wanted:
        raise ValueError(
            f"cache has (rows, layers, slots, kv heads, head width) = {found}: must be {wanted}"
        )
