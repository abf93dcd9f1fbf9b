"""Byte Latent Transformer (arXiv 2412.09871): patches of bytes in place of tokens.

The paper claims that patches cut where the next byte is hard to predict match BPE tokens at equal
training FLOPs, and that hash n-gram embeddings of the bytes help.

    python -m blt_jax.run --config=experiments/blt.py:tiny --workdir=runs/blt

trains an entropy model, finds the threshold for 4.5 bytes per patch, trains a BLT on the Python
standard library's own source text and generates some of it.
"""

import dataclasses

from blt_jax.data.loader import DataConfig, evaluation_config
from blt_jax.data.sources import SourceConfig
from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.transformer import Remat, TransformerConfig
from blt_jax.models import blt, llama3
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.recipes.blt_pretraining import BLTPretraining
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.train.checkpoint import CheckpointingConfig
from blt_jax.train.comparison import Comparison
from blt_jax.train.configs import select_run
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.optimizer import Decay, Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment, Pretraining


def stack(
    layers: int, width: int, heads: int, window: int = 0, mlp_dim: int = 0
) -> TransformerConfig:
    """A small transformer, unrolled: faster on CPU than a scan over layers."""
    return TransformerConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        mlp_dim=mlp_dim,
        window=window,
        scan_layers=False,
    )


def rows(num_bytes: int, sequence_length: int, batch_size: int, max_patches: int = 0) -> DataConfig:
    """Rows of the standard library's text, about num_bytes of it."""
    return DataConfig(
        sources=(SourceConfig(max_bytes=num_bytes),),
        shuffle_rows=num_bytes // sequence_length,  # files are long: mix all of them
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_patches=max_patches,
    )


def held_out(data: DataConfig) -> EvaluationConfig:
    """About 200 kB of the validation split, in the same rows."""
    return EvaluationConfig(
        data=evaluation_config(data, sources=(SourceConfig(max_bytes=200_000),))
    )


def unrolled(config: llama3.Llama3Config) -> llama3.Llama3Config:
    """The same model without the scan over layers."""
    transformer = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=transformer)


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
    """All three steps, too small to learn much (27 s, 13 s once its programs are compiled)."""
    data = rows(60_000, 128, 8)
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


TINY_BYTES, TINY_LENGTH, TINY_ROWS, TINY_STEPS = 4_000_000, 1024, 8, 400
TINY_SCHEDULE = Schedule(learning_rate=2e-3, warmup_steps=50)


def _tiny_blt() -> blt.BLTConfig:
    return blt.BLTConfig(
        local_encoder=stack(1, 96, 4, window=256),
        latent=stack(4, 192, 4),
        local_decoder=stack(3, 96, 4, window=256),
        ngrams=blt.NgramConfig(vocab_size=8009),
        max_patches=256,
    )


def tiny() -> BLTPretraining:
    """Entropy model, threshold for 4.5 bytes per patch, BLT on Python source (10 min)."""
    data = rows(TINY_BYTES, TINY_LENGTH, TINY_ROWS, max_patches=256)
    short = rows(TINY_BYTES, 512, TINY_ROWS)
    return BLTPretraining(
        entropy_model=entropy_model(2, 96, 400, short),
        patcher=PatcherConfig(target_patch_size=4.5),
        blt=Pretraining(
            model=_tiny_blt(),
            data=data,
            evaluation=held_out(data),
            schedule=TINY_SCHEDULE,
            steps=TINY_STEPS,
        ),
    )


BPE_VOCABULARY, BPE_BYTES_PER_TOKEN = 4096, 3.62
"""Bytes per token: measured on the held-out text with a vocabulary trained on TINY_BYTES."""


def byte_llama() -> llama3.Llama3Config:
    """As many FLOPs per byte as the BLT of `tiny`."""
    return unrolled(llama3.byte_level(num_layers=3, d_model=128, num_heads=4))


