"""Megalodon (arXiv 2404.08801) token by token and piece by piece, with a state of constant size.

A row's state is the keys and values of its current chunk (or window), the moving average of every
layer, and the statistics of every norm. The equations are those of `megalodon.block`; here are the
attention of new tokens to a kept chunk, and the loop over pieces of long rows.

Shapes as in `megalodon`; S slots of the kept keys, the reach of the attention.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers import step
from blt_jax.layers.cache import LayerCache, ring_index
from blt_jax.layers.embed import look_up
from blt_jax.layers.rope import rope_table
from blt_jax.models.megalodon import (
    LayerState,
    Megalodon,
    MegalodonCache,
    block,
    full_attention,
)
from blt_jax.models.megalodon_config import MegalodonConfig
from blt_jax.models.megalodon_memory import (
    Documents,
    ema_coefficients,
    fresh_norm_state,
    timestep_norm,
)

PIECE = 1024
"""Most tokens that `extend` takes at once; its scores are those of PIECE queries and S + PIECE
keys."""


def new_cache(model: Megalodon, params: dict[str, Any], rows: int) -> MegalodonCache:
    """The state of rows that have read nothing."""
    config = model.config
    dtype, zeros = config.precision.dtype, jnp.zeros
    heads, S = config.num_heads, config.reach
    state = zeros((rows, config.d_model, config.ema_size), jnp.float32)
    keys = LayerCache.create(rows, heads, S, config.head_dim, dtype)
    values = LayerCache.create(rows, heads, S, config.value_width, dtype)
    attention = LayerCache(key=keys.key, value=values.value)
    layers = tuple(
        LayerState(attention, (state, state), fresh_norm_state(config, w, "norm", rows))
        for w in step.unstack(params["layers"])
    )
    norm = fresh_norm_state(config, params, "norm", rows)
    return MegalodonCache(layers, norm, zeros((rows,), jnp.int32))


def block_weights(config: MegalodonConfig, params: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Parameters of every layer, projections in the compute type, the coefficients of the moving
    average worked out: once before a loop."""
    dtype = config.precision.dtype

    def of_layer(w):
        kernel = lambda name: name.endswith("kernel") or name in ("mlp_gate", "mlp_up", "mlp_down")  # noqa: E731
        cast = {name: x.astype(dtype) if kernel(name) else x for name, x in w.items()}
        return cast | {"coefficients": ema_coefficients(config, w)}

    return tuple(of_layer(w) for w in step.unstack(params["layers"]))


