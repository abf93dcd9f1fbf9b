"""Contrastive decoding (arXiv 2309.09117): an expert contrasted with a weak amateur."""

import dataclasses

from blt_jax.data import word_problems
from blt_jax.data.loader import DataConfig
from blt_jax.models import llama3
from blt_jax.recipes.contrastive import AmateurComparison, AmateurKind, ContrastiveProblems
from blt_jax.train.configs import select_run
from blt_jax.train.optimizer import Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment, Pretraining


def word_model(num_layers: int, d_model: int, num_heads: int) -> llama3.Llama3Config:
    """A model of the words of the stories, unrolled: faster on CPU than a scan over layers."""
    config = llama3.small(
        vocab_size=len(word_problems.TOKENS),
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
    )
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=stack)


def training(
    model: llama3.Llama3Config, steps: int, learning_rate: float, length: int = 256, rows: int = 8
) -> Pretraining:
    """Training on stories."""
    return Pretraining(
        model=model,
        data=DataConfig(sequence_length=length, batch_size=rows),
        evaluation=EvaluationConfig(batches=8),
        schedule=Schedule(learning_rate=learning_rate, warmup_steps=min(30, steps // 4)),
        steps=steps,
    )


def smoke() -> ContrastiveProblems:
    """Trains both models, decodes, votes and ranks in a few seconds (20 s)."""
    return ContrastiveProblems(
        expert=training(word_model(1, 32, 2), 6, 3e-3, length=128, rows=4),
        small=training(word_model(1, 16, 2), 6, 3e-3, length=128, rows=4),
        kind=AmateurKind.EARLY,
        early_steps=3,
        alphas=(0.1,),
        betas=(0.5,),
        problems=8,
        voters=4,
        votes=(1, 2),
    )


RUNS = (smoke,)


def get_config(run: str = "smoke") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