def bpe_llama() -> llama3.Llama3Config:
    """As many FLOPs per byte as the BLT of `tiny`, at BPE_BYTES_PER_TOKEN."""
    config = llama3.small(vocab_size=BPE_VOCABULARY, num_layers=4, d_model=240, num_heads=4)
    return unrolled(config)


def _language_model(model: llama3.Llama3Config, data: DataConfig, bpe: int = 0) -> LanguageModel:
    return LanguageModel(
        model=model,
        data=data,
        evaluation=held_out(data),
        schedule=TINY_SCHEDULE,
        steps=TINY_STEPS,
        bpe_vocab_size=bpe,
    )


def baseline() -> Comparison:
    """The BLT of `tiny` beside a byte and a BPE Llama of equal FLOPs and bytes (30 min)."""
    tokens = round(TINY_LENGTH / BPE_BYTES_PER_TOKEN)
    byte_rows, bpe_rows = (rows(TINY_BYTES, n, TINY_ROWS) for n in (TINY_LENGTH, tokens))
    return Comparison(
        runs=(
            ("blt", tiny()),
            ("byte_llama", _language_model(byte_llama(), byte_rows)),
            ("bpe_llama", _language_model(bpe_llama(), bpe_rows, BPE_VOCABULARY)),
        )
    )


def _proof(patcher: PatcherConfig, ngrams: bool = True, match_space: bool = False):
    """One side of the proof: every run sees the same bytes in the same order."""
    num_bytes, length, patches = 6_000_000, 256, 96
    local = {"heads": 2, "window": 64, "mlp_dim": 128}
    kind = blt.NgramKind.HASH if ngrams else blt.NgramKind.NONE
    model = blt.BLTConfig(
        local_encoder=stack(1, 64, **local),
        latent=stack(3, 128, heads=2, mlp_dim=256),
        local_decoder=stack(2, 64, **local),
        ngrams=blt.NgramConfig(kind=kind, sizes=(3, 4, 5), vocab_size=4001),
        max_patches=patches,
    )
    data = rows(num_bytes, length, 8, patches)
    return BLTPretraining(
        entropy_model=entropy_model(2, 96, 600, rows(num_bytes, length, 8)),
        patcher=patcher,
        match_space=match_space,
        blt=Pretraining(
            model=model,
            data=data,
            evaluation=held_out(data),
            schedule=Schedule(learning_rate=3e-3, warmup_steps=100, final_ratio=0.05),
            steps=1500,
            logging=LoggingConfig(every=50),
        ),
        prompts=(),
    )


def proof() -> Comparison:
    """Entropy against strided and space patches of equal size; n-grams or none (15 min)."""
    strided = PatcherConfig(kind=PatcherKind.STRIDED, stride=4)
    entropy = PatcherConfig(target_patch_size=4.0)
    return Comparison(
        runs=(
            ("strided_4", _proof(strided)),
            ("entropy_4", _proof(entropy)),
            ("entropy_4_no_ngrams", _proof(entropy, ngrams=False)),
            ("space", _proof(PatcherConfig(kind=PatcherKind.SPACE))),
            ("entropy_as_space", _proof(entropy, match_space=True)),
        )
    )


def proof_seeds() -> Comparison:
    """`proof` over three seeds (45 min)."""
    return dataclasses.replace(proof(), seeds=(0, 1, 2))