def attend_with_cache(
    config: MegalodonConfig,
    cache: LayerCache,
    lengths: Int[Array, " B"],
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H J"],
    counts: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T H J"], LayerCache]:
    """New tokens after `lengths` known ones: attention over kept and new keys, which may lie in
    two chunks, and the cache with the first `counts` new ones in it; None: all of them."""
    T, slots, start = q.shape[1], config.reach, jnp.zeros_like(lengths)
    new_BT = lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    position_BS = jnp.concatenate([ring_index(start, lengths, slots)[0], new_BT], axis=1)
    distance = new_BT[:, :, None] - position_BS[:, None, :]
    mask = (distance >= 0) & (position_BS >= 0)[:, None, :]
    if config.attention_window:
        mask &= distance < config.attention_window
    else:
        c = config.chunk_size
        mask &= new_BT[:, :, None] // c == position_BS[:, None, :] // c
    keys, values = (
        jnp.concatenate([jnp.swapaxes(jnp.concatenate(old, axis=2), 1, 2), new], axis=1)
        for old, new in ((cache.key, k), (cache.value, v))
    )
    out = full_attention(config, q, keys, values, mask)
    # Which of the kept and new tokens lies in each slot afterwards.
    end = lengths + (T if counts is None else counts)
    after_BS = ring_index(start, end, slots)[0]
    index = jnp.where(
        after_BS < lengths[:, None], jnp.arange(slots), slots + after_BS - lengths[:, None]
    )

    kept = (jnp.take_along_axis(x, index[:, :, None, None], axis=1) for x in (keys, values))
    return out, LayerCache.from_slots(*kept, cache.key[0].dtype)


def attend_step(
    config: MegalodonConfig,
    cache: LayerCache,
    lengths: Int[Array, " B"],
    active: Bool[Array, " B"],
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 H K"],
    v: Float[Array, "B 1 H J"],
) -> tuple[Float[Array, "B 1 H J"], LayerCache]:
    """`attend_with_cache` of one token, for few rows; rows not `active` keep their cache."""
    if config.elementwise:
        out, after = attend_with_cache(config, cache, lengths, q, k, v)
        return out, select_rows(active, after, cache)
    slots = config.reach
    slot = jnp.where(active, lengths % slots, slots)
    cache = cache.write(k[:, 0], v[:, 0], slot)
    end = lengths % slots + 1
    if config.attention_window:
        end = jnp.minimum(lengths + 1, slots)
    out = step.attend_slots(q[:, 0], cache, jnp.zeros_like(end), end, scale=1.0)
    return out[:, None], cache


@flax.struct.dataclass
class MegalodonDecoder:
    """Decoder of a Megalodon language model; rows may be as long as counters reach.

    capacity: tokens a row may reach, which costs no memory.
    """

    model: Megalodon = flax.struct.field(pytree_node=False)
    params: Any
    capacity: int = flax.struct.field(pytree_node=False)
    weights: Any = None
    """Of `block_weights`, see `prepare`."""

    @classmethod
    def create(
        cls, model: Megalodon, params: dict[str, Any], capacity: int = 2**31 - 1
    ) -> "MegalodonDecoder":
        """Raises ValueError for a capacity below 1 or beyond the 32-bit counters."""
        if not 1 <= capacity < 2**31:
            raise ValueError(f"capacity={capacity}: must be 1..{2**31 - 1} tokens")
        return cls(model=model, params=params, capacity=capacity)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def prepare(self) -> "MegalodonDecoder":
        if self.weights is not None:
            return self
        return self.replace(weights=block_weights(self.model.config, self.params))

    def new_cache(self, rows: int) -> MegalodonCache:
        """The state of rows that have read nothing."""
        return new_cache(self.model, self.params, rows)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B V"], MegalodonCache]:
        """As Decoder.prefill, by the full forward pass; segment_ids: of packed or left-padded rows
        of `lengths` tokens with padding, the last document of which goes on.

        Raises also TypeError for segment_ids that are no integers and, outside jit, ValueError for
        lengths at which no document ends its row.
        """
        if segment_ids is not None:
            step.check_token_ids("segment_ids", segment_ids)
            tokens = jnp.where(segment_ids > 0, tokens, jnp.zeros((), tokens.dtype))
        step.check_prompts(tokens, lengths, self.capacity, self.vocab_size)
        lengths = lengths.astype(jnp.int32)
        real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        tokens = jnp.where(real, tokens.astype(jnp.int32), 0)
        output = self.model.apply(
            {"params": self.params}, tokens, segment_ids, lengths, compute_logits=False
        )
        last_B1D = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)
        return self.model.token_logits(self.params, last_B1D[:, 0]), output.cache

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: MegalodonCache
    ) -> tuple[Float[Array, "B V"], MegalodonCache]:
        """Reads the first `lengths` tokens of every row, in pieces: logits after the last of each.

        Memory does not grow with T beyond the tokens themselves. Rows may have read different
        numbers of tokens; a piece that some row does not fill takes a second moving average.
        Outside jit, raises ValueError for ids outside the vocabulary, rows without room, and a
        cache that is not this model's or has NaN.
        """
        check_cache(self.model.config, cache, tokens.shape[0])
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, self.vocab_size)
        decoder, B = self.prepare(), tokens.shape[0]
        size = min(tokens.shape[1], self.model.config.reach, PIECE)
        empty = jnp.zeros((B, self.model.config.d_model), self.model.config.precision.dtype)

        def read(tokens, cache, counts):
            def whole(tokens, cache, counts):
                del counts
                return decoder._piece(tokens, cache)

            def part(tokens, cache, counts):
                return decoder._piece(tokens, cache, counts=counts)

            return jax.lax.cond(jnp.all(counts == size), whole, part, tokens, cache, counts)

        hidden, cache = step.extend_in_pieces(read, tokens, lengths, (empty, cache), size)
        return self.model.token_logits(self.params, hidden), cache

    def extend_logits(
        self, tokens: Int[Array, "B T"], cache: MegalodonCache
    ) -> tuple[Float[Array, "B T V"], MegalodonCache]:
        """`extend` of rows that all have T tokens, with the logits after every one."""
        check_cache(self.model.config, cache, tokens.shape[0])
        counts = np.full(tokens.shape[:1], tokens.shape[1])
        step.check_extension(tokens, counts, cache.lengths, self.capacity, self.vocab_size)
        decoder, T = self.prepare(), tokens.shape[1]
        size = min(T, self.model.config.reach, PIECE)
        whole, parts = T // size * size, []
        if whole > size:
            pieces = step.in_pieces(tokens[:, :whole], size)
            cache, hidden = jax.lax.scan(lambda c, x: decoder._piece(x, c)[::-1], cache, pieces)
            parts += list(hidden)
        else:
            hidden, cache = decoder._piece(tokens[:, :whole], cache)
            parts.append(hidden)
        if whole < T:
            hidden, cache = decoder._piece(tokens[:, whole:], cache)
            parts.append(hidden)
        return self.model.token_logits(self.params, jnp.concatenate(parts, axis=1)), cache

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: MegalodonCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], MegalodonCache]:
        """As Decoder.step. Raises ValueError for a cache that is not this model's, and outside jit
        for one that has NaN."""
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        check_cache(self.model.config, cache, tokens.shape[0])
        active = jnp.ones(tokens.shape, bool) if active is None else active
        hidden, cache = self.prepare()._piece(tokens[:, None], cache, active)
        return self.model.token_logits(self.params, hidden[:, 0]), cache

    def _piece(self, tokens, cache, active=None, counts=None):
        """All layers over the next tokens [B, T] of every row, or over the first `counts` of them;
        T = 1 where `active` is given."""
        config, params = self.model.config, self.params
        sharding = dataclasses.replace(self.model.sharding, length=())
        x = look_up(params["embed"]["table"], tokens, sharding).astype(config.precision.dtype)
        if config.scale_embeddings:
            x *= config.d_model**0.5
        index_1T = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        position = cache.lengths[:, None] + index_1T
        if not config.attention_window:
            position = position % config.chunk_size
        rope = rope_table(position, config.rope, config.head_dim)
        documents, read = None, tokens.shape[1] if active is None else active.astype(jnp.int32)
        if counts is not None:
            # For the norms, which look at real tokens and resets alone.
            read, real = counts, index_1T < counts[:, None]
            documents = Documents(real, jnp.zeros_like(real), position, real)
        layers = []
        for w, state in zip(self.weights, cache.layers, strict=True):
            arguments = (config, state.attention, cache.lengths)
            attend = functools.partial(attend_with_cache, *arguments, counts=counts)
            if active is not None:
                attend = functools.partial(attend_step, *arguments, active)
            x, after = block(
                config,
                sharding,
                w,
                x,
                rope,
                attend,
                documents=documents,
                norm_state=state.norm,
                ema_state=state.ema,
                lengths=counts,
                coefficients=w["coefficients"],
            )
            layers.append(_keep(active, after, state))
        norms = dict(config=config, sharding=sharding)
        x, norm = timestep_norm(x, params, "norm", cache.norm, documents, **norms)
        norm = select_rows(active, norm, cache.norm)
        return x, MegalodonCache(tuple(layers), norm, cache.lengths + read)


