"""What can be decoded: prefill over prompts, then one token per row and step, or many."""

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from blt_jax.layers import step
from blt_jax.layers.cache import RowCache, StepCache
from blt_jax.layers.embed import look_up
from blt_jax.layers.model import Model
from blt_jax.layers.norms import rms_norm
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models.llama3 import Llama3
from blt_jax.models.megalodon import Megalodon
from blt_jax.models.megalodon_decode import MegalodonDecoder

PIECE = 256
"""Most tokens that `TransformerDecoder.extend` takes at once; its scores are those of PIECE queries
and all slots and PIECE keys."""


@runtime_checkable
class Decoder(Protocol):
    """A model with its parameters, cache capacity and policies; a pytree that jit takes.

    capacity: tokens a row may reach, prompt included; vocab_size: ids are 0..vocab_size-1. A cache
    has the batch axis first in every leaf, `lengths` [B] (tokens read), `take_rows(indices)`, and
    `counters()`, a dict of int32 [B] that a step increases.
    """

    capacity: int
    vocab_size: int

    def prepare(self) -> "Decoder":
        """The decoder with weights in the layout that steps read: once before a loop."""

    def prefill(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Any]:
        """Logits [B, V] after the last token of each prompt (right-padded [B, T]) and the cache.

        Raises TypeError for ids that are no integers; outside jit, ValueError for empty prompts,
        ids outside the vocabulary and prompts beyond the capacity.
        """

    def step(self, tokens: jax.Array, cache: Any, active: jax.Array | None = None):
        """Logits [B, V] after one more token [B], and the cache; rows not `active` keep theirs.

        Raises TypeError for ids that are no integers; outside jit, ValueError for active rows with
        an id outside the vocabulary or without room. Inside jit nobody looks: an id beyond the
        vocabulary gives NaN, and a negative one is counted from its end.
        """

    def extend(self, tokens: jax.Array, lengths: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """As `prefill`, of prompts that come after what the rows of a cache have read."""


@flax.struct.dataclass
class TransformerCache(RowCache):
    """Cache of a plain transformer: keys and values, a StepCache."""

    key_values: Any

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: tokens read."""
        return self.key_values.lengths


class OverTransformer:
    """What decoders of a plain transformer share, which have a model and params, and weights
    (see `prepare`) where they read token by token."""

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def prepare(self) -> "OverTransformer":
        """As Decoder.prepare."""
        if self.weights is not None:
            return self
        layers = self.params["transformer"]["layers"]
        return self.replace(weights=step.block_weights(layers, self.model.config.precision.dtype))

    def _no_tokens(self, rows):
        """Hidden states of `step.extend_in_pieces` before any token."""
        return jnp.zeros((rows, self._stack.d_model), self.model.config.precision.dtype)

    def _embed(self, tokens):
        dtype = self.model.config.precision.dtype
        return look_up(self.params["embed"]["table"], tokens, self.model.sharding).astype(dtype)

    def _final_norm(self, x):
        return rms_norm(x, self.params["norm"]["weight"], self._stack.norm_eps)

    @property
    def _stack(self) -> TransformerConfig:
        return self.model.config.transformer


@flax.struct.dataclass
class TransformerDecoder(OverTransformer):
    """Decoder of a plain transformer language model.

    capacity: tokens a row may reach, prompt included; with a sliding window only its keys and
    values are kept, and those of the sink tokens, which are not counted.
    """

    model: Llama3 = flax.struct.field(pytree_node=False)
    params: Any
    capacity: int = flax.struct.field(pytree_node=False)
    weights: Any = None
    """Tuple of step.BlockWeights, see `prepare`."""

    @classmethod
    def create(cls, model: Llama3, params: dict[str, Any], capacity: int) -> "TransformerDecoder":
        """Raises ValueError for capacity < 1."""
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be >= 1 token")
        return cls(model=model, params=params, capacity=capacity)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], TransformerCache]:
        """As Decoder.prefill, by the full forward pass."""
        step.check_prompts(tokens, lengths, self.capacity, self.vocab_size)
        lengths = lengths.astype(jnp.int32)
        segment_ids = (jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]).astype(jnp.int32)
        tokens = jnp.where(segment_ids > 0, tokens.astype(jnp.int32), 0)
        output = self.model.apply(
            {"params": self.params},
            tokens,
            segment_ids,
            emit_key_values=True,
            compute_logits=False,
        )
        key_values, sinks = output.cache, self.model.config.sink_tokens
        cache = StepCache.from_prefill(
            key_values.key,
            key_values.value,
            lengths,
            sinks + step.window_slots(self._stack, self.capacity),
            key_values.key.dtype,
            pinned=sinks,
        )
        last_B1D = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)
        return self.model.token_logits(self.params, last_B1D[:, 0]), TransformerCache(cache)

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: TransformerCache
    ) -> tuple[Float[Array, "B V"], TransformerCache]:
        """As Decoder.extend, PIECE tokens at once. Raises ValueError or TypeError for a cache of
        another decoder."""
        self._check_cache(cache, tokens.shape[0])
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, self.vocab_size)
        layers = self.prepare().weights

        def read(tokens, cache, counts):
            x = self._embed(tokens)
            return step.transformer_extend(self._stack, layers, x, cache, counts)

        state = self._no_tokens(tokens.shape[0]), cache.key_values
        size = min(tokens.shape[1], PIECE)
        x, key_values = step.extend_in_pieces(read, tokens, lengths, state, size)
        logits = self.model.token_logits(self.params, self._final_norm(x))
        return logits, TransformerCache(key_values)

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: TransformerCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], TransformerCache]:
        """As Decoder.step. Raises ValueError or TypeError for a cache of another decoder."""
        self._check_cache(cache, tokens.shape[0])
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        layers, x = self.prepare().weights, self._embed(tokens)
        x, key_values = step.transformer_step(self._stack, layers, x, cache.key_values, active)
        logits = self.model.token_logits(self.params, self._final_norm(x))
        return logits, TransformerCache(key_values)

    def _check_cache(self, cache, rows):
        if not isinstance(cache, TransformerCache):
            raise TypeError(f"cache is a {type(cache).__name__}: must be a TransformerCache")
        stack, sinks = self._stack, self.model.config.sink_tokens
        slots = sinks + step.window_slots(stack, self.capacity)
        wanted = (rows, stack.num_layers, slots, stack.kv_heads, stack.head_width, sinks)
        found = cache.key_values.sizes
        if found != wanted:
            raise ValueError(
                "cache has (rows, layers, slots, kv heads, head width, pinned) = "
                f"{found}: must be {wanted}"
            )


def token_decoder(model: Model, params: dict[str, Any], capacity: int) -> Decoder:
    """The Decoder of a model that reads tokens alone; TypeError for another model."""
    if isinstance(model, Llama3):
        return TransformerDecoder.create(model, params, capacity)
    if isinstance(model, Megalodon):
        return MegalodonDecoder.create(model, params, capacity)
    raise TypeError(
        f"model is a {type(model).__name__}: only Llama3 and Megalodon read tokens alone"
    )
