"""Byte Latent Transformer: Patches Scale Better Than Tokens (arXiv 2412.09871).

A language model over raw bytes without a tokenizer. A small local encoder turns bytes into patch
vectors, a large latent transformer runs once per patch, and a small local decoder predicts the
next byte from its own bytes and the last complete patch. Patches start where a separate byte model
is uncertain about the next byte, so that computation goes where prediction is hard.

Axes: B rows, N bytes, P patches, Q vectors per patch (the paper's k), D width of the local models,
G kv heads (in the latent: h_G, the width), H heads, K head width, L layers, V = 260 ids.

Section 2 (patching), 4.4 (entropy reset)            blt_patching.py
Section 2.3, Eq. 1 (entropy model)                   blt_entropy.py
Section 3.1 (latent global transformer)              BLT.latent, blt_patches.patch_layout
Section 3.2.1 (hash n-gram embeddings)               NgramEmbedding, blt_ngrams.py
Section 3.2.2, Eq. 6, 7 (encoder cross-attention)    EncoderCrossLayer, BLT.pool_patches
  on arrays, also over several devices               blt_patches.py
Section 3.3 (local decoder)                          DecoderLayer, BLT.decode
Model sizes, Eq. 13-17 (FLOPs per byte)              blt_config.py
Eq. 18 (bits per byte)                               BLT.loss (nats and bytes as sums)
Generation                                           blt_decode.py

Departures and choices. Defaults follow the paper, `released_1b` the published code and weights,
which double the residual of both cross-attentions, hash the oldest byte with power 0, do not
divide the summed embeddings, and pad short n-grams. Keys and values come from each layer's output
(the paper's text), not its input (Eq. 7): `kv_from`. A patch belongs to the document of its first
byte, and documents are isolated everywhere by segment_ids. The 400M model has 12 cross-attention
heads, since 10 do not divide its width 768. The projection between encoder and latent transformer
is there exactly when their widths differ. Byte-ifying Llama 3 and the robustness suites are not in
this file.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from blt_jax.dist.sharding import ShardingRules, constrain
from blt_jax.layers.embed import Embed, Head, check_token_ids
from blt_jax.layers.losses import cross_entropy_sums
from blt_jax.layers.model import LossSums, Model
from blt_jax.layers.norms import RMSNorm
from blt_jax.layers.projection import (
    depth_divisor,
    project,
    projection_init,
    truncated_normal,
)
from blt_jax.layers.row_pieces import check_divisible, split, with_previous_tokens
from blt_jax.layers.segments import document_positions
from blt_jax.layers.transformer import (
    Block,
    KeyValues,
    Transformer,
    TransformerConfig,
    encode_positions,
    scan_blocks,
)
from blt_jax.models import blt_patching
from blt_jax.models.blt_config import (  # noqa: F401
    BLTConfig,
    DecoderCrossAttention,
    EncoderCrossAttention,
    KeyValueSource,
    Pooling,
    PoolQueries,
    Residual,
    paper_1b,
    paper_2b,
    paper_4b,
    paper_8b,
    paper_400m,
    paper_flops_per_byte,
    released_1b,
)
from blt_jax.models.blt_entropy import (  # noqa: F401
    EntropyModel,
    EntropyModelConfig,
    entropies,
    entropy_model_paper_100m,
    entropy_model_paper_512,
    entropy_model_released,
)
from blt_jax.models.blt_ngrams import (
    PRIMES,
    NgramConfig,
    NgramKind,
    NgramStart,
    NgramTables,
    hash_ids,
)
from blt_jax.models.blt_patches import (
    PatchLayout,
    bytes_attend_to_patches,
    check_pieces,
    patch_layout,
    patches_attend_to_bytes,
    pool,
    take_patches,
)

VOCAB_SIZE = blt_patching.VOCAB_SIZE


# ------------------------------------------------------------------------- pure functions


def check_inputs(
    tokens: Array | np.ndarray,
    starts: Array | np.ndarray | None = None,
    segment_ids: Array | np.ndarray | None = None,
    pieces: int = 1,
) -> None:
    """Raises ValueError for inputs that would give a silently wrong result.

    Shapes and types always; values only outside jit, where they are known: ids outside 0..259
    (padding is id 0 with segment 0, never -1), documents whose first patch is not one token, and
    patches that reach over the end of one of the `pieces` of a row.
    """
    check_token_ids("tokens", tokens)
    B, N = tokens.shape
    if N == 0:
        raise ValueError("tokens is empty: a prompt needs at least the BOS id")
    check_divisible(N, pieces, 1)
    if segment_ids is not None and segment_ids.shape != (B, N):
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, tokens {(B, N)}")
    if starts is not None and starts.shape != (B, N + 1):
        raise ValueError(
            f"starts has shape {starts.shape}: must be {(B, N + 1)}, one per token and one for "
            "the last target"
        )
    known = [x for x in (tokens, starts, segment_ids) if x is not None]
    if any(isinstance(x, jax.core.Tracer) for x in known):
        return
    ids = np.asarray(tokens)
    if ids.min() < 0 or ids.max() >= VOCAB_SIZE:
        raise ValueError(
            f"tokens hold ids {ids.min()}..{ids.max()}: must be 0..{VOCAB_SIZE - 1} "
            "(bytes are b + 4, padding is 0 with segment 0)"
        )
    if starts is not None:
        segments = np.ones((B, N), np.int32) if segment_ids is None else np.asarray(segment_ids)
        # Padding at the end of a piece does not end a document.
        document = np.maximum.accumulate(segments, axis=1)
        first = (np.diff(document, axis=1, prepend=-1) != 0) & (segments > 0)
        second = np.pad(first[:, :-1], ((0, 0), (1, 0)))
        missing = (first | second) & (segments > 0) & ~np.asarray(starts)[:, :-1]
        if missing.any():
            row, index = np.argwhere(missing)[0]
            raise ValueError(
                f"starts[{row}, {index}] is false: the first and the second token of every "
                "document start a patch, or bytes would see no complete patch"
            )
        size = N // pieces
        cut = (segments > 0)[:, ::size] & ~np.asarray(starts)[:, :-1:size]
        if cut.any():
            row, index = np.argwhere(cut)[0]
            raise ValueError(
                f"starts[{row}, {index * size}] is false: every one of the {pieces} pieces of a "
                "row begins with a patch (row_pieces)"
            )


# -------------------------------------------------------------------------- linen modules


class Projection(nn.Module):
    """A linear map without bias."""

    features: int
    axes: tuple[str | None, str | None]

    def setup_kernel(self, inputs: int) -> jax.Array:
        init = nn.with_logical_partitioning(truncated_normal(inputs**-0.5), self.axes)
        return self.param("kernel", init, (inputs, self.features), jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        return project(x, self.setup_kernel(x.shape[-1]))


class NgramEmbedding(nn.Module):
    """Adds the embeddings of the n-grams that end at each byte."""

    config: NgramConfig
    d_model: int
    sharding: ShardingRules
    ngram_tables: NgramTables | None = None
    pieces: int = 1
    """Pieces that rows are cut into, see `layers.row_pieces`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        tokens: Int[Array, "B N"],
        history: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"],
    ) -> Float[Array, "B N D"]:
        """history: tokens before each one that its n-grams may reach."""
        config = self.config
        init = truncated_normal(self.d_model**-0.5)
        init = nn.with_logical_partitioning(init, (None, "ngram"))
        rows, reach, before = tokens, history, 0
        if self.pieces > 1 and config.tables:
            before = max(size for _, size in config.tables) - 1
            rows = with_previous_tokens(tokens, segment_ids, self.pieces, before)
            reach = jnp.pad(split(history, self.pieces), ((0, 0), (0, 0), (before, 0)))
            rows, reach = (x.reshape(-1, x.shape[2]) for x in (rows, reach))
        # A device looks up its columns for the rows of all that share a table. Were the tables
        # divided by rows, each would have a gradient of the size of all of them.
        others = tuple(axis for axis in self.sharding.batch if axis not in self.sharding.ngram)
        columns = dataclasses.replace(self.sharding, batch=others)
        total = jnp.zeros_like(x)
        for function, size in config.tables:
            shape = (config.vocab_size, self.d_model)
            table = self.param(f"f{function}_n{size}", init, shape, jnp.float32)
            table = constrain(table, (None, "ngram"), self.sharding)
            ids = self._ids(rows, reach, function, size)[:, before:].reshape(tokens.shape)
            ids = constrain(ids, ("batch", "length"), columns)
            # One gather per table: one gather from a stacked table is several times slower.
            found = jnp.take(table, ids, axis=0).astype(x.dtype)
            if config.start is NgramStart.SKIP:
                found = jnp.where((history >= size - 1)[..., None], found, 0)
            total = constrain(total + found, ("batch", "length", "ngram"), columns)
        x = x + constrain(total, ("batch", "length", "embed_act"), self.sharding)
        if config.normalize and config.tables:
            x = x * (1.0 / (len(config.tables) + 1))
        return constrain(x, ("batch", "length", "embed_act"), self.sharding)

    def _ids(self, tokens, history, function: int, size: int) -> Int[Array, "B N"]:
        config = self.config
        if config.kind is NgramKind.EXACT:
            return self.ngram_tables.lookup(tokens, size, history)
        prime = PRIMES[function]
        return hash_ids(tokens, size, prime, config.vocab_size, config.order, history)


