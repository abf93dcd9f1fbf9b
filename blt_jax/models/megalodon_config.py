"""Configurations of Megalodon (arXiv 2404.08801): options, and the sizes of paper and release."""

import dataclasses
import enum
from typing import Any

from blt_jax.dist.sharding import ShardingRules
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.layers.rope import RopeConfig
from blt_jax.layers.transformer import Remat


class EmaKind(enum.Enum):
    """The moving average: Megalodon's complex one with a skip connection, Mega's real one, or none,
    to see what it does."""

    COMPLEX = "complex"
    REAL = "real"
    NONE = "none"


class NormKind(enum.Enum):
    """The norm before a block and before the head: over the groups of all tokens so far, or layer
    norm of each token, to see what the first does."""

    TIMESTEP = "timestep"
    LAYER = "layer"


class ResidualKind(enum.Enum):
    """What the feed-forward output is added to: the block's input, which skips the attention
    (Megalodon), or the stream after the attention, as pre-norm transformers do."""

    TWO_HOP = "two_hop"
    PRE_NORM = "pre_norm"


class GateKind(enum.Enum):
    """How attention output joins the stream: Megalodon's sum x + h, or Mega's update gate
    x + phi (SiLU(h) - x); the attention itself and the two hops are Megalodon's in both."""

    MEGALODON = "megalodon"
    MEGA = "mega"


class AttentionKind(enum.Enum):
    """Weights of keys: softmax of normalised vectors (Megalodon), or Mega's functions of SiLU
    vectors, softmax of scores over K^1/2, relu^2 and Laplace of scores over the keys seen."""

    NORMALISED = "normalised"
    SOFTMAX = "softmax"
    RELU_SQUARED = "relu_squared"
    LAPLACE = "laplace"


class ScanForm(enum.Enum):
    """Implementation of `pallas_kernels.cema_scan`; AUTO goes by platform."""

    AUTO = "auto"
    REFERENCE = "reference"
    XLA = "xla"
    TPU = "tpu"
    GPU = "gpu"
    INTERPRET = "interpret"
    FFT = "fft"
    ASSOCIATIVE = "associative"


class WeightInit(enum.Enum):
    """Projections: standard deviation (3 fan_in)^-1/2, 0.02, Xavier uniform, or fan_in^-1/2 cut."""

    HE = "he"
    BERT = "bert"
    XAVIER = "xavier"
    GAUSSIAN = "gaussian"


class DecayInit(enum.Enum):
    """Moduli of the moving average at the start: the paper's (about 30 tokens of memory), or
    spread so that memories of 2 tokens to a chunk are equally common on a log scale."""

    PAPER = "paper"
    LOG_UNIFORM = "log_uniform"


class AttentionDropout(enum.Enum):
    """Dropout of weights after the softmax, or of keys before it."""

    WEIGHTS = "weights"
    KEYS = "keys"


