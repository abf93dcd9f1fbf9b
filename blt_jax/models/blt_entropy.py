"""Entropy model of the Byte Latent Transformer (arXiv 2412.09871, section 2.3).

A small byte-level language model, trained on the same data beforehand and then frozen. Its
next-byte entropies (Eq. 1, natural logarithm, all 260 ids) decide where patches start. Its
receptive field is a sliding window of 512 bytes. With `blt_patching.reset_segments` it forgets
everything at each newline (section 4.4).

The paper reports 100M parameters, 14 layers and width 512, which do not fit together: both sizes
are here. Other hyper-parameters equal those of the BLT blocks, rotary base 500,000 included; the
release has 10,000.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.embed import Embed, Head, check_token_ids
from blt_jax.layers.losses import cross_entropy_sums
from blt_jax.layers.model import LossSums, Model, ModelConfig
from blt_jax.layers.norms import RMSNorm
from blt_jax.layers.rope import RopeConfig
from blt_jax.layers.segments import document_positions
from blt_jax.layers.transformer import Transformer, TransformerConfig
from blt_jax.models.blt_patching import VOCAB_SIZE


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class EntropyModelConfig(ModelConfig):
    """A byte-level decoder-only transformer. z_loss: coefficient of log(Z)^2 in the objective."""

    transformer: TransformerConfig
    z_loss: float = 0.0

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"EntropyModelConfig.z_loss={self.z_loss}: must be >= 0")

    def build(self, sharding: ShardingRules | None = None) -> "EntropyModel":
        return EntropyModel(config=self, sharding=sharding or ShardingRules())


def entropy_model_paper_100m() -> EntropyModelConfig:
    """The reported 100M parameters, with the width 768 that this count needs (released code)."""
    stack = TransformerConfig(num_layers=14, d_model=768, num_heads=12, mlp_dim=2048, window=512)
    return EntropyModelConfig(transformer=stack)


def entropy_model_paper_512() -> EntropyModelConfig:
    """The reported width 512: 44M parameters in its blocks."""
    stack = TransformerConfig(num_layers=14, d_model=512, num_heads=8, window=512)
    return EntropyModelConfig(transformer=stack)


def entropy_model_released() -> EntropyModelConfig:
    """The published entropy model: width 768, rotary base 10,000."""
    config = entropy_model_paper_100m()
    stack = dataclasses.replace(config.transformer, rope=RopeConfig(theta=10_000.0))
    return dataclasses.replace(config, transformer=stack)


def entropies(logits: Float[Array, "B N V"]) -> Float[Array, "B N"]:
    """Entropy in nats of the next-byte distribution after every byte, in float32 (Eq. 1)."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@flax.struct.dataclass
class EntropyOutput:
    """logits: float32 [B, N, V]; hidden: [B, N, D] normalised; cache: KeyValues [L, B, N, G, K] of
    these bytes if asked for, else None; aux: entropies float32 [B, N]."""

    logits: Any
    hidden: Any
    cache: Any
    aux: Any


class EntropyModel(Model):
    """Byte language model whose entropies place patches."""

    config: EntropyModelConfig

    def setup(self):
        config = self.config
        stack, dtype = config.transformer, config.precision.dtype
        self.byte_embedding = Embed(VOCAB_SIZE, stack.d_model, dtype, self.sharding)
        self.transformer = Transformer(stack, self.sharding)
        self.output_norm = RMSNorm(stack.norm_eps)
        self.head = Head(VOCAB_SIZE, self.sharding)

    def example_inputs(self) -> tuple:
        return (jnp.full((1, 8), 4, jnp.int32),)

    def __call__(
        self,
        tokens: Int[Array, "B N"],
        segment_ids: Int[Array, "B N"] | None = None,
        positions: Int[Array, "B N"] | None = None,
        emit_key_values: bool = False,
    ) -> EntropyOutput:
        """Logits and entropies of the next byte at every byte; emit_key_values: the keys and values
        too (prefill).

        segment_ids: documents, or pieces of them, that see only themselves; 0 = padding.
        """
        check_token_ids("tokens", tokens)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = document_positions(segment_ids)
        x = self.byte_embedding(jnp.where(segment_ids > 0, tokens, 0))
        x, key_values = self.transformer(x, positions, segment_ids, emit_key_values)
        x = self.output_norm(x)
        logits = self.head(x)
        return EntropyOutput(logits=logits, hidden=x, cache=key_values, aux=entropies(logits))

    def loss(self, params, batch: dict[str, jax.Array], key: jax.Array | None = None) -> LossSums:
        """Cross-entropy of the next byte."""
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        out = self.apply({"params": params}, tokens, segment_ids, batch["positions"])
        return cross_entropy_sums(
            out.logits,
            batch["targets"],
            batch["target_mask"],
            batch["target_bytes"],
            self.config.z_loss,
        )

    def flops_per_token(self, context_length: int) -> float:
        """Forward FLOPs per byte."""
        stack = self.config.transformer
        return stack.flops_per_token(float(context_length)) + 2.0 * stack.d_model * VOCAB_SIZE
