"""A model of a few thousand parameters for the tests of the training package."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from blt_jax.data.loader import DataConfig
from blt_jax.layers.losses import cross_entropy_sums
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import EvaluationConfig, Pretraining


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TinyConfig(ModelConfig):
    """width: of the embedding; noise: standard deviation of noise on the logits."""

    width: int = 16
    vocab_size: int = 260
    noise: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"TinyConfig.width={self.width}: must be >= 1")

    def build(self, sharding=None):
        return TinyModel(config=self, **({"sharding": sharding} if sharding else {}))


class TinyModel(Model):
    """Predicts the next byte from the current one and the one before."""

    @nn.compact
    def __call__(self, tokens):
        width = self.config.width

        def init(*names):
            return nn.with_logical_partitioning(nn.initializers.normal(0.1), names)

        embedding = self.param("embedding", init("vocab", "embed"), (self.config.vocab_size, width))
        x_BTD = jnp.take(embedding, tokens, axis=0)
        x_BTD = x_BTD + jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        kernel = self.param("kernel", init("embed", "mlp"), (width, 2 * width))
        bias = self.param("bias", init("mlp"), (2 * width,))
        x_BTD = jax.nn.gelu(jnp.einsum("btd,df->btf", x_BTD, kernel) + bias[None, None, :])
        norm = self.param("norm", init("norm"), (2 * width,))
        x_BTD = x_BTD * (1.0 + norm)[None, None, :]
        head = self.param("head", init("embed", "vocab"), (2 * width, self.config.vocab_size))
        return self.config.scale * jnp.einsum("btf,fv->btv", x_BTD, head)

    def example_inputs(self):
        return (jnp.zeros((1, 4), jnp.int32),)

    def loss(self, params, batch, key=None):
        logits = self.apply({"params": params}, batch["tokens"])
        if self.config.noise and key is not None:
            logits = logits + self.config.noise * jax.random.normal(key, logits.shape)
        if "fault" in batch:
            logits = logits + batch["fault"][:, None, None]
        return cross_entropy_sums(
            logits, batch["targets"], batch["target_mask"], batch["target_bytes"]
        )

    def flops_per_token(self, context_length):
        return 2.0 * self.config.width * (2 * self.config.width + 2 * self.config.vocab_size)


def tiny_experiment(**changes):
    """A run of 12 steps on 8 rows of 32 bytes."""
    data = DataConfig(batch_size=8, sequence_length=32, num_threads=0, prefetch=0)
    values = {
        "model": TinyConfig(),
        "data": data,
        "steps": 12,
        "evaluation": EvaluationConfig(batches=2),
        "logging": LoggingConfig(every=1, quiet=True, tensorboard=False),
    }
    return Pretraining(**{**values, **changes})
