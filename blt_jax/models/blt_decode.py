"""Byte-by-byte generation with the Byte Latent Transformer (arXiv 2412.09871).

Neither the paper nor its code decodes incrementally; the published generator recomputes the whole
prefix for every byte. Here a row keeps: the byte caches of the local encoder, the local decoder
and the entropy model (sliding windows), the open patch (its running pools, and the keys and values
of its bytes), the latent cache, and what the decoder sees of the last complete patch. One step
reads a byte:

    encoder -> open patch -> does the next byte start a patch? (entropy of the next byte, or rule)
            -> if so: pool, cross-attention, latent transformer, new context -> decoder -> logits

so the latent transformer runs once per patch, and the logits equal those of the full forward pass.
Rows close patches at different times: it runs when some row does, on the closing rows alone while
they are few.

Axes as in blt.py; R slots for the bytes of the open patch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from blt_jax.layers import step
from blt_jax.layers.cache import LayerCache, RowCache, StepCache
from blt_jax.layers.norms import rms_norm
from blt_jax.layers.segments import document_positions
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt_patching
from blt_jax.models.blt import BLT, BLTAux
from blt_jax.models.blt_config import (
    BLTConfig,
    DecoderCrossAttention,
    KeyValueSource,
    Pooling,
    PoolQueries,
    Residual,
)
from blt_jax.models.blt_entropy import EntropyModel, entropies
from blt_jax.models.blt_ngrams import PRIMES, NgramKind, NgramStart, hash_ids
from blt_jax.models.blt_patches import patch_layout
from blt_jax.models.blt_patching import NEWLINE, VOCAB_SIZE, PatcherConfig, PatcherKind

NGRAM_WINDOW = 8
LatentStep = Callable[..., tuple[jax.Array, Any]]


# ------------------------------------------------------------------------------------- state


@flax.struct.dataclass
class OpenPatch:
    """The patch that is being read.

    pools: one dict per pooling, mode -> [B, D] float32 running max, min or sum ("first": the
    first bytes [B, C, D]). bytes: one LayerCache per encoder cross-attention, of the keys and
    values of its bytes. length [B]: bytes so far, 0 just after a patch closed. begins [B, W]:
    positions at which the last W patches begin, the open one last.
    """

    pools: Any
    bytes: Any
    length: Any
    begins: Any


@flax.struct.dataclass
class EntropyState:
    """The live entropy model: its cache (StepCache) and the entropy [B] after the last byte."""

    cache: Any
    entropy: Any


@flax.struct.dataclass
class BLTCache(RowCache):
    """Everything a row needs to go on; every leaf has the batch axis first.

    tokens: [B, 8] the last ids read; encoder, decoder, latent: StepCache; patch: OpenPatch;
    entropy: EntropyState or None; context: per decoder cross-attention the (key, value)
    [B, W Q, G, K] of the last W complete patches, or one vector [B, D]; latent_runs [B]: times
    the latent transformer ran while the row was active.
    """

    tokens: Any
    encoder: Any
    decoder: Any
    latent: Any
    patch: Any
    entropy: Any
    context: Any
    latent_runs: Any

    @property
    def lengths(self) -> jax.Array:
        """int32 [B]: bytes read, special ids included."""
        return self.encoder.lengths

    def counters(self) -> dict[str, jax.Array]:
        """int32 [B] each: bytes read, patches closed, and runs of the latent transformer."""
        return {
            "bytes": self.lengths,
            "patches": self.latent.lengths,
            "latent_runs": self.latent_runs,
        }


@flax.struct.dataclass
class CrossWeights:
    """One cross-attention: query [D, H K], key_value [D, 2 G K], out [H K, D], and the norms."""

    query_norm: Any
    query: Any
    key_norm: Any
    key_value: Any
    out: Any


@flax.struct.dataclass
class StepWeights:
    """The parameters taken apart into layers, in the types that products read."""

    encoder: Any
    latent: Any
    decoder: Any
    encoder_cross: Any
    decoder_cross: Any
    entropy: Any


def _cross_weights(params: dict[str, Any], dtype: jnp.dtype) -> CrossWeights:
    kernels = {name: params[name] for name in ("query", "key", "value")}
    flat = {name: step.flat_kernel(kernel).astype(dtype) for name, kernel in kernels.items()}
    return CrossWeights(
        query_norm=params["query_norm"]["weight"],
        query=flat["query"],
        key_norm=params["key_norm"]["weight"],
        key_value=jnp.concatenate([flat["key"], flat["value"]], axis=1),
        out=params["out"].reshape(-1, params["out"].shape[-1]).astype(dtype),
    )


# ----------------------------------------------------------------------------------- decoder


@flax.struct.dataclass
class BLTDecoder:
    """Prefill and one-byte steps of a BLT, with the patcher that closes its patches.

    model, params: the BLT; entropy_model, entropy_params: needed by the entropy patchers and
    BPE_PATCHER, else None; capacity: bytes a row may reach, special ids and prompt included. Every
    row is one document. Make it with `create`, which checks the parts.
    """

    model: BLT = flax.struct.field(pytree_node=False)
    params: Any
    patcher: PatcherConfig = flax.struct.field(pytree_node=False)
    capacity: int = flax.struct.field(pytree_node=False)
    entropy_model: EntropyModel | None = flax.struct.field(pytree_node=False, default=None)
    entropy_params: Any = None
    weights: Any = None
    """StepWeights, see `prepare`."""
    latent_step: LatentStep = flax.struct.field(pytree_node=False, default=step.transformer_step)
    """Reads one patch per row, as `layers.step.transformer_step`, with the latent cache."""

    @classmethod
    def create(
        cls,
        model: BLT,
        params: dict[str, Any],
        patcher: PatcherConfig,
        capacity: int,
        entropy_model: EntropyModel | None = None,
        entropy_params: dict[str, Any] | None = None,
    ) -> "BLTDecoder":
        """Raises ValueError for TOPK (not causal), for a patcher without its threshold, for one
        that needs an entropy model and has none, and for capacity < 1."""
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be >= 1 byte")
        if patcher.kind is PatcherKind.TOPK:
            raise ValueError("patcher TOPK is not causal: generation cannot use it")
        if patcher.needs_model and (entropy_model is None or entropy_params is None):
            raise ValueError(f"patcher {patcher.kind.name} needs an entropy model and its params")
        if not patcher.needs_model:
            entropy_model = entropy_params = None
        zero = jnp.zeros((1,), jnp.int32)
        value = jnp.zeros((1,), jnp.float32)
        # Raises where the threshold is missing.
        patcher.next_start(
            token=zero,
            previous_token=zero,
            position=zero,
            patch_length=zero,
            entropy=value,
            previous_entropy=value,
            prediction=zero,
        )
        if model.config.row_pieces > 1:  # of training rows; prompts are whole
            model = model.clone(config=dataclasses.replace(model.config, row_pieces=1))
        return cls(
            model=model,
            params=params,
            patcher=patcher,
            capacity=capacity,
            entropy_model=entropy_model,
            entropy_params=entropy_params,
        )

    # -------------------------------------------------------------------------------- sizes

    @property
    def config(self) -> BLTConfig:
        return self.model.config

    @property
    def vocab_size(self) -> int:
        return VOCAB_SIZE

    @property
    def longest_patch(self) -> int:
        """Bytes that a patch can have."""
        limits = [self.capacity]
        if self.patcher.max_patch_length:
            limits.append(self.patcher.max_patch_length)
        if self.patcher.kind is PatcherKind.STRIDED:
            limits.append(self.patcher.stride)
        if self.patcher.kind is PatcherKind.BYTE:
            limits.append(1)
        return min(limits)

    def most_patches(self, num_bytes: int) -> int:
        """Patches that `num_bytes` bytes of a row can touch."""
        if self.patcher.kind is PatcherKind.STRIDED and not self.patcher.max_patch_length:
            return min(num_bytes, -(-num_bytes // self.patcher.stride) + 1)
        return num_bytes

    def _open_slots(self) -> int:
        # With a window over patches, bytes keep the slot of their position; otherwise slots
        # count from the start of the open patch, so that few are read.
        return self.capacity if self.config.patch_window > 1 else self.longest_patch

    # ------------------------------------------------------------------------------- weights

    def prepare(self) -> "BLTDecoder":
        """This decoder with the weights in the layout that steps read; once before a loop.

        They are a second copy of the layers' weights.
        """
        if self.weights is not None:
            return self
        config, params, dtype = self.config, self.params, self.config.precision.dtype
        decoder = params["local_decoder"]["layers"]
        encoder_cross, decoder_cross = (), ()
        if config.num_encoder_cross_layers:
            cross = params["patch_encoder"]["layers"]["cross_attention"]
            encoder_cross = tuple(_cross_weights(layer, dtype) for layer in step.unstack(cross))
        match config.decoder_cross_attention:
            case DecoderCrossAttention.ALL:
                layers = step.unstack(decoder["cross_attention"])
                decoder_cross = tuple(_cross_weights(layer, dtype) for layer in layers)
            case DecoderCrossAttention.FIRST:
                cross = params["local_decoder"]["cross_attention"]
                decoder_cross = (_cross_weights(cross, dtype),)
        entropy = ()
        if self.entropy_model is not None:
            entropy_dtype = self.entropy_model.config.precision.dtype
            stack = self.entropy_params["transformer"]["layers"]
            entropy = step.block_weights(stack, entropy_dtype)
        weights = StepWeights(
            encoder=step.block_weights(params["local_encoder"]["layers"], dtype),
            latent=step.block_weights(params["latent_transformer"]["layers"], dtype),
            decoder=step.block_weights(decoder["block"], dtype),
            encoder_cross=encoder_cross,
            decoder_cross=decoder_cross,
            entropy=entropy,
        )
        return self.replace(weights=weights)

    # ------------------------------------------------------------------------------- prefill

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """float32 logits after the last token of each right-padded prompt, and the cache.

        Raises as `layers.step.check_prompts`: ids that are not integers 0..259, empty prompts,
        prompts beyond the capacity.
        """
        step.check_prompts(tokens, lengths, self.capacity, VOCAB_SIZE)
        return _prefill(self, tokens.astype(jnp.int32), lengths.astype(jnp.int32))

    # ---------------------------------------------------------------------------------- step

    def step(
        self,
        tokens: Int[Array, " B"],
        cache: BLTCache,
        active: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """float32 logits after one more token per row; rows not `active` keep their cache.

        Outside jit, raises ValueError for ids that are not 0..259 and when a row has no room left;
        inside, the caller sees to it (`layers.step.check_step`).
        """
        step.check_step(tokens, cache.lengths, active, self.capacity, self.vocab_size)
        active = jnp.ones(tokens.shape, bool) if active is None else active
        return _step(self.prepare(), tokens.astype(jnp.int32), cache, active)

    def extend(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: BLTCache
    ) -> tuple[Float[Array, "B V"], BLTCache]:
        """`step` of the first `lengths` tokens of every row: logits after the last, and the cache;
        raises as `layers.step.check_extension`."""
        step.check_extension(tokens, lengths, cache.lengths, self.capacity, VOCAB_SIZE)
        logits = jnp.zeros((tokens.shape[0], VOCAB_SIZE), jnp.float32)
        return step.extend_by_steps(self.prepare().step, tokens, lengths, (logits, cache))


# -------------------------------------------------------------------------------- one step


def _step(decoder: BLTDecoder, tokens, cache: BLTCache, active):
    config, weights = decoder.config, decoder.weights
    position, previous = cache.lengths, cache.tokens[:, -1]
    window = jnp.concatenate([cache.tokens[:, 1:], tokens[:, None]], axis=1)

    with jax.named_scope("byte_embedding"):
        x = _embed_last(decoder.model, decoder.params, window, position)
    with jax.named_scope("local_encoder"):
        hidden, states, encoder = _encoder_step(config, weights, x, cache.encoder, active)

    with jax.named_scope("patching"):
        entropy, prediction = None, None
        if decoder.entropy_model is not None:
            entropy, prediction = _entropy_step(decoder, tokens, previous, cache.entropy, active)
        patch = _extend_patch(config, weights, states, position, cache.patch, active)
        closes = decoder.patcher.next_start(
            token=tokens,
            previous_token=previous,
            position=position,
            patch_length=patch.length,
            entropy=None if entropy is None else entropy.entropy,
            previous_entropy=None if entropy is None else cache.entropy.entropy,
            prediction=prediction,
        )
        closes &= active
        any_closes = jnp.any(closes)

    latent, context = _close_patches(decoder, patch, position, closes, cache)
    begins = jnp.concatenate([patch.begins[:, 1:], position[:, None] + 1], axis=1)
    patch = patch.replace(
        length=jnp.where(closes, 0, patch.length),
        begins=jnp.where(closes[:, None], begins, patch.begins),
    )
    with jax.named_scope("local_decoder"):
        valid = jnp.minimum(latent.lengths, config.patch_window)
        x, caches = _decoder_step(config, weights, hidden, context, valid, cache.decoder, active)
    logits = _head(decoder.params, config.local_decoder, x)
    cache = BLTCache(
        tokens=jnp.where(active[:, None], window, cache.tokens),
        encoder=encoder,
        decoder=caches,
        latent=latent,
        patch=patch,
        entropy=entropy,
        context=context,
        latent_runs=cache.latent_runs + (any_closes & active).astype(jnp.int32),
    )
    return logits, cache


def _embed_last(model: BLT, params, window, position):
    """Embedding [B, D] of the last of the 8 newest tokens, with its n-grams (Eq. 2)."""
    config, dtype = model.config.ngrams, model.config.precision.dtype
    x = jnp.take(params["byte_embedding"]["table"], window[:, -1], axis=0).astype(dtype)
    back = jnp.arange(NGRAM_WINDOW - 1, -1, -1, dtype=jnp.int32)
    positions = jnp.maximum(position[:, None] - back[None, :], 0)
    for function, size in config.tables:
        if config.kind is NgramKind.HASH:
            prime = PRIMES[function]
            ids = hash_ids(window, size, prime, config.vocab_size, config.order, positions)
        else:
            ids = model.ngram_tables.lookup(window, size, positions)
        table = params["ngram_embedding"][f"f{function}_n{size}"]
        row = jnp.take(table, ids[:, -1], axis=0).astype(dtype)
        if config.start is NgramStart.SKIP:
            row = jnp.where((position >= size - 1)[:, None], row, 0)
        x = x + row
    return x * (1.0 / (len(config.tables) + 1)) if config.normalize and config.tables else x


def _encoder_step(config: BLTConfig, weights, x, cache: StepCache, active):
    """The byte after the encoder, and the state that each cross-attention sees of it."""
    stack = config.local_encoder
    positions, slot = step.step_positions(stack, cache), cache.next_slot(active)
    lengths = cache.lengths + active.astype(jnp.int32)
    end, caches, hidden = jnp.clip(lengths, 1, cache.slots), [], [x]
    for block, layer in zip(weights.encoder, cache.layers, strict=True):
        x, layer = step.block_step(stack, block, x, positions, layer, slot, end)
        caches.append(layer)
        hidden.append(x)
    count = config.num_encoder_cross_layers
    from_input = count and config.kv_from is KeyValueSource.INPUT
    states = hidden[:-1] if from_input else hidden[1:]
    return x, states[-max(count, 1) :], StepCache(layers=tuple(caches), lengths=lengths)


def _entropy_step(decoder: BLTDecoder, tokens, previous, state: EntropyState, active):
    """Entropy and most probable id of the next byte, by the entropy model's own cache."""
    params, config = decoder.entropy_params, decoder.entropy_model.config
    cache = state.cache
    if decoder.patcher.reset_at_newline:
        fresh = (previous == NEWLINE) & active
        cache = cache.replace(lengths=jnp.where(fresh, 0, cache.lengths))
    x = jnp.take(params["byte_embedding"]["table"], tokens, axis=0).astype(config.precision.dtype)
    layers = decoder.weights.entropy
    x, cache = step.transformer_step(config.transformer, layers, x, cache, active)
    logits = _head(params, config.transformer, x)
    entropy = jnp.where(active, entropies(logits[:, None])[:, 0], state.entropy)
    prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return EntropyState(cache=cache, entropy=entropy), prediction


