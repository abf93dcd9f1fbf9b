"""Megalodon (arXiv 2404.08801): attention in chunks, and a moving average that never forgets.

The paper claims a lower loss than a Llama of the same size at equal training tokens, and a loss
that keeps falling with the context far beyond the trained length, with a state of constant size.
At small scale the second is the clear effect: trained on rows of 512 bytes, Megalodon goes on to
8,192 without harm, where a rotary transformer breaks down.

    python -m blt_jax.run --config=experiments/megalodon.py:proof --workdir=runs/megalodon

trains both on the Python standard library's source text, and each on naming a letter seen up to
48 tokens before. The baseline has as many parameters within 2 %; both report FLOPs per token.
"""

import dataclasses

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig
from blt_jax.data.synthetic import LISTOPS_VOCABULARY, RECALL_VOCABULARY
from blt_jax.data.tokenizers import TokenizerConfig, TokenizerKind
from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.model import ModelConfig
from blt_jax.layers.transformer import Remat
from blt_jax.models import llama3, megalodon
from blt_jax.models.megalodon_classifier import ClassifierConfig
from blt_jax.models.megalodon_truncated import CHUNKS
from blt_jax.recipes.classification import ListOps
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.recipes.long_context import ChunkBoundaries, LongContext, Recall
from blt_jax.train.checkpoint import CheckpointingConfig
from blt_jax.train.comparison import Comparison
from blt_jax.train.configs import select_run
from blt_jax.train.optimizer import Decay, OptimizerConfig, Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment

EVERYTHING_DECAYS = OptimizerConfig(undecayed=())
"""The paper's: norms centre their weight at 1, so that decay pulls them there. It pulls the moduli
of the moving average to 0.75; `undecayed=("ema_(?!norm)",)` leaves its parameters out."""


def rows(num_bytes: int, sequence_length: int, batch_size: int) -> DataConfig:
    """Rows of the standard library's text, about num_bytes of it."""
    return DataConfig(
        sources=(SourceConfig(max_bytes=num_bytes),),
        shuffle_rows=num_bytes // sequence_length,  # files are long: mix all of them
        sequence_length=sequence_length,
        batch_size=batch_size,
    )


def byte_model(num_layers: int, d_model: int, chunk_size: int) -> megalodon.MegalodonConfig:
    """A byte-level Megalodon, unrolled: faster on CPU than a scan over layers."""
    return megalodon.byte_level(
        num_layers=num_layers, d_model=d_model, chunk_size=chunk_size, scan_layers=False
    )


def smoke() -> LongContext:
    """Trains, generates, and measures the loss by position in a few seconds (20 s)."""
    return LongContext(
        # The form of the moving average that compiles fastest.
        model=dataclasses.replace(byte_model(1, 32, 16), scan_form=megalodon.ScanForm.REFERENCE),
        data=rows(60_000, 64, 8),
        evaluation=EvaluationConfig(batches=2),
        optimizer=EVERYTHING_DECAYS,
        schedule=Schedule(learning_rate=3e-3),
        steps=8,
        prompts=("def ",),
        sample_tokens=16,
        long_length=128,
        truncate_chunks=4,
        long_rows=1,
        bucket=32,
    )


def tiny() -> LanguageModel:
    """A byte-level model on Python source, with generated text (8 min)."""
    return LanguageModel(
        model=byte_model(4, 128, 128),
        data=rows(4_000_000, 512, 8),
        evaluation=EvaluationConfig(batches=50),
        optimizer=EVERYTHING_DECAYS,
        schedule=Schedule(learning_rate=2e-3, warmup_steps=50),
        steps=600,
    )


def recall(model: ModelConfig) -> Recall:
    """The recall task, in rows of 64 with chunks of 16."""
    return Recall(
        model=model,
        data=DataConfig(sequence_length=64, batch_size=64),
        schedule=Schedule(learning_rate=3e-3, warmup_steps=30, decay=Decay.COSINE),
        steps=500,
    )


def _long(model: ModelConfig, recalls: Recall, learning_rate: float) -> LongContext:
    return LongContext(
        model=model,
        data=rows(4_000_000, 512, 8),
        evaluation=EvaluationConfig(batches=50),
        optimizer=EVERYTHING_DECAYS
        if isinstance(model, megalodon.MegalodonConfig)
        else OptimizerConfig(),
        schedule=Schedule(learning_rate=learning_rate, warmup_steps=40),
        steps=400,
        sample_tokens=0,
        recall=recalls,
    )


