"""Configuration of the Byte Latent Transformer (arXiv 2412.09871) and its FLOPs per byte.

Model sizes                            paper_400m ... paper_8b, block_parameters
Eq. 13-17 (FLOPs per byte)             paper_flops_per_byte
Released code                          released_1b

Options default to the paper's choice; every one is a field of BLTConfig.
"""

import dataclasses
import enum
from typing import TYPE_CHECKING, NamedTuple

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.model import ModelConfig
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models.blt_ngrams import NgramConfig, NgramTables

if TYPE_CHECKING:
    from blt_jax.models.blt import BLT


class EncoderCrossAttention(enum.Enum):
    """After which encoder layers patches attend to their bytes; NONE leaves the pooled bytes."""

    ALL = "all"
    LAST = "last"
    NONE = "none"


class DecoderCrossAttention(enum.Enum):
    """Before which decoder layers bytes attend to their patch; NONE adds its projection once."""

    ALL = "all"
    FIRST = "first"
    NONE = "none"


class Residual(enum.Enum):
    """What a cross-attention adds to: its queries (paper), or twice its queries (release)."""

    SINGLE = "single"
    DOUBLED = "doubled"


class KeyValueSource(enum.Enum):
    """Bytes that encoder cross-attention l sees: the output of layer l, or its input (Eq. 7)."""

    OUTPUT = "output"
    INPUT = "input"


class PoolQueries(enum.Enum):
    """Patch queries come from pooled bytes once, before the first cross-attention, or anew at
    each (Hugging Face port; then only the last cross-attention reaches the result)."""

    ONCE = "once"
    PER_LAYER = "per_layer"