def _head(params, stack: TransformerConfig, x):
    with jax.named_scope("head"):
        x = rms_norm(x, params["output_norm"]["weight"], stack.norm_eps)
        kernel = params["head"]["kernel"].astype(x.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


# ------------------------------------------------------------------------------- open patch


def _pool_modes(config: BLTConfig) -> tuple[str, ...]:
    if config.pooling is Pooling.FIRST_BYTES:
        return ("first",)
    return tuple("sum" if mode == "mean" else mode for mode in config.pooling.value.split("_"))


def _num_pools(config: BLTConfig) -> int:
    """Poolings per patch: one of the first cross-attention's bytes, or one for each."""
    if config.pool_queries is PoolQueries.PER_LAYER:
        return max(config.num_encoder_cross_layers, 1)
    return 1


def _extend_patch(config, weights, states, position, patch: OpenPatch, active) -> OpenPatch:
    """Adds one byte per row to the running pools and to the keys and values of the open patch."""
    opens = patch.length == 0
    pools = []
    for state, pool in zip(states, patch.pools, strict=False):
        new = {}
        for mode, value in pool.items():
            x = state.astype(jnp.float32)
            if mode == "first":
                place = jnp.arange(config.pooled_bytes, dtype=jnp.int32)[None, :, None]
                kept = jnp.where(opens[:, None, None], 0, value)
                x = jnp.where(place == patch.length[:, None, None], x[:, None], kept)
                new[mode] = jnp.where(active[:, None, None], x, value)
                continue
            combined = {"max": jnp.maximum, "min": jnp.minimum, "sum": jnp.add}[mode](value, x)
            x = jnp.where(opens[:, None], x, combined)
            new[mode] = jnp.where(active[:, None], x, value)
        pools.append(new)
    slot = position if config.patch_window > 1 else patch.length
    caches = []
    for state, cross, cache in zip(states, weights.encoder_cross, patch.bytes, strict=False):
        key, value = _cross_key_value(config, "encoder", cross, state)
        caches.append(cache.write(key, value, jnp.where(active, slot, cache.slots)))
    length = patch.length + active.astype(jnp.int32)
    return patch.replace(pools=tuple(pools), bytes=tuple(caches), length=length)


def _cross_key_value(config: BLTConfig, side: str, cross: CrossWeights, x):
    """Key and value [..., G, K] of context vectors x [..., D]."""
    _, G, K = config.cross_shape(side)
    stack = config.local_encoder if side == "encoder" else config.local_decoder
    key_value = rms_norm(x, cross.key_norm, stack.norm_eps) @ cross.key_value
    key, value = jnp.split(key_value, 2, axis=-1)
    shape = (*x.shape[:-1], G, K)
    return key.reshape(shape), value.reshape(shape)


def _pooled(config: BLTConfig, pool, length):
    """The pooled bytes [B, E] in the order of blt.pool."""
    if config.pooling is Pooling.FIRST_BYTES:
        pooled = pool["first"].reshape(length.shape[0], -1)
    else:
        count = jnp.maximum(length, 1).astype(jnp.float32)[:, None]
        parts = {**pool, "mean": pool["sum"] / count} if "sum" in pool else pool
        pooled = jnp.concatenate([parts[mode] for mode in config.pooling.value.split("_")], axis=-1)
    return pooled.astype(config.precision.dtype)


FEW_ROWS = 4
"""Up to one row in FEW_ROWS closing its patch counts as few."""


def _close_patches(decoder: BLTDecoder, patch: OpenPatch, position, closes, cache: BLTCache):
    """The latent cache and the context after the rows `closes` [B] closed their patches."""
    B = closes.shape[0]
    few = max(B // FEW_ROWS, 1)

    def keep(latent, context):
        return latent, context

    def close_few(latent, context):
        rows = jnp.nonzero(closes, size=few, fill_value=B)[0].astype(jnp.int32)

        def take(x):
            return jnp.take(x, rows, axis=0, mode="clip")

        few_patch = jax.tree.map(take, patch.replace(bytes=())).replace(bytes=patch.bytes)
        old = jax.tree.map(take, context)
        latent, new = _close_patch(decoder, few_patch, take(position), rows < B, latent, old, rows)
        return latent, jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), context, new)

    def close_all(latent, context):
        return _close_patch(decoder, patch, position, closes, latent, context)

    # Two conditionals one after the other: of one with three branches XLA:CPU copies the caches.
    count = jnp.sum(closes, dtype=jnp.int32)
    state = (cache.latent, cache.context)
    if few == B:
        return jax.lax.cond(count > 0, close_all, keep, *state)
    state = jax.lax.cond((count > 0) & (count <= few), close_few, keep, *state)
    return jax.lax.cond(count > few, close_all, keep, *state)