def _paper(model: blt.BLTConfig, context_bytes: int, rows_per_batch: int) -> BLTPretraining:
    """The paper's optimizer and schedule on rows of context_bytes bytes on average."""
    patches = round(context_bytes / model.mean_patch_bytes)
    remat = {"remat": Remat.SAVE_NAMES}
    model = dataclasses.replace(
        model,
        max_patches=patches,
        latent=dataclasses.replace(model.latent, **remat),
        local_decoder=dataclasses.replace(model.local_decoder, **remat),
    )
    data = DataConfig(
        sequence_length=context_bytes * 3 // 2, batch_size=rows_per_batch, max_patches=patches
    )
    training = {
        "schedule": Schedule(learning_rate=4e-4, warmup_steps=2000, final_ratio=0.0),
        "steps": 100_000,
        "checkpointing": CheckpointingConfig(every=500),
    }
    entropies = blt.entropy_model_paper_100m()
    return BLTPretraining(
        entropy_model=Pretraining(
            model=dataclasses.replace(
                entropies, transformer=dataclasses.replace(entropies.transformer, **remat)
            ),
            data=dataclasses.replace(data, sequence_length=8192, max_patches=0),
            **training,
        ),
        patcher=PatcherConfig(target_patch_size=model.mean_patch_bytes),
        blt=Pretraining(model=model, data=data, **training),
        prompts=(),
    )


def blt_400m() -> BLTPretraining:
    """470M latent parameters, 8k-byte rows (needs a TPU slice or GPUs)."""
    return _paper(blt.paper_400m(), 8192, 2048)


def blt_1b() -> BLTPretraining:
    """1B latent parameters, 8k-byte rows (needs a TPU slice or GPUs)."""
    return _paper(blt.paper_1b(), 8192, 2048)


def blt_2b() -> BLTPretraining:
    """2B latent parameters, 8k-byte rows (needs a TPU slice or GPUs)."""
    return _paper(blt.paper_2b(), 8192, 2048)


def blt_4b() -> BLTPretraining:
    """4.1B latent parameters, 8k-byte rows (needs a TPU slice or GPUs)."""
    return _paper(blt.paper_4b(), 8192, 2048)


def blt_8b() -> BLTPretraining:
    """6.4B latent parameters, 16k-byte rows, as the long run of the paper (needs a TPU pod)."""
    return _paper(blt.paper_8b(), 16384, 1024)


def _on_pod(
    run: BLTPretraining, mesh: MeshConfig, rows: int, remat: Remat = Remat.SAVE_NAMES
) -> BLTPretraining:
    """A paper-size run on a pod, `rows` at once; what it takes is in docs/results/pods.md."""
    model = run.blt.model
    model = dataclasses.replace(
        model,
        latent=dataclasses.replace(model.latent, remat=remat),
        local_decoder=dataclasses.replace(model.local_decoder, remat=remat),
    )
    accumulation = run.blt.data.batch_size // rows  # the entropy model has as many rows
    return dataclasses.replace(
        run,
        mesh=mesh,
        blt=dataclasses.replace(run.blt, model=model, accumulation=accumulation),
        entropy_model=dataclasses.replace(run.entropy_model, accumulation=accumulation),
    )


def blt_1b_v5e_256() -> BLTPretraining:
    """The 1B model on v5e:16x16."""
    return _on_pod(blt_1b(), MeshConfig(data=8, fsdp=32), 512)


def blt_1b_v5p_64() -> BLTPretraining:
    """The 1B model on v5p:4x4x4."""
    return _on_pod(blt_1b(), MeshConfig(data=8, fsdp=8), 512)


def blt_8b_v5e_256() -> BLTPretraining:
    """The 8B model on v5e:16x16."""
    return _on_pod(blt_8b(), MeshConfig(data=4, fsdp=64), 256, Remat.FULL)


def blt_8b_v5p_64() -> BLTPretraining:
    """The 8B model on v5p:4x4x4."""
    return _on_pod(blt_8b(), MeshConfig(data=2, fsdp=32), 128)


def blt_8b_v6e_256() -> BLTPretraining:
    """The 8B model on v6e:16x16."""
    return _on_pod(blt_8b(), MeshConfig(data=8, fsdp=32), 256)


PODS = (blt_1b_v5e_256, blt_1b_v5p_64, blt_8b_v5e_256, blt_8b_v5p_64, blt_8b_v6e_256)
RUNS = (
    *(smoke, tiny, proof, proof_seeds, baseline),
    *(blt_400m, blt_1b, blt_2b, blt_4b, blt_8b),
    *PODS,
)


def get_config(run: str = "tiny") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