def proof_megalodon() -> megalodon.MegalodonConfig:
    """Three layers of width 128 in chunks of 64."""
    return byte_model(3, 128, 64)


def proof_llama() -> llama3.Llama3Config:
    """A Llama of as many parameters."""
    config = llama3.byte_level(num_layers=3, d_model=128, num_heads=4, mlp_dim=LLAMA_MLP)
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=stack)


LLAMA_MLP = 416
RECALL_SIZES = dict(vocab_size=RECALL_VOCABULARY, num_layers=2, d_model=64)


def recall_megalodon() -> megalodon.MegalodonConfig:
    """Chunks of 16, and moving averages that remember several."""
    return megalodon.small(
        **RECALL_SIZES,
        chunk_size=16,
        decay_init=megalodon.DecayInit.LOG_UNIFORM,
        scan_layers=False,
    )


def proof() -> Comparison:
    """Llama and Megalodon of equal size: loss far beyond the trained length, recall (14 min)."""
    full = llama3.small(**RECALL_SIZES, num_heads=4, mlp_dim=212)
    return Comparison(
        runs=(
            ("llama", _long(proof_llama(), recall(full), 3e-3)),
            ("megalodon", _long(proof_megalodon(), recall(recall_megalodon()), 2e-3)),
        ),
        metric="bits_per_byte_beyond",
        further=(
            "bits_per_byte",
            "bits_per_byte_within",
            *(f"bits_per_byte_to_{512 * 2**i}" for i in range(1, 5)),
            *(f"recall_accuracy_{gap}" for gap in (8, 24, 48)),
            "flops_per_token",
            "flops_per_token_long",
            "parameters",
        ),
    )


def proof_seeds() -> Comparison:
    """`proof` over three seeds (42 min)."""
    return dataclasses.replace(proof(), seeds=(0, 1, 2))


def truncation() -> LongContext:
    """The proof's Megalodon reads on with the statistics of its last 6 to 8 chunks (4 min)."""
    training = _long(proof_megalodon(), recall(recall_megalodon()), 2e-3)
    return dataclasses.replace(training, recall=None, truncate_chunks=CHUNKS)


def stream() -> LongContext:
    """The proof's Megalodon on documents of 16,384 bytes: whole rows at once, and chunk by chunk
    with nothing but its state, whose statistics no text of 1,000 chunks replaces (4 min)."""
    return dataclasses.replace(truncation(), long_length=16_384, truncate_chunks=1000)


ABLATIONS = {
    "full": {},
    "real_average": {"ema": megalodon.EmaKind.REAL},
    "no_average": {"ema": megalodon.EmaKind.NONE},
    "layer_norm": {"norm": megalodon.NormKind.LAYER},
    "pre_norm_residual": {"residual": megalodon.ResidualKind.PRE_NORM},
    "attention_alone": {
        "ema": megalodon.EmaKind.NONE,
        "norm": megalodon.NormKind.LAYER,
        "residual": megalodon.ResidualKind.PRE_NORM,
    },
}


def ablation() -> Comparison:
    """Megalodon without each of its parts: loss where chunks of the attention begin (12 min)."""

    def run(changes):
        return ChunkBoundaries(
            model=dataclasses.replace(byte_model(2, 128, 64), state_size=8, **changes),
            data=rows(4_000_000, 512, 8),
            evaluation=EvaluationConfig(batches=50),
            optimizer=EVERYTHING_DECAYS,
            schedule=Schedule(learning_rate=2e-3, warmup_steps=40),
            steps=400,
            sample_tokens=0,
        )

    return Comparison(
        runs=tuple((name, run(changes)) for name, changes in ABLATIONS.items()),
        metric="bits_per_byte",
        further=("boundary_jump", "bits_per_byte_at_start", "bits_per_byte_in_rest", "parameters"),
    )


def ablation_seeds() -> Comparison:
    """`ablation` over three seeds (36 min)."""
    return dataclasses.replace(ablation(), seeds=(0, 1, 2))


def recall_ablation() -> Comparison:
    """Megalodon without each of its parts: what it knows of tokens beyond its chunk (5 min)."""

    def run(changes):
        return recall(dataclasses.replace(recall_megalodon(), **changes))

    return Comparison(
        runs=tuple((name, run(changes)) for name, changes in ABLATIONS.items()),
        metric="recall_accuracy_24",
        further=("recall_accuracy_8", "recall_accuracy_48"),
    )


