"""Decoders of plain transformers with the cache policies of StreamingLLM (arXiv 2309.17453).

The equations are those of `streaming_llm`: with sinks or a window, rows are read and continued
without end, prompts of any length among them; re-computation and dense attention are what the
paper compares them with.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.decoding.decoder import Decoder, OverTransformer, TransformerDecoder
from blt_jax.decoding.streaming_llm import (
    MAX_TOKENS,
    Policy,
    SinkCache,
    StreamingConfig,
    block_size,
    check_cache,
    check_stack,
    extend,
    piece_size,
    stream_step,
)
from blt_jax.layers import step
from blt_jax.layers.cache import RowCache, ring_index
from blt_jax.layers.model import Model
from blt_jax.models.llama3 import Llama3


@flax.struct.dataclass
class StreamingDecoder(OverTransformer):
    """Decoder of a plain transformer with sinks and a window: rows never run full.

    Make it with `streaming_decoder`, which checks the parts.
    """

    model: Llama3 = flax.struct.field(pytree_node=False)
    params: Any
    config: StreamingConfig = flax.struct.field(pytree_node=False)
    weights: Any = None
    """Tuple of step.BlockWeights, see `prepare`."""

    capacity = MAX_TOKENS
    """Bounded by the type of the positions alone."""

    def new_cache(self, rows: int) -> SinkCache:
        """The cache of rows that have read nothing but the sink tokens of the model, if any."""
        dtype, count = self.model.config.precision.dtype, self.model.config.sink_tokens
        cache = SinkCache.create(self.config, self._stack, rows, dtype)
        if not count:
            return cache
        x_ND = self.params["sink_tokens"].astype(dtype)
        x_ND = jnp.pad(x_ND, [(0, -count % block_size(self.config, count)), (0, 0)])
        x_BND, counts = jnp.repeat(x_ND[None], rows, axis=0), jnp.full((rows,), count, jnp.int32)
        layers = self.prepare().weights
        _, cache = extend(self.config, self._stack, layers, x_BND, cache, counts)
        return cache.replace(sink_tokens=count)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], SinkCache]:
        """As Decoder.prefill; prompts may be longer than the cache."""
        return self.extend(tokens, lengths, self.new_cache(tokens.shape[0]))

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: SinkCache
    ) -> tuple[Float[Array, "B V"], SinkCache]:
        """As Decoder.extend; tokens are evicted one by one, so T may be above the window. Raises
        ValueError or TypeError for a cache of another decoder."""
        check_cache(self.config, self._stack, cache, tokens.shape[0])
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, self.vocab_size)
        size = piece_size(self.config, tokens.shape[1])
        state = self._no_tokens(tokens.shape[0]), cache
        x, cache = step.extend_in_pieces(self.prepare().read, tokens, lengths, state, size)
        return self.model.token_logits(self.params, x), cache

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: SinkCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], SinkCache]:
        """As Decoder.step. Raises ValueError for a cache of another size."""
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        check_cache(self.config, self._stack, cache, tokens.shape[0])
        x, cache = stream_step(
            self.config, self._stack, self.prepare().weights, self._embed(tokens), cache, active
        )
        return self.model.token_logits(self.params, self._final_norm(x)), cache

    def read(
        self, tokens: Int[Array, "B T"], cache: SinkCache, counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], SinkCache]:
        """Hidden states, as the head reads them, of `counts` more tokens per row; T is a multiple
        of `block_size`."""
        layers = self.prepare().weights
        x, cache = extend(self.config, self._stack, layers, self._embed(tokens), cache, counts)
        return self._final_norm(x), cache


@flax.struct.dataclass
class TextCache(RowCache):
    """The last C tokens of every row: text int32 [B, C], token p in slot p % C; lengths [B]."""

    text: Any
    lengths: Any


@flax.struct.dataclass
class RecomputeDecoder(OverTransformer):
    """Decoder that reads the last C tokens anew for every token (Fig. 1 c): O(C^2) per token."""

    model: Llama3 = flax.struct.field(pytree_node=False)
    params: Any
    config: StreamingConfig = flax.struct.field(pytree_node=False)

    capacity = MAX_TOKENS
    """Bounded by the type of the positions alone."""

    def prepare(self) -> "RecomputeDecoder":
        return self

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], TextCache]:
        """As Decoder.prefill."""
        rows, C = tokens.shape[0], self.config.window
        text, none = jnp.zeros((rows, C), jnp.int32), jnp.zeros((rows,), jnp.int32)
        return self.extend(tokens, lengths, TextCache(text=text, lengths=none))

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: TextCache
    ) -> tuple[Float[Array, "B V"], TextCache]:
        """As Decoder.extend. Raises ValueError or TypeError for a cache of another decoder."""
        self._check_cache(cache, tokens.shape[0])
        before, C = cache.lengths, self.config.window
        step.check_extension(tokens, lengths, before, self.capacity, self.vocab_size)
        after = before + lengths.astype(jnp.int32)
        index_BC, _ = ring_index(jnp.zeros_like(before), after, C)
        index_BC -= before[:, None]
        new = jnp.take_along_axis(tokens.astype(jnp.int32), jnp.maximum(index_BC, 0), axis=1)
        cache = TextCache(text=jnp.where(index_BC >= 0, new, cache.text), lengths=after)
        return self._logits(cache), cache

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: TextCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], TextCache]:
        """As Decoder.step. Raises ValueError or TypeError for a cache of another decoder."""
        self._check_cache(cache, tokens.shape[0])
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        active = jnp.ones(tokens.shape, bool) if active is None else active
        C = self.config.window
        slot = jnp.where(active, cache.lengths % C, C)
        row = jnp.arange(tokens.shape[0])
        text = cache.text.at[row, slot].set(tokens.astype(jnp.int32), mode="drop")
        cache = TextCache(text=text, lengths=cache.lengths + active.astype(jnp.int32))
        return self._logits(cache), cache

    def _check_cache(self, cache, rows):
        if not isinstance(cache, TextCache):
            raise TypeError(f"cache is a {type(cache).__name__}: must be a TextCache")
        wanted = (rows, self.config.window)
        if cache.text.shape != wanted:
            raise ValueError(f"cache has (rows, tokens) = {cache.text.shape}: must be {wanted}")

    def _logits(self, cache: TextCache):
        C = self.config.window
        count = jnp.minimum(cache.lengths, C)
        order_BC = (cache.lengths - count)[:, None] + jnp.arange(C, dtype=jnp.int32)[None, :]
        text = jnp.take_along_axis(cache.text, order_BC % C, axis=1)
        real = (jnp.arange(C)[None, :] < count[:, None]).astype(jnp.int32)
        out = self.model.apply({"params": self.params}, text, real, compute_logits=False)
        last_B1D = jnp.take_along_axis(out.hidden, (count - 1)[:, None, None], axis=1)
        return self.model.token_logits(self.params, last_B1D[:, 0])


def streaming_decoder(
    model: Model, params: dict[str, Any], config: StreamingConfig, capacity: int = 0
) -> Decoder:
    """The Decoder of a policy. capacity: of DENSE alone, tokens that a row may reach.

    Raises TypeError for a model without a key-value cache; ValueError for DENSE without a
    capacity, a capacity for others, strides, and a model whose own window is shorter than the
    cache. Warns when the cache is longer than the rows of the training.
    """
    if not isinstance(model, Llama3):
        raise TypeError(
            f"model is a {type(model).__name__}: must be a Llama3 (a Megalodon has a state of "
            "constant size already)"
        )
    if (config.policy is Policy.DENSE) != (capacity > 0):
        raise ValueError(
            f"capacity={capacity}: must be >= 1 with policy DENSE and 0 with the others, not "
            f"with {config.policy.name}"
        )
    if config.policy is Policy.DENSE:
        return TransformerDecoder.create(model, params, capacity)
    check_stack(config, model.config.transformer)
    if config.policy is Policy.RECOMPUTE:
        if config.stride > 1:
            raise ValueError(
                f"stride={config.stride}: a decoder predicts every token, strides are for "
                "streaming_scores"
            )
        return RecomputeDecoder(model=model, params=params, config=config)
    return StreamingDecoder(model=model, params=params, config=config)
