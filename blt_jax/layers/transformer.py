"""Pre-norm transformer blocks with grouped-query attention, stacked by a scan over layers."""

import dataclasses
import enum
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from blt_jax.dist.sharding import ShardingRules, constrain
from blt_jax.layers.alibi import alibi_slopes
from blt_jax.layers.mlp import SwiGLU
from blt_jax.layers.norms import RMSNorm
from blt_jax.layers.prefix import Prefix
from blt_jax.layers.projection import (
    DepthScaling,
    Initialization,
    depth_divisor,
    project,
    projection_init,
)
from blt_jax.layers.rope import RopeConfig, rope_table, rotate
from blt_jax.layers.sharded_attention import sharded_causal_attention


class PositionEncoding(enum.Enum):
    """Rotation of queries and keys, or a penalty on distance (arXiv 2108.12409) without it."""

    ROPE = "rope"
    ALIBI = "alibi"


class Softmax(enum.Enum):
    """Over the scores alone; with a logit of 0 without a value, so that weights may sum to less
    than one; or with a learnable such logit per layer and query head (gpt-oss)."""

    STANDARD = "standard"
    OFF_BY_ONE = "off_by_one"
    LEARNED_SINK = "learned_sink"


class Remat(enum.Enum):
    """What the backward pass finds stored: everything, named tensors, products, or nothing.

    SAVE_NAMES keeps `qkv`, `attention` and `block_out`; SAVE_DOTS every product without batch
    axes; FULL recomputes the whole layer from its input.
    """

    NONE = "none"
    SAVE_NAMES = "save_names"
    SAVE_DOTS = "save_dots"
    FULL = "full"

    def wrap(self, block: type[nn.Module], scanned: bool) -> type[nn.Module]:
        """The block under this policy; scanned: the body of a loop over layers, out of which the
        compiler shares nothing with the backward pass anyway."""
        policies = jax.checkpoint_policies
        policy = {
            Remat.SAVE_NAMES: policies.save_only_these_names("qkv", "attention", "block_out"),
            Remat.SAVE_DOTS: policies.dots_with_no_batch_dims_saveable,
            Remat.FULL: policies.nothing_saveable,
        }
        if self is Remat.NONE:
            return block
        return nn.remat(block, prevent_cse=not scanned, policy=policy[self])


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TransformerConfig:
    """A stack of blocks. 0 stands for the usual value: num_kv_heads = num_heads, head_dim =
    d_model / num_heads, mlp_dim = 8/3 d_model rounded up to a multiple of 256, window = none."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    window: int = 0
    position_encoding: PositionEncoding = PositionEncoding.ROPE
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    softmax: Softmax = Softmax.STANDARD
    norm_eps: float = 1e-5
    initialization: Initialization = Initialization.FAN_IN
    depth_scaling: DepthScaling = DepthScaling.NONE
    remat: Remat = Remat.NONE
    scan_layers: bool = True

    def __post_init__(self):
        for name in ("num_layers", "d_model", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig.{name}={getattr(self, name)}: must be >= 1")
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "window"):
            if getattr(self, name) < 0:
                raise ValueError(f"TransformerConfig.{name}={getattr(self, name)}: must be >= 0")
        if not self.head_dim and self.d_model % self.num_heads:
            raise ValueError(
                f"TransformerConfig.num_heads={self.num_heads}: must divide "
                f"d_model={self.d_model} (or set head_dim)"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"TransformerConfig.num_kv_heads={self.num_kv_heads}: must divide "
                f"num_heads={self.num_heads}"
            )
        if self.rotates and self.head_width % 2:
            raise ValueError(
                f"TransformerConfig: head width {self.head_width} must be even for rotary embedding"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_dim or -(-(8 * self.d_model // 3) // 256) * 256

    @property
    def rotates(self) -> bool:
        return self.position_encoding is PositionEncoding.ROPE

    def slopes(self) -> Float[Array, " H"] | None:
        """Linear position bias of the heads, see `causal_attention`; None with rotation."""
        return None if self.rotates else jnp.asarray(alibi_slopes(self.num_heads))

    def sink_logits(self, learned: Float[Array, " H"] | None) -> Float[Array, " H"] | None:
        """The sink of the attention in one layer; learned: its parameter, if it has one."""
        if self.softmax is Softmax.OFF_BY_ONE:
            return jnp.zeros(self.num_heads, jnp.float32)
        return learned

    def flops_per_token(self, context_length: float) -> float:
        """Forward FLOPs per position: projections, and causal attention over the context seen."""
        qkvo = 2 * self.d_model * self.head_width * 2 * (self.num_heads + self.kv_heads)
        mlp = 3 * 2 * self.d_model * self.mlp_width
        seen = min(self.window, context_length) if self.window else (context_length + 1) / 2
        attention = 2 * 2 * self.num_heads * self.head_width * seen
        return float(self.num_layers * (qkvo + mlp + attention))


def encode_positions(
    config: TransformerConfig, positions: Int[Array, "B T"]
) -> Float[Array, "B T K"] | Int[Array, "B T"]:
    """What the blocks read: the table of rotations, or the positions themselves for ALIBI."""
    if config.rotates:
        return rope_table(positions, config.rope, config.head_width)
    return positions


@flax.struct.dataclass
class KeyValues:
    """Keys (rotated, but for ALIBI) and values of the tokens just processed, [L, B, T, G, K]."""

    key: Any
    value: Any


class SelfAttention(nn.Module):
    """Grouped-query causal self-attention, with rotary embedding or a linear position bias."""

    config: TransformerConfig
    sharding: ShardingRules
    pieces: int = 1
    """Pieces that rows are cut into, see `layers.row_pieces`."""

    @nn.compact
    def __call__(self, x, prefix, positions, segment_ids, divisor):
        """prefix: KeyValues [1, N, G, K] that every token sees, or None; positions: as Block."""
        config = self.config
        shape = (config.d_model, config.head_width, config.num_heads, config.kv_heads)
        d_model, K, H, G = shape

        def kernel(name, shape, names, fan_in):
            init = projection_init(config.initialization, fan_in, divisor)
            return self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)

        wq = kernel("query", (d_model, H, K), ("embed", "heads", "head_dim"), d_model)
        wk = kernel("key", (d_model, G, K), ("embed", "kv_heads", "head_dim"), d_model)
        wv = kernel("value", (d_model, G, K), ("embed", "kv_heads", "head_dim"), d_model)
        wo = kernel("out", (H, K, d_model), ("heads", "head_dim", "embed"), H * K)

        names = ("batch", "length", "heads_act", None)
        # Keys and values follow their weights: with more devices than kv heads both replicate.
        kv_names = ("batch", "length", "kv_heads", None)
        q = checkpoint_name(constrain(project(x, wq), names, self.sharding), "qkv")
        k = checkpoint_name(constrain(project(x, wk), kv_names, self.sharding), "qkv")
        v = checkpoint_name(constrain(project(x, wv), kv_names, self.sharding), "qkv")
        if config.rotates:
            q, k = (rotate(x, positions, config.rope.layout) for x in (q, k))
        if prefix is not None:
            distance = None if config.rotates else positions
            prefix = Prefix(prefix.key[0], prefix.value[0], distance)
        learned = None
        if config.softmax is Softmax.LEARNED_SINK:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
            learned = self.param("sink", init, (H,), jnp.float32)
        out = sharded_causal_attention(
            *(q, k, v, segment_ids),
            window=config.window,
            sharding=self.sharding,
            pieces=self.pieces,
            slopes=config.slopes(),
            sink=config.sink_logits(learned),
            prefix=prefix,
        )
        out = constrain(out, names, self.sharding)
        return project(out, wo, num_input_axes=2), KeyValues(k, v)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig
    sharding: ShardingRules
    emit_key_values: bool = False
    """Return the keys and values of this layer (prefill); None in training."""
    pieces: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        prefix: KeyValues | None,
        positions: Float[Array, "B T K"] | Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ):
        """prefix: KeyValues [1, N, G, K] of this layer that every token sees, or None; positions:
        from `encode_positions`."""
        config = self.config
        divisor = depth_divisor(config.depth_scaling, layer, config.num_layers, config.d_model)
        with jax.named_scope("attention"):
            h = RMSNorm(config.norm_eps, name="attention_norm")(x)
            attention = SelfAttention(config, self.sharding, self.pieces, name="attention")
            h, key_values = attention(h, prefix, positions, segment_ids, divisor)
            x = x + h
        with jax.named_scope("mlp"):
            h = RMSNorm(config.norm_eps, name="mlp_norm")(x)
            mlp = SwiGLU(config.mlp_width, config.initialization, self.sharding, name="mlp")
            x = checkpoint_name(x + mlp(h, divisor), "block_out")
        x = constrain(x, ("batch", "length", "embed_act"), self.sharding)
        return x, key_values if self.emit_key_values else None


def scan_blocks(
    block: type[nn.Module],
    config: TransformerConfig,
    num_broadcast: int,
    num_scanned: int = 1,
    length: int | None = None,
    *,
    initializing: bool,
):
    """`block` lifted over `length` layers, config.num_layers if None: carry x, then `num_scanned`
    arguments with the layers as leading axis (the layer index first), then `num_broadcast`
    arguments shared by all layers. Parameters are stacked on a leading axis whether or not the
    scan is unrolled. initializing: whether parameters are made; else the block is traced once."""
    length = config.num_layers if length is None else length
    return nn.scan(
        config.remat.wrap(block, config.scan_layers),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0,) * num_scanned + (nn.broadcast,) * num_broadcast,
        out_axes=0,
        length=length,
        unroll=1 if config.scan_layers else length,
        # Their keys depend on this.
        check_constancy_invariants=initializing,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Transformer(nn.Module):
    """The stack, without embedding, final norm or head."""

    config: TransformerConfig
    sharding: ShardingRules
    pieces: int = 1
    """Pieces that rows are cut into, see `layers.row_pieces`."""
    block: ClassVar[type[nn.Module]] = Block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        emit_key_values: bool = False,
        prefix: KeyValues | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The hidden states and what the blocks return beside them: the KeyValues of all layers if
        asked for (prefill), else None.

        prefix: KeyValues [L, 1, N, G, K] of tokens at positions 0..N-1 that every token sees; then
        positions count on from N. One token at a time goes through `layers.step`.
        """
        stack = scan_blocks(self.block, self.config, 2, 2, initializing=self.is_initializing())(
            self.config, self.sharding, emit_key_values, self.pieces, name="layers"
        )
        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        encoded = encode_positions(self.config, positions)
        return stack(x, layers, prefix, encoded, segment_ids)
