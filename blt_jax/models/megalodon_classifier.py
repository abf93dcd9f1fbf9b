"""Megalodon (arXiv 2404.08801) for classification of sequences, section 4.4.

The blocks of `megalodon` look both ways: an ordinary group norm in place of the timestep norm, a
second moving average that runs backwards (as in Mega, arXiv 2209.10655), attention without a
causal mask inside chunks. The mean of the last hidden states goes through a linear layer.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.embed import Embed, Head, check_token_ids
from blt_jax.layers.losses import cross_entropy_sums
from blt_jax.layers.model import LossSums, Model, ModelConfig
from blt_jax.models.megalodon import (
    block_flops,
    declare,
    dropped,
    norm_parameters,
    rotation,
    run_blocks,
)
from blt_jax.models.megalodon_config import MegalodonConfig
from blt_jax.models.megalodon_memory import documents_of, group_norm


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ClassifierConfig(ModelConfig):
    """A classifier of token rows; blocks: a MegalodonConfig with bidirectional=True, and without
    the options of a language model's head and of the timestep norm."""

    blocks: MegalodonConfig
    num_classes: int

    def __post_init__(self):
        if not self.blocks.bidirectional:
            raise ValueError("ClassifierConfig.blocks.bidirectional=False: must be True")
        for name in ("tied_embeddings", "prior_count", "z_loss", "logits_chunk"):
            value = getattr(self.blocks, name)
            if value:
                raise ValueError(
                    f"ClassifierConfig.blocks.{name}={value}: must be {type(value)()}, a "
                    "classifier has no use for it"
                )
        if self.num_classes < 2:
            raise ValueError(f"ClassifierConfig.num_classes={self.num_classes}: must be >= 2")

    def build(self, sharding: ShardingRules | None = None) -> "MegalodonClassifier":
        return MegalodonClassifier(config=self, sharding=sharding or ShardingRules())


@flax.struct.dataclass
class ClassifierOutput:
    """logits: float32 [B, classes]; hidden: [B, T, D], 0 on padding."""

    logits: Any
    hidden: Any


class MegalodonClassifier(Model):
    """Embedding, blocks, group norm, mean over the row, linear layer."""

    config: ClassifierConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
    ) -> ClassifierOutput:
        """segment_ids: 1 = the sequence, from the first token on, 0 = padding after it; default no
        padding. key: of dropout; None: none."""
        config = self.config.blocks
        check_token_ids("tokens", tokens)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        documents = documents_of(jnp.minimum(segment_ids, 1), config)
        dtype = self.config.precision.dtype
        embed = Embed(config.vocab_size, config.d_model, dtype, self.sharding, name="embed")
        x = embed(tokens)
        if config.scale_embeddings:
            x *= math.sqrt(config.d_model)
        x = dropped(x, config.dropout, key, config.num_layers)
        rope = rotation(config, tokens.shape[1], documents)
        x, _ = run_blocks(
            config, self.sharding, self.is_initializing(), x, rope, documents, None, key
        )
        w = declare(self, norm_parameters(config, "norm"))
        affine = w["norm_weight"] + 1.0, w["norm_bias"]
        x = group_norm(x, affine, documents.real, config)
        count = jnp.maximum(documents.real.sum(1, dtype=jnp.int32), 1).astype(jnp.float32)
        mean = x.astype(jnp.float32).sum(1, keepdims=True) / count[:, None, None]
        one_token = dataclasses.replace(self.sharding, length=())
        logits = Head(self.config.num_classes, one_token, name="head")(mean)
        return ClassifierOutput(logits[:, 0], x)

    def example_inputs(self) -> tuple:
        return (jnp.zeros((1, 8), jnp.int32),)

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises ValueError for rows whose sequence begins after the first token or is not one."""
        segment_ids = batch.get("segment_ids")
        if segment_ids is None:
            return
        real = np.asarray(segment_ids) > 0
        wrong = np.flatnonzero(~real[:, 0] | (real[:, 1:] & ~real[:, :-1]).any(1))
        if wrong.size:
            raise ValueError(
                f"segment_ids: rows {wrong.tolist()} have padding before a token, allowed is one "
                "sequence per row with padding after it"
            )

    def loss(self, params, batch: dict[str, jax.Array], key: jax.Array | None = None) -> LossSums:
        """Cross-entropy of `labels` [B]; reads tokens and segment_ids. Rows of padding alone count
        nothing."""
        segment_ids = batch.get("segment_ids")
        inputs = (batch["tokens"], segment_ids)
        logits = self.apply({"params": params}, *inputs, key=key).logits[:, None]
        labels = batch["labels"][:, None]
        counted = jnp.ones(labels.shape, bool)
        if segment_ids is not None:
            counted = (segment_ids > 0).any(axis=1, keepdims=True)
        return cross_entropy_sums(logits, labels, counted, jnp.ones_like(labels))

    def has_dropout(self) -> bool:
        return self.config.blocks.has_dropout

    def flops_per_token(self, context_length: int) -> float:
        blocks = self.config.blocks
        return blocks.num_layers * block_flops(blocks, context_length)
