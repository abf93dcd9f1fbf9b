"""Byte Latent Transformer (arXiv 2412.09871): patches of bytes in place of tokens.

The paper claims that patches cut where the next byte is hard to predict match BPE tokens at equal
training FLOPs, and that hash n-gram embeddings of the bytes help.

    python -m blt_jax.run --config=experiments/blt.py:tiny --workdir=runs/blt

trains an entropy model, finds the threshold for 4.5 bytes per patch, trains a BLT on the Python
standard library's own source text and generates some of it.
"""

import dataclasses

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.recipes.blt_pretraining import BLTPretraining
from blt_jax.train.optimizer import Decay, Schedule
from blt_jax.train.pretraining import EvaluationConfig, Pretraining


def stack(layers: int, width: int, heads: int, window: int = 0) -> TransformerConfig:
    """A small transformer, unrolled: faster on CPU than a scan over layers."""
    return TransformerConfig(
        num_layers=layers, d_model=width, num_heads=heads, window=window, scan_layers=False
    )


def rows(num_bytes: int, sequence_length: int, batch_size: int, max_patches: int = 0) -> DataConfig:
    """Rows of the standard library's text, about num_bytes of it."""
    return DataConfig(
        sources=(SourceConfig(max_bytes=num_bytes),),
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_patches=max_patches,
    )


def entropy_model(layers: int, width: int, steps: int, data: DataConfig) -> Pretraining:
    """Training of the small byte-level model whose entropies place the patch boundaries."""
    return Pretraining(
        model=blt.EntropyModelConfig(transformer=stack(layers, width, 4, window=128)),
        data=data,
        evaluation=EvaluationConfig(batches=8),
        schedule=Schedule(learning_rate=3e-3, warmup_steps=steps // 20, decay=Decay.COSINE),
        steps=steps,
    )


def smoke() -> BLTPretraining:
    """All three steps in a few seconds, too small to learn much (20 s)."""
    data = rows(60_000, 128, 4)
    model = blt.BLTConfig(
        local_encoder=stack(1, 32, 2, window=32),
        latent=stack(1, 48, 2),
        local_decoder=stack(1, 32, 2, window=32),
        ngrams=blt.NgramConfig(sizes=(3, 4), vocab_size=251),
        max_patches=48,
    )
    return BLTPretraining(
        entropy_model=entropy_model(1, 32, 10, data),
        patcher=PatcherConfig(target_patch_size=4.0),
        blt=Pretraining(
            model=model,
            data=dataclasses.replace(data, max_patches=48),
            evaluation=EvaluationConfig(batches=2),
            schedule=Schedule(learning_rate=3e-3),
            steps=10,
        ),
        calibration_bytes=20_000,
        prompts=("def ",),
        sample_bytes=16,
        figure_bytes=128,
    )


RUNS = (smoke,)


def get_config(run: str = "smoke") -> BLTPretraining:
    """The config of a run, by its name."""
    from blt_jax.train.configs import select_run

    return select_run(RUNS, run)
