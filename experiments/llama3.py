"""Llama 3 (arXiv 2407.21783): the plain dense transformer that the suite builds on.

The paper's recipe ends with annealing: the learning rate goes linearly to 0, and checkpoints of
that phase are averaged. At small scale annealing lowers the held-out loss at equal steps, and
averaging the constant-rate tail gives part of that gain without any decay.

    python -m blt_jax.run --config=experiments/llama3.py:tiny --workdir=runs/llama3

trains a byte-level model on the Python standard library's source text and generates some of it.
The paper's sizes read files: --config.data.sources[0].kind=files and
--config.data.sources[0].paths="('corpus/*.parquet',)" with Llama 3's tokenizer file as
--config.data.tokenizer.path.
"""

import dataclasses

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig
from blt_jax.data.tokenizers import TokenizerConfig, TokenizerKind
from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.transformer import Remat
from blt_jax.models import llama3
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.train.checkpoint import CheckpointingConfig
from blt_jax.train.comparison import Comparison
from blt_jax.train.configs import select_run
from blt_jax.train.optimizer import Decay, Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment, Phase, annealing_phase
from blt_jax.train.state import Averaging, AveragingConfig


def byte_model(num_layers: int, d_model: int) -> llama3.Llama3Config:
    """A byte-level model, unrolled: faster on CPU than a scan over layers."""
    config = llama3.byte_level(num_layers=num_layers, d_model=d_model, num_heads=4, num_kv_heads=2)
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=stack)


def rows(num_bytes: int, sequence_length: int, batch_size: int) -> DataConfig:
    """Rows of the standard library's text, about num_bytes of it."""
    return DataConfig(
        sources=(SourceConfig(max_bytes=num_bytes),),
        shuffle_rows=num_bytes // sequence_length,  # files are long: mix all of them
        sequence_length=sequence_length,
        batch_size=batch_size,
    )


def smoke() -> LanguageModel:
    """Trains, anneals, averages and generates in a few seconds (20 s)."""
    return LanguageModel(
        model=byte_model(1, 32),
        data=rows(60_000, 64, 8),
        evaluation=EvaluationConfig(batches=2),
        schedule=Schedule(learning_rate=3e-3, decay=Decay.CONSTANT),
        phases=(Phase(steps=6), annealing_phase(4)),
        averaging=AveragingConfig(kind=Averaging.UNIFORM),
        prompts=("def ",),
        sample_tokens=16,
    )


def tiny() -> LanguageModel:
    """A byte-level model on Python source, annealed, with generated text (6 min)."""
    return LanguageModel(
        model=byte_model(4, 128),
        data=rows(4_000_000, 512, 8),
        evaluation=EvaluationConfig(batches=50),
        schedule=Schedule(learning_rate=2e-3, warmup_steps=50, decay=Decay.CONSTANT),
        phases=(Phase(steps=600), annealing_phase(150)),
        averaging=AveragingConfig(kind=Averaging.UNIFORM, every=10),
    )


def _last_fifth(anneal: bool) -> LanguageModel:
    last = annealing_phase(200) if anneal else Phase(steps=200, name="constant")
    return LanguageModel(
        model=byte_model(2, 96),
        data=rows(4_000_000, 256, 16),
        evaluation=EvaluationConfig(batches=50),
        schedule=Schedule(learning_rate=3e-3, warmup_steps=50, decay=Decay.CONSTANT),
        phases=(Phase(steps=800), last),
        averaging=AveragingConfig(kind=Averaging.UNIFORM, every=5),
        sample_tokens=0,
    )


def proof() -> Comparison:
    """Last fifth of the steps at a constant rate, or annealed; both averaged too (8 min)."""
    return Comparison(runs=(("constant", _last_fifth(False)), ("annealed", _last_fifth(True))))


def proof_seeds() -> Comparison:
    """`proof` over three seeds (24 min)."""
    return dataclasses.replace(proof(), seeds=(0, 1, 2))


