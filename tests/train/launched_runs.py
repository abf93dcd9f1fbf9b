"""Runs of a few seconds that tests start through the launcher, on one process or several."""

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.recipes.blt_pretraining import BLTPretraining
from blt_jax.train.configs import select_run
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import CheckpointingConfig, EvaluationConfig, Pretraining
from tests.train.tiny_model import TinyConfig, tiny_experiment


def _stack() -> TransformerConfig:
    return TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, scan_layers=False)


def tiny_blt() -> BLTPretraining:
    """A BLT of space patches: six steps, a checkpoint at each."""
    data = DataConfig(
        sources=(SourceConfig(max_bytes=60_000),),
        batch_size=8,
        sequence_length=32,
        max_patches=16,
        num_threads=0,
        prefetch=0,
    )
    training = Pretraining(
        model=blt.BLTConfig(
            local_encoder=_stack(),
            latent=_stack(),
            local_decoder=_stack(),
            ngrams=blt.NgramConfig(sizes=(3,), vocab_size=31),
            max_patches=16,
        ),
        data=data,
        evaluation=EvaluationConfig(batches=1),
        steps=6,
        accumulation=2,
        checkpointing=CheckpointingConfig(every=1, keep=10),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
    return BLTPretraining(
        blt=training, patcher=PatcherConfig(kind=PatcherKind.SPACE), prompts=(), figure_bytes=64
    )


def tiny() -> Pretraining:
    """Forty steps of the tests' model, a checkpoint at every fifth."""
    return tiny_experiment(
        steps=40,
        model=TinyConfig(noise=0.01),
        evaluation=EvaluationConfig(batches=1),
        checkpointing=CheckpointingConfig(every=5, keep=3),
        logging=LoggingConfig(every=1, tensorboard=False),
    )


RUNS = (tiny_blt, tiny)


def get_config(run: str = "tiny"):
    """The config of a run by name."""
    return select_run(RUNS, run)
