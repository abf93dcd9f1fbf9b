"""The Llama 3 Herd of Models (arXiv 2407.21783).

A deliberately plain decoder-only transformer, trained on 15T tokens in three stages: initial
training, long-context extension, annealing with averaged checkpoints. Every block normalises its
input, attends with fewer key-value than query heads over rotary embeddings of a large base, and
ends in a gated feed-forward layer. Packed documents are kept apart by `segment_ids`; positions
may restart per document or not, which isolates nothing by itself and is the data's choice.

Axes: B batch, T tokens, D model width, H query heads, G key-value heads, K head width, F
feed-forward width, V vocabulary, L layers.

Section 3.2, Table 3 (architecture)     Llama3Config, feed_forward_width, Llama3
Section 3.2 (document mask)             `segment_ids` of Llama3.__call__
Release 3.1 (rotary frequency scaling)  RopeConfig.scaling_factor, set by `llama31`
Section 3.4.1 (growing batches)         BatchStage, BATCH_SCHEDULE, stage_at
Section 3.4.2 (long context)            ContextStage, context_extension, ready_for_longer_context
Section 3.4.3 (annealing, averaging)    settings of blt_jax.train
Not in the paper: linear position bias  TransformerConfig.position_encoding (arXiv 2108.12409)
  softmax with a sink logit             TransformerConfig.softmax (arXiv 2309.17453, gpt-oss)
  learnable tokens before every row     Llama3Config.sink_tokens (arXiv 2309.17453)
Generation                              decoding.decoder.TransformerDecoder

Departures: the paper says nothing on initialisation; here a normal cut at three sigma with sigma =
input width^-1/2, or 0.02 as an option. It rounds the vocabulary to 128,000; the release has 128,256
ids. The frequency scaling is in the release only. Post-training, Llama Guard and the image, video
and speech adapters are not in this file.
"""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.embed import Embed, Head, check_token_ids
from blt_jax.layers.language_model import NextTokenModel
from blt_jax.layers.model import ModelConfig
from blt_jax.layers.norms import RMSNorm
from blt_jax.layers.projection import Initialization, truncated_normal
from blt_jax.layers.rope import RopeConfig
from blt_jax.layers.transformer import KeyValues, Transformer, TransformerConfig

VOCAB_SIZE = 128_256


# ---------------------------------------------------------------------------- configurations


def feed_forward_width(d_model: int, multiplier: float, multiple_of: int) -> int:
    """Table 3's widths: multiplier times 2/3 of 4 d_model, rounded up to multiple_of."""
    width = int(multiplier * int(2 * 4 * d_model / 3))
    return -(-width // multiple_of) * multiple_of


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Llama3Config(ModelConfig):
    """A Llama 3 language model.

    z_loss: coefficient of log(Z)^2 in the training objective. logits_chunk: tokens per row whose
    logits exist at once in the loss; 0 takes all of them unless that is more than 2^26 logits per
    device. sink_tokens: learnable vectors in front of every row, at positions 0.. which the tokens
    count on from; every token sees them, whatever its document and window (arXiv 2309.17453,
    section 3.3).
    """

    vocab_size: int
    transformer: TransformerConfig
    tied_embeddings: bool = False
    z_loss: float = 0.0
    logits_chunk: int = 0
    sink_tokens: int = 0

    def __post_init__(self):
        if self.vocab_size < 1:
            raise ValueError(f"Llama3Config.vocab_size={self.vocab_size}: must be >= 1")
        if self.z_loss < 0:
            raise ValueError(f"Llama3Config.z_loss={self.z_loss}: must be >= 0")
        if self.logits_chunk < 0:
            raise ValueError(f"Llama3Config.logits_chunk={self.logits_chunk}: must be >= 0")
        if self.sink_tokens < 0:
            raise ValueError(f"Llama3Config.sink_tokens={self.sink_tokens}: must be >= 0")

    def build(self, sharding: ShardingRules | None = None) -> "Llama3":
        return Llama3(config=self, sharding=sharding or ShardingRules())


def llama3_8b() -> Llama3Config:
    """8,030,261,248 parameters."""
    return _table_3(num_layers=32, d_model=4096, num_heads=32, multiplier=1.3, multiple_of=1024)


def llama3_70b() -> Llama3Config:
    """70,553,706,496 parameters."""
    return _table_3(num_layers=80, d_model=8192, num_heads=64, multiplier=1.3, multiple_of=4096)


def llama3_405b() -> Llama3Config:
    """405,853,388,800 parameters."""
    return _table_3(num_layers=126, d_model=16384, num_heads=128, multiplier=1.2, multiple_of=4096)


def _table_3(num_layers, d_model, num_heads, multiplier, multiple_of) -> Llama3Config:
    stack = TransformerConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=8,
        mlp_dim=feed_forward_width(d_model, multiplier, multiple_of),
    )
    return Llama3Config(vocab_size=VOCAB_SIZE, transformer=stack)