def recall_ablation_seeds() -> Comparison:
    """`recall_ablation` over three seeds (16 min)."""
    return dataclasses.replace(recall_ablation(), seeds=(0, 1, 2))


DECAYS = {
    f"{decay.value}_{norm.value}": dict(decay_init=decay, norm=norm)
    for norm in (megalodon.NormKind.TIMESTEP, megalodon.NormKind.LAYER)
    for decay in (megalodon.DecayInit.PAPER, megalodon.DecayInit.LOG_UNIFORM)
}


def recall_far() -> Comparison:
    """Recall over many chunks, by how the averages begin: as published or spread out (8 min)."""

    def run(changes):
        far = DataConfig(sequence_length=256, batch_size=32)
        model = dataclasses.replace(recall_megalodon(), **changes)
        return dataclasses.replace(recall(model), data=far, gaps=(24, 96, 224))

    return Comparison(
        runs=tuple((name, run(changes)) for name, changes in DECAYS.items()),
        metric="recall_accuracy_224",
        further=("recall_accuracy_24", "recall_accuracy_96"),
    )


def listops_classifier() -> ClassifierConfig:
    """Four layers of width 96 that look both ways, chunks of 64."""
    blocks = megalodon.small(
        vocab_size=LISTOPS_VOCABULARY,
        num_layers=4,
        d_model=96,
        chunk_size=64,
        bidirectional=True,
        scan_layers=False,
    )
    return ClassifierConfig(blocks=blocks, num_classes=10)


def listops() -> ListOps:
    """Values of nested expressions of up to 128 ids, by the classifier (10 min)."""
    return ListOps(
        model=listops_classifier(),
        data=DataConfig(sequence_length=128, batch_size=32),
        optimizer=EVERYTHING_DECAYS,
        schedule=Schedule(learning_rate=2e-3, warmup_steps=50, decay=Decay.COSINE),
        steps=1500,
        values=5,
        depth=4,
    )


def listops_smoke() -> ListOps:
    """A few steps on short expressions, to see that everything works."""
    blocks = dataclasses.replace(listops_classifier().blocks, num_layers=1, chunk_size=16)
    return dataclasses.replace(
        listops(),
        model=dataclasses.replace(listops_classifier(), blocks=blocks),
        data=DataConfig(sequence_length=32, batch_size=4),
        evaluation=EvaluationConfig(batches=2),
        steps=4,
    )


def _paper(model: megalodon.MegalodonConfig, learning_rate: float) -> LanguageModel:
    """Section 4.1: 2T tokens in batches of 4M, rows of 32K, cosine to a tenth."""
    batch_tokens, length = 4 * 2**20, 32 * 1024
    return LanguageModel(
        model=dataclasses.replace(model, remat=Remat.SAVE_NAMES),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path="tokenizer.model"),
            sequence_length=length,
            batch_size=batch_tokens // length,
        ),
        optimizer=EVERYTHING_DECAYS,
        schedule=Schedule(learning_rate=learning_rate, warmup_steps=2500),
        steps=2_000_000_000_000 // batch_tokens,
        checkpointing=CheckpointingConfig(every=500),
        prompts=(),
    )


def mega_200m() -> LanguageModel:
    """The released 200M model, trained as the paper trains its 7B (needs a small pod)."""
    return _paper(megalodon.mega_200m(), 1e-3)


def mega_1_3b() -> LanguageModel:
    """The released 1.3B model, trained as the paper trains its 7B (needs a pod)."""
    return _paper(megalodon.mega_1_3b(), 1e-3)


def megalodon_7b() -> LanguageModel:
    """The paper's 7B model, chunks of 4096 (needs a pod)."""
    return _paper(megalodon.megalodon_7b(), 3.5e-4)


def megalodon_7b_v5p_64() -> LanguageModel:
    """The 7B model on v5p:4x4x4."""
    run = megalodon_7b()
    mesh = MeshConfig(data=2, fsdp=32)
    model = dataclasses.replace(run.model, logits_chunk=4096)
    return dataclasses.replace(run, model=model, mesh=mesh, accumulation=2)


LISTOPS = (listops, listops_smoke)
PAPER = (mega_200m, mega_1_3b, megalodon_7b, megalodon_7b_v5p_64)
ABLATION = (ablation, ablation_seeds, recall_ablation, recall_ablation_seeds, recall_far)
RUNS = (smoke, tiny, proof, proof_seeds, truncation, stream, *ABLATION, *LISTOPS, *PAPER)


def get_config(run: str = "tiny") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