def _keep(active, after: LayerState, before: LayerState) -> LayerState:
    """The state after a step, of rows not `active` that before it; attention has done so."""
    ema, norm = select_rows(active, (after.ema, after.norm), (before.ema, before.norm))
    return LayerState(after.attention, ema, norm)


def select_rows(active: Bool[Array, " B"] | None, after: Any, before: Any) -> Any:
    """`after` in the rows that are active, else `before`; None: all are."""
    if active is None:
        return after
    return jax.tree.map(
        lambda a, b: jnp.where(active.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), after, before
    )


def check_cache(config: MegalodonConfig, cache: MegalodonCache, rows: int) -> None:
    """Raises ValueError for a cache of other rows or another configuration; outside jit also for
    one that holds NaN."""
    G, N = config.norm_groups, config.ema_size
    if len(cache.layers) != config.num_layers:
        raise ValueError(
            f"cache has {len(cache.layers)} layers: the model has num_layers={config.num_layers}"
        )
    layer = cache.layers[0]
    keys, values = layer.attention.key[0].shape, layer.attention.value[0].shape
    found = (
        layer.ema[0].shape,
        layer.norm.mean.shape,
        layer.attention.slots,
        keys[1::2],
        values[3],
    )
    heads = (config.num_heads, config.head_dim)
    needed = ((rows, config.d_model, N), (rows, G), config.reach, heads, config.value_width)
    names = ("ema", "norm", "attention slots", "heads and their width", "value width")
    for name, a, b in zip(names, found, needed, strict=True):
        if a != b:
            raise ValueError(f"cache: {name} is {a}, but these rows and this model need {b}")
    if isinstance(cache.lengths, jax.core.Tracer):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and bool(jnp.isnan(leaf).any()):
            raise ValueError(f"cache{jax.tree_util.keystr(path)} holds NaN")