def llama31(config: Llama3Config, scaling_factor: float = 8.0) -> Llama3Config:
    """The same model with the frequency scaling of release 3.1 (factor 32 in the small 3.2)."""
    rope = config.transformer.rope
    if rope.scaling_factor != 1:
        raise ValueError(f"scaling_factor={rope.scaling_factor}: this config is already scaled")
    rope = dataclasses.replace(rope, scaling_factor=scaling_factor)
    return dataclasses.replace(
        config, transformer=dataclasses.replace(config.transformer, rope=rope)
    )


def llama31_8b() -> Llama3Config:
    return llama31(llama3_8b())


def llama31_70b() -> Llama3Config:
    return llama31(llama3_70b())


def llama31_405b() -> Llama3Config:
    return llama31(llama3_405b())


def small(
    *,
    vocab_size: int,
    num_layers: int = 2,
    d_model: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 0,
    mlp_dim: int = 0,
    window: int = 0,
    tied_embeddings: bool = False,
) -> Llama3Config:
    """A model for a laptop, with the rotation base 10,000 that suits short rows."""
    stack = TransformerConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        window=window,
        rope=RopeConfig(theta=10_000.0),
    )
    return Llama3Config(vocab_size=vocab_size, transformer=stack, tied_embeddings=tied_embeddings)


def byte_level(**sizes) -> Llama3Config:
    """`small` over the 256 bytes and four special ids."""
    return small(vocab_size=260, **sizes)


# ------------------------------------------------------------------------- training schedules


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class BatchStage:
    """From `after_tokens` trained tokens on: batches of `batch_tokens` in rows of this length."""

    after_tokens: int
    batch_tokens: int
    sequence_length: int

    def __post_init__(self):
        if self.after_tokens < 0:
            raise ValueError(f"BatchStage.after_tokens={self.after_tokens}: must be >= 0")
        if self.sequence_length < 1:
            raise ValueError(f"BatchStage.sequence_length={self.sequence_length}: must be >= 1")
        if self.batch_tokens < 1 or self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"BatchStage.batch_tokens={self.batch_tokens}: must be a positive multiple of "
                f"sequence_length={self.sequence_length}"
            )


BATCH_SCHEDULE = (
    BatchStage(after_tokens=0, batch_tokens=4 * 2**20, sequence_length=4096),
    BatchStage(after_tokens=252_000_000, batch_tokens=8 * 2**20, sequence_length=8192),
    BatchStage(after_tokens=2_870_000_000_000, batch_tokens=16 * 2**20, sequence_length=8192),
)
"""The 405B run (section 3.4.1); its millions of tokens read as powers of two."""


def stage_at(schedule: tuple[BatchStage, ...], tokens: int) -> BatchStage:
    """The stage in force after `tokens` trained tokens."""
    starts = [stage.after_tokens for stage in schedule]
    if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"schedule: after_tokens must start at 0 and increase, but are {starts}")
    return schedule[sum(start <= tokens for start in starts) - 1]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ContextStage:
    """One stage of long-context training: rows of `length` tokens for about `tokens` tokens."""

    length: int
    tokens: int