def _close_patch(decoder, patch: OpenPatch, position, closes, latent, context, rows=None):
    """Runs the latent transformer on the open patch of every row; rows that close keep it.

    rows: the rows of the caches (latent, bytes of the open patch) that the other arguments are
    about, None for all.
    """
    config, params, weights = decoder.config, decoder.params, decoder.weights
    with jax.named_scope("patch_encoder"):
        x = _patch_vectors(config, params, weights, patch, position, rows)
    with jax.named_scope("latent"):
        if "latent_projection" in params:
            x = x @ params["latent_projection"]["kernel"].astype(x.dtype)
        x, latent = decoder.latent_step(config.latent, weights.latent, x, latent, closes, rows)
        x = x @ params["context_projection"]["kernel"].astype(x.dtype)
    with jax.named_scope("context"):
        return latent, _new_context(config, weights, x, closes, context)


def _patch_vectors(config: BLTConfig, params, weights, patch: OpenPatch, position, rows):
    """The k vectors of the open patch side by side [B, k D] (Eq. 5-8)."""
    B, Q, D = position.shape[0], config.cross_attn_k, config.local_encoder.d_model
    H, _, K = config.cross_shape("encoder")
    kernel = params["patch_encoder"]["patch_projection"]

    def queries(pool):
        pooled = _pooled(config, pool, patch.length)
        return (pooled @ kernel.astype(pooled.dtype)).reshape(B, Q, D)

    if config.patch_window > 1:
        begin, end = patch.begins[:, 0], position + 1
    else:
        begin, end = jnp.zeros_like(position), jnp.maximum(patch.length, 1)
    x = queries(patch.pools[0])
    for layer, (cross, cache) in enumerate(zip(weights.encoder_cross, patch.bytes, strict=True)):
        if config.pool_queries is PoolQueries.PER_LAYER:
            x = queries(patch.pools[layer])
        q = rms_norm(x, cross.query_norm, config.local_encoder.norm_eps) @ cross.query
        # The k queries of a patch see the same keys: they act as k times as many heads.
        q = jnp.swapaxes(q.reshape(B, Q, H, K), 1, 2).reshape(B, H * Q, K)
        out = step.attend_slots(q, cache, begin, end, rows).reshape(B, H, Q, K)
        out = jnp.swapaxes(out, 1, 2).reshape(B, Q, H * K) @ cross.out
        x = (x if config.residual is Residual.SINGLE else 2.0 * x) + out
    return x.reshape(B, Q * D)