def _rope() -> RopeConfig:
    return RopeConfig(theta=10_000.0)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MegalodonConfig(ModelConfig):
    """A Megalodon language model.

    attention_window: 0, or a sliding window with positions over the whole document instead of
    chunks. prior_count: learnable tokens that the timestep norm has seen beforehand.
    rescale_mlp: a trained factor per channel on the feed-forward output. logits_chunk: see
    NextTokenModel. remat keeps what `layers.transformer.Remat` says.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    qk_dim: int
    value_dim: int
    mlp_dim: int
    chunk_size: int
    norm_groups: int
    state_size: int = 16
    swiglu: bool = False
    rope: RopeConfig = dataclasses.field(default_factory=_rope)
    attention_window: int = 0
    prior_count: int = 0
    norm_eps: float = 1e-5
    rescale_mlp: bool = False
    scale_embeddings: bool = False
    tied_embeddings: bool = False
    ema: EmaKind = EmaKind.COMPLEX
    norm: NormKind = NormKind.TIMESTEP
    residual: ResidualKind = ResidualKind.TWO_HOP
    gate: GateKind = GateKind.MEGALODON
    attention: AttentionKind = AttentionKind.NORMALISED
    input_phase: bool = False
    bidirectional: bool = False
    initialization: WeightInit = WeightInit.HE
    decay_init: DecayInit = DecayInit.PAPER
    scan_form: ScanForm = ScanForm.AUTO
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention_dropout_kind: AttentionDropout = AttentionDropout.WEIGHTS
    z_loss: float = 0.0
    logits_chunk: int = 0
    remat: Remat = Remat.NONE
    scan_layers: bool = True

    def __post_init__(self):
        positive = "vocab_size num_layers d_model num_heads qk_dim value_dim mlp_dim chunk_size"
        for name in (*positive.split(), "norm_groups", "state_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"MegalodonConfig.{name}={getattr(self, name)}: must be >= 1")
        for name in ("attention_window", "prior_count", "z_loss", "logits_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"MegalodonConfig.{name}={getattr(self, name)}: must be >= 0")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"MegalodonConfig.{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("qk_dim", "value_dim"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(
                    f"MegalodonConfig.{name}={getattr(self, name)}: must be a multiple of "
                    f"num_heads={self.num_heads}"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"MegalodonConfig.qk_dim={self.qk_dim}: the width per head, {self.head_dim}, must "
                "be even for rotary embedding"
            )
        if self.norm_eps <= 0:
            raise ValueError(f"MegalodonConfig.norm_eps={self.norm_eps}: must be > 0")
        if self.input_phase and self.ema is not EmaKind.COMPLEX:
            raise ValueError(
                "MegalodonConfig.input_phase=True: needs ema=EmaKind.COMPLEX, nothing else has a "
                "phase"
            )
        if self.norm is NormKind.LAYER and (self.prior_count or self.bidirectional):
            raise ValueError(
                f"MegalodonConfig.norm=LAYER: prior_count={self.prior_count} and "
                f"bidirectional={self.bidirectional} must be 0 and False, they have group norms"
            )
        if self.d_model % self.norm_groups:
            raise ValueError(
                f"MegalodonConfig.norm_groups={self.norm_groups}: must divide "
                f"d_model={self.d_model}"
            )
        # A group norm looks at whole rows.
        alone = self.norm_groups == self.d_model and not self.bidirectional
        alone = alone and self.norm is NormKind.TIMESTEP
        if alone and self.prior_count < 2:
            raise ValueError(
                f"MegalodonConfig.prior_count={self.prior_count}: must be >= 2 with "
                f"norm_groups=d_model={self.d_model}, or the first token has no variance"
            )

        if self.attention is not AttentionKind.NORMALISED and self.gate is not GateKind.MEGA:
            raise ValueError(
                f"MegalodonConfig.attention={self.attention.name}: allowed with gate=MEGA, "
                "gate=MEGALODON has NORMALISED alone"
            )
        keys = self.attention_dropout and self.attention_dropout_kind is AttentionDropout.KEYS
        if keys and self.elementwise:
            raise ValueError(
                f"MegalodonConfig.attention_dropout_kind=KEYS: must be WEIGHTS with "
                f"attention={self.attention.name}, which has no softmax"
            )

    @property
    def elementwise(self) -> bool:
        """Whether the weight of a key does not depend on the other keys' scores."""
        return self.attention in (AttentionKind.RELU_SQUARED, AttentionKind.LAPLACE)

    @property
    def head_dim(self) -> int:
        """K."""
        return self.qk_dim // self.num_heads

    @property
    def value_width(self) -> int:
        """J."""
        return self.value_dim // self.num_heads

    @property
    def ema_size(self) -> int:
        """Complex numbers of state per channel."""
        return 0 if self.ema is EmaKind.NONE else self.state_size

    @property
    def reach(self) -> int:
        """Tokens whose keys and values a row keeps."""
        return self.attention_window or self.chunk_size

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped when a key is given."""
        return bool(self.dropout or self.hidden_dropout or self.attention_dropout)

    def build(self, sharding: ShardingRules | None = None) -> Model:
        if self.bidirectional:
            raise ValueError(
                "MegalodonConfig.bidirectional=True: a language model looks back only, use "
                "ClassifierConfig"
            )
        from blt_jax.models.megalodon import Megalodon

        return Megalodon(config=self, sharding=sharding or ShardingRules())


def _released(num_layers, d_model, num_heads, mlp_dim, **changes) -> MegalodonConfig:
    sizes = dict(
        vocab_size=32_000,
        qk_dim=256 * num_heads,
        value_dim=2 * d_model,
        chunk_size=2048,
        norm_groups=min(d_model // 32, 64),
    )
    sizes |= dict(num_layers=num_layers, d_model=d_model, num_heads=num_heads, mlp_dim=mlp_dim)
    return MegalodonConfig(**(sizes | changes))


def mega_200m() -> MegalodonConfig:
    """220,627,968 parameters."""
    return _released(12, 1024, 1, 2560)


def mega_1_3b() -> MegalodonConfig:
    """1,342,832,640 parameters."""
    return _released(24, 2048, 2, 4864)


def mega_1_3b_pg19() -> MegalodonConfig:
    """1,327,628,288 parameters."""
    shared = dict(scale_embeddings=True, tied_embeddings=True)
    return _released(24, 2048, 2, 3584, swiglu=True, **shared)


def mega_7_1b() -> MegalodonConfig:
    """7,117,381,632 parameters."""
    return _released(32, 4096, 4, 11264)


def mega_7_3b() -> MegalodonConfig:
    """7,385,817,088 parameters."""
    return _released(32, 4096, 4, 8192, swiglu=True)


def megalodon_7b() -> MegalodonConfig:
    """The model of the paper: 7,385,817,088 parameters, chunks of 4096, rotary base 100,000."""
    return dataclasses.replace(mega_7_3b(), chunk_size=4096, rope=RopeConfig(theta=100_000.0))


def small(
    *, vocab_size: int, num_layers: int = 2, d_model: int = 64, chunk_size: int = 64, **changes: Any
) -> MegalodonConfig:
    """A model for a laptop: one head, the released proportions, SwiGLU."""
    sizes = dict(
        num_heads=1,
        qk_dim=max(d_model // 4, 2),
        value_dim=2 * d_model,
        mlp_dim=2 * d_model,
        norm_groups=max(d_model // 16, 1),
        state_size=8,
        swiglu=True,
    )
    sizes |= dict(num_layers=num_layers, d_model=d_model, chunk_size=chunk_size)
    return MegalodonConfig(vocab_size=vocab_size, **(sizes | changes))


def byte_level(**sizes: Any) -> MegalodonConfig:
    """`small` over the 256 bytes and four special ids."""
    return small(vocab_size=260, **sizes)
