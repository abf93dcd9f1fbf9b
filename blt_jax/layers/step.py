"""One token per row through a stack of transformer blocks: the inner loop of generation; and
the loops that read more tokens after those of a cache.

The layers are unrolled over weights that were taken apart once before the loop, because at one row
the time goes into reading weights and caches, and every slice of a stacked array would be a copy.
The equations are those of `layers.transformer`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers.attention import masked_attention
from blt_jax.layers.cache import LayerCache, StepCache, ring_index
from blt_jax.layers.embed import check_token_ids
from blt_jax.layers.masks import NEGATIVE
from blt_jax.layers.norms import rms_norm
from blt_jax.layers.rope import rope_table, rotate
from blt_jax.layers.transformer import TransformerConfig


@flax.struct.dataclass
class BlockWeights:
    """Weights of one block: qkv [D, (H + 2 G) K], out [H K, D], gate, up [D, F], down [F, D], sink
    [H] if it is learned.

    Gate and up stay apart: for few rows XLA:CPU takes twice as long for one product of both.
    """

    attention_norm: Any
    qkv: Any
    out: Any
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any
    sink: Any = None


def block_weights(layers: dict[str, Any], dtype: jnp.dtype) -> tuple[BlockWeights, ...]:
    """Weights of every layer from parameters stacked on a leading axis."""

    def of_layer(layer):
        attention, mlp = layer["attention"], layer["mlp"]
        qkv = [flat_kernel(attention[name]) for name in ("query", "key", "value")]
        out = attention["out"]
        return BlockWeights(
            attention_norm=layer["attention_norm"]["weight"],
            qkv=jnp.concatenate(qkv, axis=1).astype(dtype),
            out=out.reshape(-1, out.shape[-1]).astype(dtype),
            mlp_norm=layer["mlp_norm"]["weight"],
            gate=mlp["gate"].astype(dtype),
            up=mlp["up"].astype(dtype),
            down=mlp["down"].astype(dtype),
            sink=attention.get("sink"),
        )

    return tuple(of_layer(layer) for layer in unstack(layers))


def unstack(tree: Any) -> list[Any]:
    """One tree per index of the leading axis that all leaves share."""
    length = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(length)]


def flat_kernel(kernel: Float[Array, "D H K"]) -> Float[Array, "D E"]:
    """A projection to heads as a matrix."""
    return kernel.reshape(kernel.shape[0], -1)


def attend_slots(
    q: Float[Array, "B H K"],
    cache: LayerCache,
    begin: Int[Array, " B"],
    end: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
    scale: float | None = None,
    *,
    slopes: Float[Array, " H"] | None = None,
    distance: Int[Array, "B S"] | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B H J"]:
    """One query per row over the slots begin..end-1 of its cache; at least one must be there.

    rows: the rows of the cache that the queries belong to, None for all in order. scale: of the
    scores, None for K^-0.5. J is the width of the values. slopes: slope times the distance from
    the query to the key of each slot is subtracted from its score. sink: one logit per head that
    takes part in the softmax and has no value. Chunks that no row needs are skipped; the others
    are joined by an online softmax in float32. Raises ValueError for slopes without distance.
    """
    if slopes is not None and distance is None:
        raise ValueError("attend_slots: distance=None, but slopes need that of every slot")
    (B, H, K), G = q.shape, cache.key[0].shape[1]
    q_NRK = (q * (K**-0.5 if scale is None else scale)).reshape(B * G, H // G, K)

    def chunk_sums(key, value, start):
        S = key.shape[2]
        if rows is not None:
            key, value = (jnp.take(x, rows, axis=0, mode="clip") for x in (key, value))
        slot_S = start + jnp.arange(S, dtype=jnp.int32)[None, :]
        mask_BS = (slot_S >= begin[:, None]) & (slot_S < end[:, None])
        scores = jnp.einsum(
            "nrk,nsk->nrs", q_NRK, key.reshape(B * G, S, K), preferred_element_type=jnp.float32
        )
        mask, scores = mask_BS[:, None, None, :], scores.reshape(B, G, H // G, S)
        if slopes is not None:
            far_BS = distance[:, start : start + S].astype(jnp.float32)
            scores -= slopes.reshape(1, G, -1, 1) * far_BS[:, None, None, :]
        scores = jnp.where(mask, scores, NEGATIVE)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(scores - highest), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.reshape(B * G, H // G, S).astype(value.dtype)
        values = value.reshape(B * G, S, -1)
        out = jnp.einsum("nrs,nsj->nrj", weights, values, preferred_element_type=jnp.float32)
        return highest, total, out.reshape(B, G, H // G, -1)

    def merge(a, b):
        highest = jnp.maximum(a[0], b[0])
        scale_a, scale_b = jnp.exp(a[0] - highest), jnp.exp(b[0] - highest)
        return highest, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b

    sums, start = None, 0
    for key, value in zip(cache.key, cache.value, strict=True):
        if sums is None:
            sums = chunk_sums(key, value, start)
        else:
            needed = jnp.any((begin < start + key.shape[2]) & (end > start))
            sums = jax.lax.cond(
                needed,
                lambda sums, key, value, start=start: merge(sums, chunk_sums(key, value, start)),
                lambda sums, key, value: sums,
                sums,
                key,
                value,
            )
        start += key.shape[2]
    if sink is not None:
        logit = sink.astype(jnp.float32).reshape(1, G, -1, 1)
        sums = merge(sums, (logit, jnp.ones_like(logit), jnp.zeros_like(logit)))
    _, total, out = sums
    return (out / total).reshape(B, H, -1).astype(q.dtype)


def block(
    config: TransformerConfig,
    weights: BlockWeights,
    x: Float[Array, "*B D"],
    attend: Callable[[jax.Array], tuple[jax.Array, LayerCache]],
) -> tuple[Float[Array, "*B D"], LayerCache]:
    """One block around `attend`: queries, keys and values side by side [*B, H + 2 G, K], not
    rotated, give what was found [*B, H, K] and the cache with the new tokens."""
    heads = config.num_heads + 2 * config.kv_heads
    with jax.named_scope("attention"):
        h = rms_norm(x, weights.attention_norm, config.norm_eps)
        qkv = (h @ weights.qkv).reshape(*x.shape[:-1], heads, config.head_width)
        out, cache = attend(qkv)
        x = x + out.reshape(*x.shape[:-1], -1) @ weights.out
    with jax.named_scope("mlp"):
        h = rms_norm(x, weights.mlp_norm, config.norm_eps)
        x = x + (jax.nn.silu(h @ weights.gate) * (h @ weights.up)) @ weights.down
    return x, cache


def block_step(
    config: TransformerConfig,
    weights: BlockWeights,
    x: Float[Array, "B D"],
    positions: Float[Array, "B 1 K"] | Int[Array, "B S"],
    cache: LayerCache,
    slot: Int[Array, " B"],
    end: Int[Array, " B"],
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], LayerCache]:
    """`block` of one token per row: its key and value go to `slot`, then it attends to the slots
    before `end`.

    positions: from `step_positions`. rows: the rows of the cache that x belongs to, None for all in
    order.
    """
    H, G = config.num_heads, config.kv_heads

    def attend(qkv_BHK):
        qk_BHK, slopes, distance = qkv_BHK[:, : H + G], config.slopes(), None
        if config.rotates:
            qk_BHK = rotate(qk_BHK[:, None], positions, config.rope.layout)[:, 0]
        else:
            distance = positions
        written = cache.write(qk_BHK[:, H:], qkv_BHK[:, H + G :], slot, rows)
        begin, sink = jnp.zeros_like(end), config.sink_logits(weights.sink)
        options = dict(slopes=slopes, distance=distance, sink=sink)
        return attend_slots(qk_BHK[:, :H], written, begin, end, rows, **options), written

    return block(config, weights, x, attend)


def step_positions(
    config: TransformerConfig, cache: StepCache, rows: Int[Array, " B"] | None = None
) -> Float[Array, "B 1 K"] | Int[Array, "B S"]:
    """What the blocks read of the next token of `rows` (None: all): its rotation, or for ALIBI its
    distance from the token in every slot."""
    if not config.rotates:
        return cache.distances(rows)
    positions = cache.pinned + cache.lengths_of(rows)
    return rope_table(positions[:, None], config.rope, config.head_width)


def transformer_step(
    config: TransformerConfig,
    layers: tuple[BlockWeights, ...],
    x: Float[Array, "B D"],
    cache: StepCache,
    active: Bool[Array, " B"] | None = None,
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], StepCache]:
    """All blocks. Positions count the tokens in the cache; rows not `active` leave it alone.

    rows: the rows of the cache that x belongs to, each at most once, None for all in order; a row
    beyond the cache must not be active.
    """
    active = jnp.ones(x.shape[:1], bool) if active is None else active
    before = cache.lengths_of(rows)
    positions, slot = step_positions(config, cache, rows), cache.next_slot(active, rows)
    step = active.astype(jnp.int32)
    end, caches = jnp.clip(cache.pinned + before + step, 1, cache.slots), []
    for weights, layer in zip(layers, cache.layers, strict=True):
        x, layer = block_step(config, weights, x, positions, layer, slot, end, rows)
        caches.append(layer)
    every = jnp.arange(x.shape[0], dtype=jnp.int32) if rows is None else rows
    lengths = cache.lengths.at[every].add(step, mode="drop")
    return x, cache.replace(layers=tuple(caches), lengths=lengths)


def transformer_extend(
    config: TransformerConfig,
    layers: tuple[BlockWeights, ...],
    x: Float[Array, "B T D"],
    cache: StepCache,
    counts: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], StepCache]:
    """`transformer_step` of the first `counts` of T tokens per row, all at once.

    Scores are those of T queries and all slots and new keys.
    """
    B, T, _ = x.shape
    H, G, pinned, first = config.num_heads, config.kv_heads, cache.pinned, cache.lengths
    ring, start = cache.slots - pinned, jnp.zeros_like(first)
    new_BT = first[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    old_BR, filled_BR = ring_index(start, first, ring)
    pinned_BP = jnp.broadcast_to(jnp.arange(-pinned, 0, dtype=jnp.int32), (B, pinned))
    distance = new_BT[:, :, None] - jnp.concatenate([pinned_BP, old_BR, new_BT], 1)[:, None, :]
    inside = (distance >= 0) & (distance < ring)
    inside &= jnp.concatenate([pinned_BP < 0, filled_BR, new_BT >= 0], axis=1)[:, None, :]
    mask = inside | (jnp.arange(cache.slots + T) < pinned)[None, None, :]
    slopes, bias = config.slopes(), None
    if slopes is not None:
        bias = -slopes[None, :, None, None] * distance.astype(jnp.float32)[:, None]
    rope = rope_table(pinned + new_BT, config.rope, config.head_width) if config.rotates else None
    # Which of the new tokens lies in each slot afterwards, if not the token that lay there.
    after_BR = ring_index(start, first + counts, ring)[0]
    is_new = (after_BR >= first[:, None])[:, :, None, None]
    index = jnp.clip(after_BR - first[:, None], 0, T - 1)[:, :, None, None]

    def attend(layer, sink, qkv):
        qk, v = qkv[:, :, : H + G], qkv[:, :, H + G :]
        if rope is not None:
            qk = rotate(qk, rope, config.rope.layout)
        dtype, pairs = layer.key[0].dtype, []
        for chunks, new in ((layer.key, qk[:, :, H:]), (layer.value, v)):
            pairs.append((jnp.swapaxes(jnp.concatenate(chunks, axis=2), 1, 2), new.astype(dtype)))
        keys, values = (jnp.concatenate(pair, axis=1) for pair in pairs)
        out = masked_attention(qk[:, :, :H], keys, values, mask, bias=bias, sink=sink)
        kept = []
        for old, new in pairs:
            recent = jnp.where(is_new, jnp.take_along_axis(new, index, axis=1), old[:, pinned:])
            kept.append(jnp.concatenate([old[:, :pinned], recent], axis=1))
        return out, LayerCache.from_slots(*kept, dtype)

    caches = []
    for weights, layer in zip(layers, cache.layers, strict=True):
        sink = config.sink_logits(weights.sink)
        x, layer = block(config, weights, x, functools.partial(attend, layer, sink))
        caches.append(layer)
    return x, cache.replace(layers=tuple(caches), lengths=first + counts)


def in_pieces(x: Int[Array, "B T"], size: int) -> Int[Array, "N B P"]:
    """Pieces of `size` tokens, the last one padded with 0."""
    B, T = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % size)])
    return jnp.swapaxes(x.reshape(B, -1, size), 0, 1)


def extend_in_pieces(
    read: Callable[..., tuple[jax.Array, Any]],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: tuple[Float[Array, "B D"], Any],
    size: int,
) -> tuple[Float[Array, "B D"], Any]:
    """Reads the first `lengths` tokens of every row, `size` at once: the hidden state after the
    last one, and the cache.

    read(tokens [B, P], cache, counts [B]) gives hidden states [B, P, D] and the cache after
    `counts` of these tokens. state: hidden states of rows of no tokens, and the cache before.
    """
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    pieces = in_pieces(jnp.where(valid, tokens.astype(jnp.int32), 0), size)

    def piece(state, inputs):
        start, tokens = inputs
        counts = jnp.clip(lengths.astype(jnp.int32) - start, 0, size)
        x, cache = read(tokens, state[1], counts)
        last_BD = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return (jnp.where((counts > 0)[:, None], last_BD, state[0]), cache), None

    starts = jnp.arange(pieces.shape[0], dtype=jnp.int32) * size
    return jax.lax.scan(piece, state, (starts, pieces))[0]


def extend_by_steps(
    read: Callable[..., tuple[jax.Array, Any]],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    state: tuple[Float[Array, "B V"], Any],
    first: int = 0,
) -> tuple[Float[Array, "B V"], Any]:
    """Reads the tokens `first`..lengths-1 of every row one after another: the logits after the last
    one, and the cache. read: the step of a Decoder. state: before them, both."""

    def body(index, state):
        active = index < lengths
        logits, cache = read(tokens[:, index], state[1], active)
        return jnp.where(active[:, None], logits, state[0]), cache

    return jax.lax.fori_loop(first, jnp.max(lengths), body, state)


def window_slots(config: TransformerConfig, capacity: int) -> int:
    """Slots that a stack needs for rows of up to `capacity` tokens."""
    return min(config.window, capacity) if config.window else capacity


def check_prompts(tokens: Any, lengths: Any, capacity: int, vocab_size: int) -> None:
    """Raises for prompts that would give a silently wrong result.

    TypeError for ids that are no integers; ValueError for an empty prompt, a length beyond the
    padded prompts, prompts beyond `capacity`, and ids outside the vocabulary. Values are checked
    where they are known, that is outside jit.
    """
    check_token_ids("tokens", tokens)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"tokens {tokens.shape}, lengths {lengths.shape}: must be [B, T] and [B]")
    T = tokens.shape[1]
    if T == 0:
        raise ValueError("tokens is empty: a prompt needs at least one token (BOS)")
    if capacity < T:
        raise ValueError(f"prompts of {T} tokens exceed capacity={capacity}")
    if isinstance(lengths, jax.core.Tracer) or isinstance(tokens, jax.core.Tracer):
        return
    lengths = np.asarray(lengths)
    if lengths.min() < 1 or lengths.max() > T:
        raise ValueError(
            f"lengths={lengths.tolist()}: every prompt needs 1..{T} tokens (start it with BOS)"
        )
    check_token_ids("tokens", tokens, vocab_size, np.arange(T)[None, :] < lengths[:, None])


def check_step(tokens: Any, lengths: Any, active: Any, capacity: int, vocab_size: int) -> None:
    """Raises for one more token per row after `lengths` known ones, as `check_prompts` and
    `check_room` do; rows that are known not to be active may hold anything."""
    check_token_ids("tokens", tokens, vocab_size, active)
    if any(isinstance(x, jax.core.Tracer) for x in (lengths, active)):
        return
    growing = np.asarray(lengths) if active is None else np.asarray(lengths)[np.asarray(active)]
    if growing.size:
        check_room(growing, 1, capacity)


def check_extension(tokens: Any, lengths: Any, read: Any, capacity: int, vocab_size: int) -> None:
    """As `check_prompts`, of tokens that come after `read` [B] known ones; raises ValueError also
    for rows that have no room for them, or that are not as many."""
    check_prompts(tokens, lengths, capacity, vocab_size)
    if read.shape != lengths.shape:
        raise ValueError(f"cache has {read.shape[0]} rows: must be {tokens.shape[0]}, as tokens")
    check_room(read, lengths, capacity)


def check_room(lengths: Any, new_tokens: Any, capacity: int) -> None:
    """Raises ValueError where rows of `lengths` known tokens cannot take `new_tokens` more."""
    if isinstance(lengths, jax.core.Tracer) or isinstance(new_tokens, jax.core.Tracer):
        return
    known, new = np.broadcast_arrays(np.asarray(lengths, np.int64).ravel(), new_tokens)
    longest = np.argmax(known + new)
    if known[longest] + new[longest] > capacity:
        raise ValueError(
            f"{known[longest]} tokens and {new[longest]} new ones exceed capacity={capacity}: "
            "make a decoder with more"
        )