def _new_context(config: BLTConfig, weights, x, closes, context):
    """What the decoder sees of a closed patch, from its projected latent x [B, k D]."""
    if config.decoder_cross_attention is DecoderCrossAttention.NONE:
        return jnp.where(closes[:, None], x, context)
    Q, D = config.cross_attn_k, config.local_decoder.d_model
    x, result = x.reshape(-1, Q, D), []
    for cross, old in zip(weights.decoder_cross, context, strict=True):
        new = _cross_key_value(config, "decoder", cross, x)
        shifted = [jnp.concatenate([a[:, Q:], b], axis=1) for a, b in zip(old, new, strict=True)]
        mask = closes[:, None, None, None]
        pair = zip(shifted, old, strict=True)
        result.append(tuple(jnp.where(mask, a, b) for a, b in pair))
    return tuple(result)


def _decoder_step(config: BLTConfig, weights, x, context, valid, cache: StepCache, active):
    """The local decoder (Eq. 9-12); valid [B]: complete patches in the window."""
    stack, cross_layers = config.local_decoder, config.decoder_cross_attention
    positions, slot = step.step_positions(stack, cache), cache.next_slot(active)
    lengths = cache.lengths + active.astype(jnp.int32)
    end, caches = jnp.clip(lengths, 1, cache.slots), []
    if cross_layers is DecoderCrossAttention.NONE:
        x = x + context
    for index, (block, layer) in enumerate(zip(weights.decoder, cache.layers, strict=True)):
        if index < len(weights.decoder_cross):
            cross = weights.decoder_cross[index]
            x = _attend_context(config, cross, x, context[index], valid)
        x, layer = step.block_step(stack, block, x, positions, layer, slot, end)
        caches.append(layer)
    return x, StepCache(layers=tuple(caches), lengths=lengths)