class CrossAttention(nn.Module):
    """Pre-norm attention of `x` to `context` without positions; the caller adds the residual.

    Norms are over the full width, and heads may share keys and values. `attend` computes the
    attention from q [..., H, K] and key, value [..., H, K].
    """

    config: TransformerConfig
    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, x, context, attend, layer):
        config, (H, G, K), d_model = self.config, self.shape, x.shape[-1]
        divisor = depth_divisor(config.depth_scaling, layer, config.num_layers, d_model)

        def kernel(name, shape, names, fan_in):
            init = projection_init(config.initialization, fan_in, divisor)
            return self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)

        wq = kernel("query", (d_model, H, K), ("embed", "heads", "head_dim"), d_model)
        wo = kernel("out", (H, K, d_model), ("heads", "head_dim", "embed"), H * K)
        q = project(RMSNorm(config.norm_eps, name="query_norm")(x), wq)
        wk = kernel("key", (d_model, G, K), ("embed", "kv_heads", "head_dim"), d_model)
        wv = kernel("value", (d_model, G, K), ("embed", "kv_heads", "head_dim"), d_model)
        context = RMSNorm(config.norm_eps, name="key_norm")(context)
        key_values = project(context, wk), project(context, wv)
        if G != H:
            key_values = tuple(jnp.repeat(part, H // G, axis=-2) for part in key_values)
        return project(attend(q, *key_values), wo, num_input_axes=2)


class EncoderCrossLayer(nn.Module):
    """Patches attend to their bytes (section 3.2.2)."""

    config: BLTConfig
    sharding: ShardingRules

    @nn.compact
    def __call__(self, patches, layer, state, kernel, ids, segment_ids, patch_segment_ids):
        """patches [B, P, Q, D] attend to state [B, N, D]; kernel: of the patch projection."""
        config = self.config
        if config.pool_queries is PoolQueries.PER_LAYER:
            pooled = pool(state, ids, patches.shape[1], config, self.sharding)
            patches = project(pooled, kernel).reshape(patches.shape)

        def attend(q, key, value):
            layout = (ids, segment_ids, patch_segment_ids)
            return patches_attend_to_bytes(q, key, value, *layout, config, self.sharding)

        cross = CrossAttention(
            config.local_encoder, config.cross_shape("encoder"), name="cross_attention"
        )
        out = cross(patches, state, attend, layer)
        return _residual(patches, config) + out, None


def _residual(x, config: BLTConfig):
    return x if config.residual is Residual.SINGLE else 2.0 * x


class PatchEncoder(nn.Module):
    """Patch vectors from bytes: pooled, projected, then refined by cross-attention (Eq. 6, 7)."""

    config: BLTConfig
    sharding: ShardingRules

    @nn.compact
    def __call__(
        self,
        states: Float[Array, "L B N D"],
        ids: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"],
        patch_segment_ids: Int[Array, "B P"],
    ) -> Float[Array, "B P E"]:
        """states: the bytes that each cross-attention sees. Returns the Q vectors side by side."""
        config = self.config
        B, P, D = ids.shape[0], patch_segment_ids.shape[1], states.shape[-1]
        shape = (config.num_pooled * D, config.patch_width)
        init = truncated_normal(shape[0] ** -0.5)
        init = nn.with_logical_partitioning(init, ("embed", "patch_vectors"))
        kernel = self.param("patch_projection", init, shape, jnp.float32)
        patches = project(pool(states[0], ids, P, config, self.sharding), kernel)
        patches = patches.reshape(B, P, config.cross_attn_k, D)
        if config.num_encoder_cross_layers:
            length = config.num_encoder_cross_layers
            stack = scan_blocks(
                EncoderCrossLayer,
                config.local_encoder,
                4,
                2,
                length,
                initializing=self.is_initializing(),
            )
            stack = stack(config, self.sharding, name="layers")
            layers = jnp.arange(length, dtype=jnp.int32)
            patches, _ = stack(patches, layers, states, kernel, ids, segment_ids, patch_segment_ids)
        patches = patches.reshape(B, P, config.patch_width)
        return constrain(patches, ("batch", "patches", "embed_act"), self.sharding)


class DecoderLayer(nn.Module):
    """A transformer block over bytes, after cross-attention if every layer has one."""

    config: BLTConfig
    sharding: ShardingRules
    emit_key_values: bool

    @nn.compact
    def __call__(self, x, layer, context, layout, positions):
        """layout: as LocalDecoder; positions: as Block."""
        config = self.config
        if config.decoder_cross_attention is DecoderCrossAttention.ALL:
            with jax.named_scope("cross_attention"):
                x = _attend_context(config, self.sharding, x, layer, context, layout)
        arguments = (config.local_decoder, self.sharding, self.emit_key_values, config.row_pieces)
        block = Block(*arguments, name="block")
        return block(x, layer, None, positions, layout[1])


def _attend_context(config: BLTConfig, sharding: ShardingRules, x, layer, context, layout):
    """Bytes attend to the vectors of their last complete patch (section 3.3), with residual."""

    def attend(q, key, value):
        return bytes_attend_to_patches(q, key, value, *layout, config, sharding)

    cross = CrossAttention(
        config.local_decoder, config.cross_shape("decoder"), name="cross_attention"
    )
    return _residual(x, config) + cross(x, context, attend, layer)


class LocalDecoder(nn.Module):
    """Bytes continue from the encoder's, and see the latent output of complete patches."""

    config: BLTConfig
    sharding: ShardingRules

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B P Q D"],
        layout: tuple,
        positions: Int[Array, "B N"],
        emit_key_values: bool = False,
    ) -> tuple[Float[Array, "B N D"], KeyValues | None]:
        """layout: decoder ids [B, N], segment_ids [B, N], segments of patches [B, P]."""
        config, stack = self.config, self.config.local_decoder
        if config.decoder_cross_attention is DecoderCrossAttention.FIRST:
            first = jnp.zeros((), jnp.int32)
            x = _attend_context(config, self.sharding, x, first, context, layout)
        elif config.decoder_cross_attention is DecoderCrossAttention.NONE:
            x = x + take_patches(context[:, :, 0], layout[0], layout[2], self.sharding)
        layers = jnp.arange(stack.num_layers, dtype=jnp.int32)
        encoded = encode_positions(stack, positions)
        scanned = scan_blocks(DecoderLayer, stack, 3, initializing=self.is_initializing())
        scanned = scanned(config, self.sharding, emit_key_values, name="layers")
        return scanned(x, layers, context, layout, encoded)


class RecordingBlock(Block):
    """A block that also returns its output, for the cross-attention of every layer."""

    def __call__(self, x, layer, prefix, positions, segment_ids):
        x, key_values = super().__call__(x, layer, prefix, positions, segment_ids)
        return x, (key_values, x)


class RecordingTransformer(Transformer):
    """`Transformer` that returns the KeyValues and the output of every layer, [L, B, N, D]."""

    block = RecordingBlock


# ------------------------------------------------------------------------------------ model


@flax.struct.dataclass
class BLTKeyValues:
    """Rotated keys and values of a full pass, KeyValues [L, B, T or P, G, K] each."""

    encoder: Any
    latent: Any
    decoder: Any


@flax.struct.dataclass
class BLTAux:
    """What happened inside: layout: PatchLayout; encoder_hidden [B, N, D]: bytes after the local
    encoder; encoder_states [L, B, N, D]: what each encoder cross-attention saw; patch_vectors
    [B, P, k D]; latent [B, P, h_G]; key_values: BLTKeyValues or None."""

    layout: Any
    encoder_hidden: Any
    encoder_states: Any
    patch_vectors: Any
    latent: Any
    key_values: Any


@flax.struct.dataclass
class BLTOutput:
    """logits: float32 [B, N, V]; hidden: [B, N, D] normalised, before the head; cache: None
    (keys and values are in aux)."""

    logits: Any
    hidden: Any
    cache: Any
    aux: Any


@flax.struct.dataclass
class EncoderOutput:
    """hidden: [B, N, D]; states: [L, B, N, D], the bytes each encoder cross-attention sees;
    key_values: KeyValues [L, B, N, G, K] or None."""

    hidden: Any
    states: Any
    key_values: Any


class BLT(Model):
    """The model. Parts are methods, so that generation can run each when it is due."""

    config: BLTConfig
    ngram_tables: NgramTables | None = None

    def setup(self):
        config, sharding, dtype = self.config, self.sharding, self.config.precision.dtype
        width = config.local_encoder.d_model
        if (config.ngrams.kind is NgramKind.EXACT) != (self.ngram_tables is not None):
            raise ValueError(
                "ngrams.kind=EXACT needs build(ngram_tables=...), and other kinds take none"
            )
        self.byte_embedding = Embed(VOCAB_SIZE, width, dtype, sharding)
        pieces = config.row_pieces
        self.ngram_embedding = NgramEmbedding(
            config.ngrams, width, sharding, self.ngram_tables, pieces
        )
        record = RecordingTransformer if self._records else Transformer
        self.local_encoder = record(config.local_encoder, sharding, pieces)
        self.patch_encoder = PatchEncoder(config, sharding)
        if config.patch_width != config.latent.d_model:
            self.latent_projection = Projection(config.latent.d_model, ("patch_vectors", "embed"))
        self.latent_transformer = Transformer(config.latent, sharding, pieces)
        self.context_projection = Projection(self._num_context * width, ("embed", "patch_vectors"))
        self.local_decoder = LocalDecoder(config, sharding)
        self.output_norm = RMSNorm(config.local_decoder.norm_eps)
        self.head = Head(VOCAB_SIZE, sharding)

    @property
    def _num_context(self) -> int:
        none = self.config.decoder_cross_attention is DecoderCrossAttention.NONE
        return 1 if none else self.config.cross_attn_k

    @property
    def _records(self) -> bool:
        """Whether cross-attention sees other bytes than those before or after the whole stack."""
        config = self.config
        if config.local_encoder.num_layers == 1 or not config.num_encoder_cross_layers:
            return False
        return config.num_encoder_cross_layers > 1 or config.kv_from is KeyValueSource.INPUT

    def example_inputs(self) -> tuple:
        pieces, halo = self.config.row_pieces, self.config.piece_halo
        length = 8 if pieces == 1 else pieces * (halo + 1)
        return jnp.full((1, length), 4, jnp.int32), jnp.ones((1, length + 1), bool)

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        starts: Bool[Array, "B M"],
        segment_ids: Int[Array, "B N"] | None = None,
        positions: Int[Array, "B N"] | None = None,
        emit_key_values: bool = False,
    ) -> BLTOutput:
        """Logits of the next byte at every byte; starts covers the N bytes and the last target.

        segment_ids: documents, 0 = padding; None: one document per row. positions: inside
        documents; None: counted from segment_ids. emit_key_values: fill aux.key_values (prefill).
        Raises ValueError as `check_inputs` does.
        """
        check_inputs(tokens, starts, segment_ids, self.config.row_pieces)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = document_positions(segment_ids)
        # Padding never indexes a table, whatever id the data gave it.
        tokens = jnp.where(segment_ids > 0, tokens, 0)
        num_patches = self.config.max_patches or tokens.shape[1]
        layout = patch_layout(starts, segment_ids, num_patches, self.config.row_pieces)
        return self.with_layout(tokens, layout, segment_ids, positions, emit_key_values)

    def with_layout(
        self,
        tokens: Int[Array, "B N"],
        layout: PatchLayout,
        segment_ids: Int[Array, "B N"],
        positions: Int[Array, "B N"],
        emit_key_values: bool = False,
    ) -> BLTOutput:
        """As a call, with the patches laid out already and no default left."""
        check_pieces(self.config, tokens.shape[1], self.sharding)
        x = self.embed_bytes(tokens, self.history(positions, segment_ids), segment_ids)
        encoded = self.encode(x, positions, segment_ids, emit_key_values)
        patches = self.pool_patches(
            encoded.states, layout.encoder_ids, segment_ids, layout.segment_ids
        )
        latent, latent_kv = self.latent(
            patches, layout.positions, layout.segment_ids, emit_key_values
        )
        logits, hidden, decoder_kv = self.decode(
            encoded.hidden,
            self.context(latent),
            (layout.decoder_ids, segment_ids, layout.segment_ids),
            positions,
            emit_key_values,
        )
        key_values = None
        if emit_key_values:
            key_values = BLTKeyValues(encoded.key_values, latent_kv, decoder_kv)
        aux = BLTAux(layout, encoded.hidden, encoded.states, patches, latent, key_values)
        return BLTOutput(logits=logits, hidden=hidden, cache=None, aux=aux)

    def history(
        self, positions: Int[Array, "B N"], segment_ids: Int[Array, "B N"]
    ) -> Int[Array, "B N"]:
        """Tokens before each one that its n-grams may reach: its document's, or its row's."""
        if not self.config.ngrams.cross_documents:
            return positions
        if self.config.row_pieces > 1:
            return jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32) - 1
        return jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1)

    def embed_bytes(
        self,
        tokens: Int[Array, "B N"],
        history: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"],
    ) -> Float[Array, "B N D"]:
        """Byte embeddings enriched by n-grams; the last of a window of 8 tokens is complete."""
        with jax.named_scope("byte_embedding"):
            x = self.byte_embedding(tokens)
            return self.ngram_embedding(x, tokens, history, segment_ids)

    def encode(
        self,
        x: Float[Array, "B N D"],
        positions: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"],
        emit_key_values: bool = False,
    ) -> EncoderOutput:
        """The local encoder over bytes."""
        config = self.config
        with jax.named_scope("local_encoder"):
            arguments = (x, positions, segment_ids, emit_key_values)
            if self._records:
                hidden, (key_values, states) = self.local_encoder(*arguments)
                if config.kv_from is KeyValueSource.INPUT:
                    states = jnp.concatenate([x[None], states[:-1]])
                states = states[-config.num_encoder_cross_layers :]
            else:
                hidden, key_values = self.local_encoder(*arguments)
                from_input = (
                    config.kv_from is KeyValueSource.INPUT and config.num_encoder_cross_layers
                )
                states = (x if from_input else hidden)[None]
        return EncoderOutput(hidden=hidden, states=states, key_values=key_values)

    def pool_patches(
        self,
        states: Float[Array, "L B N D"],
        ids: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"],
        patch_segment_ids: Int[Array, "B P"],
    ) -> Float[Array, "B P E"]:
        """Patch vectors, k byte widths wide, of the bytes with ids 0..P-1."""
        with jax.named_scope("patch_encoder"):
            return self.patch_encoder(states, ids, segment_ids, patch_segment_ids)

    def latent(
        self,
        patches: Float[Array, "B P E"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        emit_key_values: bool = False,
    ) -> tuple[Float[Array, "B P G"], KeyValues | None]:
        """The latent transformer over patches."""
        with jax.named_scope("latent"):
            if self.config.patch_width != self.config.latent.d_model:
                patches = self.latent_projection(patches)
            return self.latent_transformer(patches, positions, segment_ids, emit_key_values)

    def context(self, latent: Float[Array, "B P G"]) -> Float[Array, "B P Q D"]:
        """The k vectors of byte width that the local decoder sees of each patch."""
        context = self.context_projection(latent)
        return context.reshape(*latent.shape[:2], self._num_context, -1)

    def decode(
        self,
        hidden: Float[Array, "B N D"],
        context: Float[Array, "B P Q D"],
        layout: tuple,
        positions: Int[Array, "B N"],
        emit_key_values: bool = False,
    ) -> tuple[Float[Array, "B N V"], Float[Array, "B N D"], KeyValues | None]:
        """Logits float32, normalised hidden states, and keys and values if asked for.

        layout: decoder ids [B, N], segment_ids [B, N], segments of patches [B, P].
        """
        with jax.named_scope("local_decoder"):
            x, key_values = self.local_decoder(hidden, context, layout, positions, emit_key_values)
        with jax.named_scope("head"):
            x = self.output_norm(x)
            return self.head(x), x, key_values

    # ------------------------------------------------------------------------------- loss

    def check_batch(self, batch: dict[str, Any]) -> None:
        """As Model.check_batch: ids, patches at the start of documents and of pieces of rows."""
        check_inputs(batch["tokens"], batch["starts"], batch["segment_ids"], self.config.row_pieces)

    def loss(self, params, batch: dict[str, jax.Array], key: jax.Array | None = None) -> LossSums:
        """Cross-entropy of the counted targets (nats and bytes of Eq. 18).

        Targets whose last complete patch lies beyond max_patches are left out and counted in
        `dropped_targets`; `patches` and `patched_bytes` are those of the whole rows.
        """
        out = self.apply(
            {"params": params},
            batch["tokens"],
            batch["starts"],
            batch["segment_ids"],
            batch["positions"],
        )
        layout, num_patches = out.aux.layout, out.aux.layout.segment_ids.shape[1]
        kept = layout.decoder_ids < num_patches
        mask = batch["target_mask"] & kept
        sums = cross_entropy_sums(
            out.logits, batch["targets"], mask, batch["target_bytes"], self.config.z_loss
        )
        real = batch["segment_ids"] > 0
        counts = {
            "patches": batch["starts"][:, :-1] & real,
            "patched_bytes": real,
            "dropped_targets": batch["target_mask"] & ~kept,
        }
        metrics = {name: jnp.sum(x).astype(jnp.float32) for name, x in counts.items()}
        return sums.replace(metrics=sums.metrics | metrics)

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs per byte, from the shapes of all products; the entropy model is apart.

        A row of context_length bytes has one patch per mean_patch_bytes, and at most max_patches.
        """
        config, p, k = self.config, self.config.mean_patch_bytes, self.config.cross_attn_k
        if config.max_patches:
            p = max(p, context_length / config.max_patches)
        width, latent_width, window = (
            config.local_encoder.d_model,
            config.latent.d_model,
            config.patch_window,
        )
        per_byte = config.local_encoder.flops_per_token(float(context_length))
        per_byte += config.local_decoder.flops_per_token(float(context_length))
        per_byte += 2 * width * VOCAB_SIZE
        per_patch = config.latent.flops_per_token(context_length / p)
        pools = 1
        if config.pool_queries is PoolQueries.PER_LAYER:
            pools += config.num_encoder_cross_layers
        per_patch += pools * 2 * config.num_pooled * width * config.patch_width
        if config.patch_width != latent_width:
            per_patch += 2 * config.patch_width * latent_width
        per_patch += 2 * latent_width * self._num_context * width
        for side, layers in (
            ("encoder", config.num_encoder_cross_layers),
            ("decoder", config.num_decoder_cross_layers),
        ):
            H, G, K = config.cross_shape(side)
            query_out, key_value = 2 * 2 * width * H * K, 2 * 2 * width * G * K
            attention = 2 * 2 * k * window * H * K
            if side == "encoder":
                per_patch += layers * k * query_out
                per_byte += layers * (key_value + attention)
            else:
                per_patch += layers * k * key_value
                per_byte += layers * (query_out + attention)
        return float(per_byte + per_patch / p)
