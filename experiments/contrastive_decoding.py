"""Contrastive decoding (arXiv 2309.09117): an expert contrasted with a weak amateur.

The paper: chain-of-thought answers improve where the expert is contrasted with a much weaker model
(GSM8K, 65B: 51.0 to 56.8 at beta 0.5), less so at beta 1 and with a stronger amateur, an earlier
checkpoint is an amateur too, and less is copied from the question.

    python -m blt_jax.run --config=experiments/contrastive_decoding.py:proof --workdir=runs/contrast

trains an expert, a second one and a small model on arithmetic stories, of which 30 % are answered
by copying the last number, and reports held-out exact match of five kinds of amateur beside
greedy decoding of the expert alone. Expect a gain from the negative prompt and the shortened
context, harm from the second expert, and, over seeds, none from the small model and the earlier
checkpoint. `weak_amateurs` has two more: 3-grams, which gain most, and the small model after an
example with the shortcut, which does not. `tiny` judges one amateur, any of them by --config.kind.
`proof_text` does it on bytes of the Python standard library.
`gsm8k` takes Hugging Face folders of Llamas: --config.expert=models/llama_65b and so on; its eight
examples are a file of the user's.
What was found is in docs/results/contrastive_decoding.md.
"""

import dataclasses

from blt_jax.data import word_problems
from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig
from blt_jax.data.tokenizers import TokenizerConfig, TokenizerKind
from blt_jax.models import llama3
from blt_jax.recipes.contrastive import AmateurComparison, AmateurKind, ContrastiveProblems
from blt_jax.recipes.contrastive_questions import ContrastiveQuestions
from blt_jax.recipes.contrastive_text import ContrastiveText
from blt_jax.train.configs import select_run
from blt_jax.train.optimizer import Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment, Pretraining

BYTES = llama3.byte_level().vocab_size
WORDS = len(word_problems.TOKENS)


def model(vocab_size: int, num_layers: int, d_model: int) -> llama3.Llama3Config:
    """A model with heads of width 32, unrolled: faster on CPU than a scan over layers."""
    config = llama3.small(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=max(d_model // 32, 1),
    )
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=stack)


def on_stories(
    num_layers: int, d_model: int, steps: int, length: int = 256, rows: int = 8
) -> Pretraining:
    """Training on arithmetic stories."""
    return Pretraining(
        model=model(WORDS, num_layers, d_model),
        data=DataConfig(sequence_length=length, batch_size=rows),
        evaluation=EvaluationConfig(batches=8),
        schedule=Schedule(learning_rate=2e-3, warmup_steps=min(30, steps // 4)),
        steps=steps,
    )


def on_text(
    num_layers: int, d_model: int, steps: int, num_bytes: int = 3_000_000, length: int = 256
) -> Pretraining:
    """Training on the standard library's text."""
    return Pretraining(
        model=model(BYTES, num_layers, d_model),
        data=DataConfig(
            sources=(SourceConfig(max_bytes=num_bytes),),
            shuffle_rows=num_bytes // length,
            sequence_length=length,
        ),
        evaluation=EvaluationConfig(batches=50),
        schedule=Schedule(learning_rate=2e-3, warmup_steps=min(30, steps // 4)),
        steps=steps,
    )


def smoke() -> ContrastiveProblems:
    """Trains an expert, contrasts it with its earlier self, votes and ranks (20 s)."""
    return ContrastiveProblems(
        expert=on_stories(1, 32, 6, length=128, rows=4),
        small=on_stories(1, 16, 6, length=128, rows=4),
        kind=AmateurKind.EARLY,
        early_steps=3,
        alphas=(0.1,),
        betas=(0.5,),
        problems=8,
        voters=4,
        votes=(1, 2),
    )


def text_smoke() -> ContrastiveText:
    """Two models of bytes, their greedy continuations and a ranking (20 s)."""
    tiny_text = on_text(1, 32, 6, num_bytes=60_000, length=64)
    tiny_text = dataclasses.replace(tiny_text, evaluation=EvaluationConfig(batches=2))
    return ContrastiveText(
        expert=tiny_text,
        amateur=dataclasses.replace(tiny_text, model=model(BYTES, 1, 16)),
        betas=(0.0, 0.5),
        pieces=4,
        prompt_bytes=16,
        true_bytes=16,
        new_bytes=24,
        shown=1,
    )


def tiny() -> ContrastiveProblems:
    """Expert and small amateur on arithmetic stories (3 min)."""
    return _problems(AmateurKind.SMALL)


def _problems(kind: AmateurKind) -> ContrastiveProblems:
    return ContrastiveProblems(
        kind=kind,
        expert=on_stories(3, 128, 600),
        small=on_stories(1, 64, 300),
        early_steps=120,
    )


def _beside_expert(*judged: AmateurKind) -> AmateurComparison:
    """Kinds of amateurs beside the expert alone, on arithmetic stories."""
    kinds = [("expert", AmateurKind.NONE), *((kind.value, kind) for kind in judged)]
    return AmateurComparison(runs=tuple((name, _problems(kind)) for name, kind in kinds))


def proof() -> AmateurComparison:
    """Five kinds of amateurs beside the expert alone, on arithmetic stories (8 min)."""
    models = AmateurKind.SMALL, AmateurKind.EARLY, AmateurKind.EQUAL
    return _beside_expert(*models, AmateurKind.PROMPT, AmateurKind.SHORTENED)


def proof_seeds() -> AmateurComparison:
    """`proof` over three seeds (24 min)."""
    return dataclasses.replace(proof(), seeds=(0, 1, 2))


def weak_amateurs() -> AmateurComparison:
    """3-grams, and the small model shown the shortcut, as amateurs over three seeds (8 min)."""
    kinds = AmateurKind.NGRAM, AmateurKind.SMALL_PROMPT
    return dataclasses.replace(_beside_expert(*kinds), seeds=(0, 1, 2))


def proof_text() -> ContrastiveText:
    """Repetition and ranking of continuations of Python source (5 min)."""
    return ContrastiveText(expert=on_text(3, 128, 400), amateur=on_text(1, 64, 200))


def gsm8k() -> ContrastiveQuestions:
    """The paper's setting for a pair of Llamas and GSM8K, also by vote (needs their files)."""
    return ContrastiveQuestions(
        expert="models/expert",
        amateur="models/amateur",
        questions="gsm8k/test.jsonl",
        shots="gsm8k/eight_shots.txt",
        votes=(5, 10, 20),
        tokenizer=TokenizerConfig(
            kind=TokenizerKind.SENTENCEPIECE, path="models/expert/tokenizer.model"
        ),
    )


RUNS = (smoke, text_smoke, tiny, proof, proof_seeds, weak_amateurs, proof_text, gsm8k)


def get_config(run: str = "tiny") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