def _attend_context(config: BLTConfig, cross: CrossWeights, x, key_value, valid):
    """One byte per row attends to the vectors of the last complete patches."""
    H, G, K = config.cross_shape("decoder")
    key, value = key_value
    q = rms_norm(x, cross.query_norm, config.local_decoder.norm_eps) @ cross.query
    q_BGRK = (q * K**-0.5).reshape(-1, G, H // G, K)
    # Few keys: products and sums over an axis beat a batched product.
    scores = jnp.sum(q_BGRK[:, None] * key[:, :, :, None], axis=-1, dtype=jnp.float32)
    if config.patch_window > 1:
        age = config.patch_window - 1 - jnp.arange(key.shape[1]) // config.cross_attn_k
        seen = age[None, :] < valid[:, None]
        scores = jnp.where(seen[:, :, None, None], scores, step.NEGATIVE)
    weights = jax.nn.softmax(scores, axis=1).astype(value.dtype)
    out = jnp.sum(weights[..., None] * value[:, :, :, None], axis=1)
    out = out.reshape(-1, H * K) @ cross.out
    return (x if config.residual is Residual.SINGLE else 2.0 * x) + out


# ----------------------------------------------------------------------------------- prefill


def _prefill(decoder: BLTDecoder, tokens, lengths):
    """The full forward pass over the prompts, then the state at the end of each row."""
    config, T = decoder.config, tokens.shape[1]
    index = jnp.arange(T + 1, dtype=jnp.int32)[None, :]
    # The token after the prompt belongs to the document: whether it starts a patch is known.
    document = (index <= lengths[:, None]).astype(jnp.int32)
    segment_ids = document[:, 1:]
    tokens = jnp.where(segment_ids > 0, tokens, 0)

    entropy, predictions = None, None
    if decoder.entropy_model is not None:
        entropy, state, predictions = _entropy_prefill(decoder, tokens, segment_ids, lengths)
    starts = decoder.patcher.starts(tokens, document, entropies=entropy, predictions=predictions)
    layout = patch_layout(starts, segment_ids, decoder.most_patches(T))
    positions = document_positions(segment_ids)
    arguments = (tokens, layout, segment_ids, positions, True)
    out = decoder.model.apply({"params": decoder.params}, *arguments, method="with_layout")

    last, key_values = (lengths - 1)[:, None], out.aux.key_values
    logits = jnp.take_along_axis(out.logits, last[..., None], axis=1)[:, 0]
    patch_of_next = jnp.take_along_axis(
        blt_patching.patch_ids(starts), lengths[:, None], axis=1
    )  # = complete patches
    closed = patch_of_next[:, 0]
    patch, context = _prefill_patch(decoder, out.aux, closed, lengths)
    cache = BLTCache(
        tokens=_last_tokens(tokens, lengths),
        encoder=_byte_cache(config.local_encoder, key_values.encoder, lengths, decoder.capacity),
        decoder=_byte_cache(config.local_decoder, key_values.decoder, lengths, decoder.capacity),
        latent=_byte_cache(
            config.latent, key_values.latent, closed, decoder.most_patches(decoder.capacity)
        ),
        patch=patch,
        entropy=None if entropy is None else state,
        context=context,
        latent_runs=jnp.zeros_like(lengths) + closed,
    )
    return logits, cache


def _byte_cache(stack: TransformerConfig, key_values, lengths, capacity, first=None) -> StepCache:
    slots = step.window_slots(stack, capacity)
    key, value = key_values.key, key_values.value
    return StepCache.from_prefill(key, value, lengths, slots, key.dtype, first)


def _last_tokens(tokens, lengths):
    back = jnp.arange(NGRAM_WINDOW - 1, -1, -1, dtype=jnp.int32)[None, :]
    index = lengths[:, None] - 1 - back
    taken = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, taken, 0)