class Pooling(enum.Enum):
    """How bytes become the first patch vector; several names are concatenated, and FIRST_BYTES
    concatenates the first `pooled_bytes` bytes of the patch."""

    MAX = "max"
    MEAN = "mean"
    MIN = "min"
    MAX_MEAN = "max_mean"
    MAX_MIN = "max_min"
    MEAN_MIN = "mean_min"
    MAX_MEAN_MIN = "max_mean_min"
    FIRST_BYTES = "first_bytes"


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class BLTConfig(ModelConfig):
    """The three transformers and every named option; 0 stands for the usual value.

    cross_attn_k: vectors per patch. *_cross_heads, *_cross_kv_heads: those of the local model.
    patch_window: W patches p-W+1..p that a patch (or byte) sees in cross-attention. max_patches:
    patches per row, all rows padded to it; 0: as many as bytes. Bytes beyond it are never merged
    into a kept patch: their targets leave the loss and are counted. row_pieces: rows are cut into
    so many pieces of whole patches, each with its share of max_patches, which devices divide among
    them (context parallelism). mean_patch_bytes: for FLOPs.
    """

    local_encoder: TransformerConfig
    latent: TransformerConfig
    local_decoder: TransformerConfig
    ngrams: NgramConfig = dataclasses.field(default_factory=NgramConfig)
    cross_attn_k: int = 2
    encoder_cross_heads: int = 0
    encoder_cross_kv_heads: int = 0
    decoder_cross_heads: int = 0
    decoder_cross_kv_heads: int = 0
    encoder_cross_attention: EncoderCrossAttention = EncoderCrossAttention.ALL
    decoder_cross_attention: DecoderCrossAttention = DecoderCrossAttention.ALL
    residual: Residual = Residual.SINGLE
    kv_from: KeyValueSource = KeyValueSource.OUTPUT
    pool_queries: PoolQueries = PoolQueries.ONCE
    pooling: Pooling = Pooling.MAX
    pooled_bytes: int = 4
    patch_window: int = 1
    max_patches: int = 0
    row_pieces: int = 1
    mean_patch_bytes: float = 4.5
    z_loss: float = 0.0

    def __post_init__(self):
        def reject(field, rule):
            raise ValueError(f"BLTConfig.{field}={getattr(self, field)}: {rule}")

        if self.local_decoder.d_model != self.local_encoder.d_model:
            raise ValueError(
                f"BLTConfig.local_decoder.d_model={self.local_decoder.d_model}: must equal "
                f"local_encoder.d_model={self.local_encoder.d_model}, whose bytes it continues"
            )
        for field in ("cross_attn_k", "pooled_bytes", "patch_window", "row_pieces"):
            if getattr(self, field) < 1:
                reject(field, "must be >= 1")
        if self.max_patches < 0:
            reject("max_patches", "must be >= 0 (0: one per byte)")
        if self.row_pieces > 1:
            if not self.max_patches or self.max_patches % self.row_pieces:
                reject("max_patches", f"must be a multiple of row_pieces={self.row_pieces}")
            for field in ("local_encoder", "latent", "local_decoder"):
                if not getattr(self, field).rotates:
                    raise ValueError(
                        f"BLTConfig.{field}.position_encoding=ALIBI: must be ROPE with "
                        f"row_pieces={self.row_pieces}, whose padding a distance would count"
                    )
            for field, value, allowed in (
                ("patch_window", self.patch_window, 1),
                ("latent.window", self.latent.window, 0),
            ):
                if value != allowed:
                    raise ValueError(
                        f"BLTConfig.{field}={value}: must be {allowed} with "
                        f"row_pieces={self.row_pieces}, whose padding a window would count"
                    )
        if self.mean_patch_bytes < 1:
            reject("mean_patch_bytes", "must be >= 1")
        if self.z_loss < 0:
            reject("z_loss", "must be >= 0")
        for side in ("encoder", "decoder"):
            heads, kv_heads, _ = self.cross_shape(side)
            width = self.local_encoder.d_model
            if heads < 1 or width % heads:
                reject(f"{side}_cross_heads", f"{heads} heads must divide the width {width}")
            if kv_heads < 1 or heads % kv_heads:
                reject(f"{side}_cross_kv_heads", f"{kv_heads} must divide the {heads} heads")

    def cross_shape(self, side: str) -> tuple[int, int, int]:
        """Heads, kv heads and head width of the encoder's or decoder's cross-attention."""
        local = self.local_encoder if side == "encoder" else self.local_decoder
        heads = getattr(self, f"{side}_cross_heads")
        kv_heads = getattr(self, f"{side}_cross_kv_heads") or heads or local.kv_heads
        heads = heads or local.num_heads
        return heads, kv_heads, local.d_model // max(heads, 1)

    @property
    def patch_width(self) -> int:
        """Width k h_E of a patch vector; a projection to the latent width follows if unequal."""
        return self.cross_attn_k * self.local_encoder.d_model

    @property
    def piece_halo(self) -> int:
        """Bytes before a piece that its own bytes may see: those of a window or an n-gram."""
        windows = (self.local_encoder.window, self.local_decoder.window)
        return max(*windows, *(size for _, size in self.ngrams.tables), 1) - 1

    @property
    def num_pooled(self) -> int:
        """Byte-wide vectors that pooling concatenates."""
        if self.pooling is Pooling.FIRST_BYTES:
            return self.pooled_bytes
        return len(self.pooling.value.split("_"))

    @property
    def num_encoder_cross_layers(self) -> int:
        layers = self.local_encoder.num_layers
        return {"ALL": layers, "LAST": 1, "NONE": 0}[self.encoder_cross_attention.name]

    @property
    def num_decoder_cross_layers(self) -> int:
        layers = self.local_decoder.num_layers
        return {"ALL": layers, "FIRST": 1, "NONE": 0}[self.decoder_cross_attention.name]

    def build(
        self, sharding: ShardingRules | None = None, ngram_tables: NgramTables | None = None
    ) -> "BLT":
        """The model; ngram_tables are needed for ngrams.kind=EXACT."""
        # The modules need this file's classes first.
        from blt_jax.models.blt import BLT

        sharding = sharding or ShardingRules()
        return BLT(config=self, sharding=sharding, ngram_tables=ngram_tables)