def context_extension(
    *,
    first: int = 8192,
    last: int = 131_072,
    increments: int = 6,
    tokens: int = 800_000_000_000,
    multiple_of: int = 4096,
) -> tuple[ContextStage, ...]:
    """Context lengths growing from `first` (already trained) to `last` (section 3.4.2).

    The paper prints both ends, six increments and 800B tokens, not the lengths between: here they
    grow by one factor, rounded to multiple_of, and share the tokens equally. A model trained so
    keeps its rotation base, and documents stay isolated.
    """
    if not 0 < first < last:
        raise ValueError(f"context_extension: first={first} must be > 0 and below last={last}")
    if increments < 1 or multiple_of < 1 or tokens < increments:
        raise ValueError(
            f"context_extension: increments={increments} and multiple_of={multiple_of} must be "
            f">= 1, tokens={tokens} at least one per increment"
        )
    factor = (last / first) ** (1 / increments)
    lengths = [
        max(multiple_of, round(first * factor**i / multiple_of) * multiple_of)
        for i in range(1, increments)
    ] + [last]
    if any(a >= b for a, b in itertools.pairwise([first, *lengths])):
        raise ValueError(
            f"context_extension: multiple_of={multiple_of} is too coarse for {increments} "
            f"increments from {first} to {last}: {lengths}"
        )
    return tuple(ContextStage(length=length, tokens=tokens // increments) for length in lengths)


def ready_for_longer_context(
    *,
    short_context_score: float,
    short_context_reference: float,
    needle_accuracy: float,
    tolerance: float = 0.0,
    needle_threshold: float = 1.0,
) -> bool:
    """Section 3.4.2: go on once short-context scores (higher is better) have recovered, up to a
    relative `tolerance`, and the needle-in-a-haystack task is solved at the current length."""
    if not 0 <= needle_accuracy <= 1:
        raise ValueError(f"needle_accuracy={needle_accuracy}: must be between 0 and 1")
    recovered = short_context_score >= short_context_reference - tolerance * abs(
        short_context_reference
    )
    return recovered and needle_accuracy >= needle_threshold


# ------------------------------------------------------------------------------------- model


@flax.struct.dataclass
class Llama3Output:
    """logits: float32 [B, T, V] or None; hidden: [B, T, D], what the head multiplies; cache: the
    KeyValues of all layers if asked for, else None, those of the sink tokens first; aux: float32
    scalar, 0 here."""

    logits: Any
    hidden: Any
    cache: Any
    aux: Any


class Llama3(NextTokenModel):
    """Token embedding, blocks, final norm, head."""

    config: Llama3Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        emit_key_values: bool = False,
        compute_logits: bool = True,
    ) -> Llama3Output:
        """segment_ids: 1.. = documents, 0 = padding; default one document per row. positions:
        default 0, 1, .. in the row. emit_key_values: return the keys and values (prefill).

        Raises TypeError for ids of a float type.
        """
        config, stack = self.config, self.config.transformer
        check_token_ids("tokens", tokens)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        stddev = 0.02 if stack.initialization is Initialization.NORMAL_002 else 0.0
        dtype = config.precision.dtype
        embed = Embed(config.vocab_size, stack.d_model, dtype, self.sharding, stddev, name="embed")
        sinks = self._sink_key_values(stddev) if config.sink_tokens else None
        transformer = Transformer(stack, self.sharding, name="transformer")
        x_BTD, key_values = transformer(
            embed(tokens), positions + config.sink_tokens, segment_ids, emit_key_values, sinks
        )
        if emit_key_values and sinks is not None:
            key_values = jax.tree.map(_in_front_of_rows, sinks, key_values)
        x_BTD = RMSNorm(stack.norm_eps, name="norm")(x_BTD)
        with jax.named_scope("head"):
            head = embed.logits
            if not config.tied_embeddings:
                head = Head(config.vocab_size, self.sharding, stddev, name="head")
            logits_BTV = head(x_BTD) if compute_logits or self.is_initializing() else None
        return Llama3Output(logits_BTV, x_BTD, key_values, jnp.float32(0.0))

    def _sink_key_values(self, stddev: float) -> KeyValues | None:
        """Keys and values [L, 1, N, G, K] of the sink tokens; None while parameters are made.

        They see themselves alone, so they are the same in front of all rows, and every device
        computes them for itself.
        """
        config, stack = self.config, self.config.transformer
        init = truncated_normal(stddev or stack.d_model**-0.5)
        init = nn.with_logical_partitioning(init, (None, "embed"))
        shape = (config.sink_tokens, stack.d_model)
        x_ND = self.param("sink_tokens", init, shape, jnp.float32)
        if self.is_initializing():
            return None
        sharding = dataclasses.replace(self.sharding, batch=(), length=())
        transformer = Transformer(stack, sharding, parent=None)
        with jax.named_scope("sink_tokens"):
            x_1ND = x_ND.astype(config.precision.dtype)[None]
            positions = jnp.arange(config.sink_tokens, dtype=jnp.int32)[None]
            weights = {"params": self.variables["params"]["transformer"]}
            segment_ids = jnp.ones_like(positions)
            return transformer.apply(weights, x_1ND, positions, segment_ids, True)[1]

    def example_inputs(self) -> tuple:
        return (jnp.zeros((1, 8), jnp.int32),)

    def inputs(self, batch: dict[str, jax.Array]) -> tuple:
        return batch["tokens"], batch.get("segment_ids"), batch.get("positions")

    def flops_per_token(self, context_length: int) -> float:
        """The sink tokens' own pass is left out: it happens once per batch."""
        stack = self.config.transformer
        head = 2.0 * stack.d_model * self.config.vocab_size
        scores = 2 * 2 * stack.num_layers * stack.num_heads * stack.head_width
        return (
            stack.flops_per_token(float(context_length)) + head + scores * self.config.sink_tokens
        )


def _in_front_of_rows(sinks: jax.Array, rows: jax.Array) -> jax.Array:
    """Keys or values [L, B, N + T, G, K] of the sinks [L, 1, N, G, K] and the rows."""
    shape = (*rows.shape[:2], *sinks.shape[2:])
    return jnp.concatenate([jnp.broadcast_to(sinks, shape), rows], axis=2)