def _entropy_prefill(decoder: BLTDecoder, tokens, segment_ids, lengths):
    """Entropies and most probable ids of every position, and the entropy model's state."""
    model, first = decoder.entropy_model, jnp.zeros_like(lengths)
    pieces, positions = segment_ids, document_positions(segment_ids)
    if decoder.patcher.reset_at_newline:
        pieces, positions = blt_patching.reset_segments(tokens, segment_ids)
    last = (lengths - 1)[:, None]
    if decoder.patcher.reset_at_newline:
        first = lengths - 1 - jnp.take_along_axis(positions, last, axis=1)[:, 0]
    out = model.apply({"params": decoder.entropy_params}, tokens, pieces, positions, True)
    stack = model.config.transformer
    cache = _byte_cache(stack, out.cache, lengths, decoder.capacity, first)
    entropy = jnp.take_along_axis(out.aux, last, axis=1)[:, 0]
    predictions = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
    return out.aux, EntropyState(cache=cache, entropy=entropy), predictions


def _prefill_patch(decoder: BLTDecoder, aux: BLTAux, closed, lengths):
    """The open patch after the prompts, and the context of the last complete patches."""
    config, W = decoder.config, decoder.config.patch_window
    states, ids = aux.encoder_states, aux.layout.encoder_ids
    own = ids == closed[:, None]
    length = jnp.sum(own, axis=1, dtype=jnp.int32)
    only = jnp.where(own, 0, -1)
    pools = []
    for state in states[: _num_pools(config)]:
        pool = {}
        for mode in _pool_modes(config):
            if mode == "first":
                pool[mode] = _first_bytes(state, lengths - length, length, config.pooled_bytes)
            else:
                x = state.astype(jnp.float32)
                pool[mode] = pallas_kernels.patch_pool(x, only, 1, mode=mode)[:, 0]
        pools.append(pool)

    # Positions at which patches closed-W+1 .. closed begin; the open one may be empty.
    wanted = closed[:, None] - jnp.arange(W - 1, 0, -1, dtype=jnp.int32)[None, :]
    before = jnp.sum(
        (ids[:, None, :] >= 0) & (ids[:, None, :] < wanted[:, :, None]), axis=2, dtype=jnp.int32
    )
    begins = jnp.concatenate([before, (lengths - length)[:, None]], axis=1)

    first = jnp.zeros_like(lengths) if W > 1 else lengths - length
    weights, slots, caches = decoder.prepare().weights, decoder._open_slots(), []
    for cross, state in zip(weights.encoder_cross, states, strict=False):
        key, value = _cross_key_value(config, "encoder", cross, state)
        caches.append(LayerCache.from_rows(key, value, first, lengths, slots, key.dtype))

    index = closed[:, None] - jnp.arange(W, 0, -1, dtype=jnp.int32)[None, :]
    latent = jnp.take_along_axis(aux.latent, jnp.maximum(index, 0)[:, :, None], axis=1)
    context = decoder.model.apply({"params": decoder.params}, latent, method="context")
    if config.decoder_cross_attention is DecoderCrossAttention.NONE:
        context = context[:, -1, 0]
    else:
        vectors = context.reshape(context.shape[0], -1, context.shape[-1])
        context = tuple(
            _cross_key_value(config, "decoder", cross, vectors) for cross in weights.decoder_cross
        )
    patch = OpenPatch(pools=tuple(pools), bytes=tuple(caches), length=length, begins=begins)
    return patch, context


def _first_bytes(x, first, length, count: int):
    place = jnp.arange(count, dtype=jnp.int32)[None, :]
    index = jnp.minimum(first[:, None] + place, x.shape[1] - 1)[:, :, None]
    taken = jnp.take_along_axis(x.astype(jnp.float32), index, axis=1)
    return jnp.where((place < length[:, None])[..., None], taken, 0.0)