def _paper(encoder, latent, decoder, cross_attn_k, max_patches=4096) -> BLTConfig:
    """Each transformer as (layers, heads, width)."""

    def stack(layers, heads, width, window=0):
        return TransformerConfig(num_layers=layers, num_heads=heads, d_model=width, window=window)

    return BLTConfig(
        local_encoder=stack(*encoder, window=512),
        latent=stack(*latent),
        local_decoder=stack(*decoder, window=512),
        cross_attn_k=cross_attn_k,
        max_patches=max_patches,
    )


def paper_400m() -> BLTConfig:
    """The paper's size with 470M in the latent transformer."""
    return _paper((1, 12, 768), (24, 10, 1280), (7, 12, 768), cross_attn_k=2)


def paper_1b() -> BLTConfig:
    """The paper's size with 1B in the latent transformer."""
    return _paper((1, 16, 1024), (25, 16, 2048), (9, 16, 1024), cross_attn_k=2)


def paper_2b() -> BLTConfig:
    """The paper's size with 2B in the latent transformer."""
    return _paper((1, 16, 1024), (26, 20, 2560), (9, 16, 1024), cross_attn_k=3)


def paper_4b() -> BLTConfig:
    """The paper's size with 4.1B in the latent transformer."""
    return _paper((1, 16, 1024), (36, 24, 3072), (9, 16, 1024), cross_attn_k=3)


def paper_8b() -> BLTConfig:
    """The paper's size with 6.4B in the latent transformer."""
    return _paper((1, 20, 1280), (32, 32, 4096), (6, 20, 1280), cross_attn_k=4)


def released_1b() -> BLTConfig:
    """The published 1B checkpoint."""
    return dataclasses.replace(
        paper_1b(),
        ngrams=NgramConfig.released(),
        encoder_cross_attention=EncoderCrossAttention.LAST,
        residual=Residual.DOUBLED,
    )


def block_parameters(stack: TransformerConfig) -> int:
    """Parameters in units the paper counts: 12 l h^2, blocks of four projections and a 4h FFN."""
    return 12 * stack.num_layers * stack.d_model**2


class PaperFlops(NamedTuple):
    """Forward FLOPs per byte of the parts (Eq. 13); their sum is the model's."""

    latent: float
    encoder: float
    decoder: float
    encoder_cross: float
    decoder_cross: float


def paper_transformer_flops(
    width: int,
    layers: int,
    context: int | float,
    vocab_size: int = 0,
    keys_per_query: int | float = 1.0,
) -> float:
    """Forward FLOPs per token of a transformer with d_ff = 4 width (Eq. 14-17)."""
    attention = paper_attention_flops(width, layers, context, keys_per_query)
    return attention + 16 * layers * width**2 + 2 * width * vocab_size


def paper_attention_flops(
    width: int, layers: int, context: int | float, keys_per_query: int | float
) -> float:
    """Attention and its projections; keys_per_query is the paper's r, printed as its inverse."""
    attention = 4 * layers * width * (context + 1) / 2
    return attention + (2 * keys_per_query + 2) * 2 * layers * width**2


def paper_flops_per_byte(
    config: BLTConfig, patch_bytes: int | float, context: int | float
) -> PaperFlops:
    """The paper's FLOPs per byte at a mean patch size and a context in bytes (Eq. 13).

    Causal halving is applied to cross-attention too, as in the paper; projections between the
    parts and the entropy model are left out.
    """
    encoder, latent, decoder = config.local_encoder, config.latent, config.local_decoder
    p, k = patch_bytes, config.cross_attn_k
    encoder_layers, decoder_layers = (
        config.num_encoder_cross_layers,
        config.num_decoder_cross_layers,
    )
    return PaperFlops(
        latent=paper_transformer_flops(latent.d_model, latent.num_layers, context / p) / p,
        encoder=paper_transformer_flops(encoder.d_model, encoder.num_layers, encoder.window),
        decoder=paper_transformer_flops(decoder.d_model, decoder.num_layers, decoder.window, 256),
        encoder_cross=paper_attention_flops(encoder.d_model, encoder_layers, p, p / k) * k / p,
        decoder_cross=paper_attention_flops(decoder.d_model, decoder_layers, k, k / p),
    )