def _paper(model: llama3.Llama3Config, learning_rate: float) -> LanguageModel:
    """The 405B schedule: growing batches, context from 8K to 128K in six stages, annealing."""
    stack = dataclasses.replace(model.transformer, remat=Remat.SAVE_NAMES)
    model = dataclasses.replace(model, transformer=stack)
    data = DataConfig(
        tokenizer=TokenizerConfig(kind=TokenizerKind.TIKTOKEN_LLAMA3, path="tokenizer.model")
    )

    def phase(tokens: float, batch_tokens: int, length: int, **changes) -> Phase:
        resized = dataclasses.replace(
            data, sequence_length=length, batch_size=batch_tokens // length
        )
        return Phase(steps=max(1, round(tokens / batch_tokens)), data=resized, **changes)

    ends = [stage.after_tokens for stage in llama3.BATCH_SCHEDULE[1:]] + [14_800_000_000_000]
    phases = [
        phase(end - stage.after_tokens, stage.batch_tokens, stage.sequence_length)
        for stage, end in zip(llama3.BATCH_SCHEDULE, ends, strict=True)
    ]
    rate = Schedule(learning_rate=learning_rate / 100, decay=Decay.CONSTANT)
    for stage in llama3.context_extension():
        phases.append(phase(stage.tokens, 16 * 2**20, stage.length, schedule=rate, name="context"))
    longest = phases[-1].data
    phases.append(annealing_phase(3, data=longest))
    return LanguageModel(
        model=model,
        data=data,
        schedule=Schedule(learning_rate=learning_rate, warmup_steps=8000, final_ratio=0.01),
        phases=tuple(phases),
        averaging=AveragingConfig(kind=Averaging.UNIFORM),
        checkpointing=CheckpointingConfig(every=500),
        prompts=(),
    )


def llama3_8b() -> LanguageModel:
    """The 8B model and its schedule (needs a pod)."""
    return _paper(llama3.llama3_8b(), 3e-4)


def llama3_70b() -> LanguageModel:
    """The 70B model and its schedule (needs a pod)."""
    return _paper(llama3.llama3_70b(), 1.5e-4)


def llama3_405b() -> LanguageModel:
    """The 405B model and its schedule (needs pods)."""
    return _paper(llama3.llama3_405b(), 8e-5)


def _on_pod(
    run: LanguageModel, mesh: MeshConfig, rows: int, remat: Remat, logits_chunk: int
) -> LanguageModel:
    """The 8K stages of a run on a pod, `rows` at once; longer rows need a mesh with a context axis.

    What each layout takes is in docs/results/pods.md.
    """
    transformer = dataclasses.replace(run.model.transformer, remat=remat)
    phases = run.phases[: len(llama3.BATCH_SCHEDULE)]
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, transformer=transformer, logits_chunk=logits_chunk),
        mesh=mesh,
        phases=tuple(
            dataclasses.replace(phase, accumulation=phase.data.batch_size // rows)
            for phase in phases
        ),
        averaging=AveragingConfig(),
    )


def llama3_8b_v5e_256() -> LanguageModel:
    """The 8B model on v5e:16x16."""
    mesh = MeshConfig(data=8, fsdp=32)
    return _on_pod(llama3_8b(), mesh, 256, Remat.FULL, logits_chunk=2048)


def llama3_8b_v5p_64() -> LanguageModel:
    """The 8B model on v5p:4x4x4."""
    mesh = MeshConfig(data=2, fsdp=32)
    return _on_pod(llama3_8b(), mesh, 256, Remat.SAVE_NAMES, logits_chunk=4096)


def llama3_8b_v6e_256() -> LanguageModel:
    """The 8B model on v6e:16x16."""
    mesh = MeshConfig(data=8, fsdp=32)
    return _on_pod(llama3_8b(), mesh, 256, Remat.SAVE_NAMES, logits_chunk=4096)


def llama3_70b_v5p_64() -> LanguageModel:
    """The 70B model on v5p:4x4x4."""
    mesh = MeshConfig(data=2, fsdp=32)
    return _on_pod(llama3_70b(), mesh, 64, Remat.FULL, logits_chunk=4096)


def llama3_70b_v6e_256() -> LanguageModel:
    """The 70B model on v6e:16x16."""
    mesh = MeshConfig(data=1, fsdp=64, tensor=4)
    return _on_pod(llama3_70b(), mesh, 64, Remat.FULL, logits_chunk=4096)


def llama3_405b_v5p_1024() -> LanguageModel:
    """The 405B model on v5p:8x8x16."""
    mesh = MeshConfig(data=1, fsdp=128, tensor=8)
    return _on_pod(llama3_405b(), mesh, 128, Remat.FULL, logits_chunk=8192)


def llama3_405b_v6e_256() -> LanguageModel:
    """The 405B model on v6e:16x16, which does not fit."""
    mesh = MeshConfig(data=1, fsdp=32, tensor=8)
    return _on_pod(llama3_405b(), mesh, 32, Remat.FULL, logits_chunk=2048)


PODS = (
    *(llama3_8b_v5e_256, llama3_8b_v5p_64, llama3_8b_v6e_256, llama3_70b_v5p_64),
    *(llama3_70b_v6e_256, llama3_405b_v5p_1024, llama3_405b_v6e_256),
)
RUNS = (smoke, tiny, proof, proof_seeds, llama3_8b, llama3_70b, llama3_405b, *PODS)


def get_config(run: str = "tiny") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
