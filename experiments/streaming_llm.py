"""StreamingLLM (arXiv 2309.17453): a few first tokens keep a sliding window alive.

The paper claims that a model trained on short rows reads streams without end at the quality of
re-computation when the keys and values of four first tokens stay in its cache beside a window of
recent ones, with positions counted inside the cache: a window alone and dense attention break
down. Sinks form in large models; at small scale they form in the bigram-backcopy task, whose head
has nothing to look for at most tokens:

    python -m blt_jax.run --config=experiments/streaming_llm.py:proof --workdir=runs/streaming

trains a model of one layer on it and reads streams eight times as long with every policy: expect a
window to lose 0.03 to 0.2 nats per token to sinks, by seed. `tiny` draws the paper's figure for a
model of text, over 100,000 bytes; that model grows no sinks.
"""

import dataclasses

from blt_jax.data.loader import DataConfig
from blt_jax.data.sources import SourceConfig, SourceKind, Split
from blt_jax.data.tokenizers import TokenizerConfig, TokenizerKind
from blt_jax.decoding.streaming_llm import Positions, dense, recompute, sinks, window
from blt_jax.layers.transformer import Softmax
from blt_jax.models import llama3
from blt_jax.recipes.streaming import (
    Backcopy,
    Modes,
    PretrainedStream,
    StreamEval,
    StreamingPerplexity,
)
from blt_jax.recipes.streaming_questions import ChoiceStream, LineStream
from blt_jax.train.comparison import Comparison
from blt_jax.train.configs import select_run
from blt_jax.train.optimizer import Schedule
from blt_jax.train.pretraining import EvaluationConfig, Experiment


def unrolled(config: llama3.Llama3Config) -> llama3.Llama3Config:
    """Layers written out: faster on CPU than a scan over them."""
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    return dataclasses.replace(config, transformer=stack)


def modes(cache: int, stride: int) -> Modes:
    """The policies of the paper's Fig. 3 with the same number of keys, and the sinks without
    positions inside the cache."""
    return (
        ("dense", dense()),
        ("window", window(cache)),
        ("recompute", recompute(cache, stride)),
        ("sinks", sinks(4, cache - 4)),
        ("sinks_original", sinks(4, cache - 4, positions=Positions.ORIGINAL)),
    )


def backcopy(
    *,
    bos: bool = True,
    softmax: Softmax = Softmax.STANDARD,
    sink_tokens: int = 0,
    mlp_dim: int = 64,
    steps: int = 1500,
    training_rows: int = 0,
) -> Backcopy:
    """The task of the proof: rows of 64, a cache of 48, one layer with one head.

    1,500 steps: after 3,000 a window loses little, see docs/results/streaming_llm.md.
    """
    model = unrolled(
        llama3.small(vocab_size=65, num_layers=1, d_model=64, num_heads=1, mlp_dim=mlp_dim)
    )
    stack = dataclasses.replace(model.transformer, softmax=softmax)
    fewer = tuple((f"sinks_{n}", sinks(n, 48 - n)) for n in (1, 2))
    return Backcopy(
        model=dataclasses.replace(model, transformer=stack, sink_tokens=sink_tokens),
        data=DataConfig(sequence_length=64, batch_size=64),
        evaluation=EvaluationConfig(batches=8),
        schedule=Schedule(learning_rate=3e-3, warmup_steps=50),
        steps=steps,
        bos=bos,
        training_rows=training_rows,
        modes=modes(48, 1) + fewer,
    )


def smoke() -> Backcopy:
    """Trains on the task, and reads streams with four policies (20 s)."""
    data = DataConfig(sources=(SourceConfig(max_bytes=200_000),), sequence_length=16, batch_size=8)
    return dataclasses.replace(
        backcopy(),
        model=unrolled(llama3.small(vocab_size=33, num_layers=1, d_model=16, num_heads=1)),
        data=data,
        evaluation=EvaluationConfig(batches=1),
        schedule=Schedule(learning_rate=3e-3),
        steps=8,
        num_symbols=32,
        modes=modes(8, 4)[:4],
        num_streams=2,
        stream_length=48,
    )


def tiny() -> StreamingPerplexity:
    """A byte-level model of Python source reads 100,000 bytes with every policy (6 min)."""
    num_bytes, length = 4_000_000, 128
    return StreamingPerplexity(
        model=unrolled(llama3.byte_level(num_layers=3, d_model=96, num_heads=4)),
        data=DataConfig(
            sources=(SourceConfig(max_bytes=num_bytes),),
            shuffle_rows=num_bytes // length,  # files are long: mix all of them
            sequence_length=length,
            batch_size=16,
        ),
        evaluation=EvaluationConfig(batches=50),
        schedule=Schedule(learning_rate=3e-3, warmup_steps=50),
        steps=1200,
        sample_tokens=0,
        modes=modes(64, 16),
    )


def stream_eval() -> StreamEval:
    """Exact matches of values asked for some lines later, by distance (5 min)."""
    model = unrolled(llama3.small(vocab_size=66, num_layers=2, d_model=64, num_heads=2))
    # Slow rotations and heads as wide as the model find a key again at any distance.
    rope = dataclasses.replace(model.transformer.rope, theta=500_000.0)
    stack = dataclasses.replace(model.transformer, head_dim=64, rope=rope)
    return StreamEval(
        model=dataclasses.replace(model, transformer=stack),
        data=DataConfig(sequence_length=128, batch_size=32),
        evaluation=EvaluationConfig(batches=8),
        schedule=Schedule(learning_rate=6e-3, warmup_steps=100),
        steps=1500,
        modes=modes(64, 1)[:4],
    )


def proof() -> Comparison:
    """What a window loses by evicting the first tokens, for six trainings (7 min)."""
    return Comparison(
        runs=(
            ("bos", backcopy()),
            ("no_bos", backcopy(bos=False)),
            ("zero_sink", backcopy(bos=False, softmax=Softmax.OFF_BY_ONE)),
            ("learned_sink", backcopy(bos=False, softmax=Softmax.LEARNED_SINK)),
            ("sink_token", backcopy(bos=False, sink_tokens=1)),
            ("bos_wide_mlp", backcopy(mlp_dim=256)),
        ),
        metric="eviction_cost",
        further=("nats_before_eviction", *(f"nats_{name}" for name, _ in backcopy().modes)),
    )


def proof_seeds() -> Comparison:
    """`proof` over three seeds (21 min)."""
    return dataclasses.replace(proof(), seeds=(0, 1, 2))


def fixed_rows() -> Comparison:
    """What a window loses after 3,000 steps on new rows or on the same 4,096 (9 min)."""
    trainings = [
        (f"{name}_mlp_{width}", backcopy(mlp_dim=width, steps=3000, training_rows=rows))
        for name, rows in (("new", 0), ("fixed", 4096))
        for width in (64, 256)
    ]
    return dataclasses.replace(proof(), runs=tuple(trainings))


def _paper_160m(softmax: Softmax, sink_tokens: int) -> StreamingPerplexity:
    """Section 4.2: the Pythia-160M recipe with 1,024 keys and 0 to 4 sinks, on 400K tokens."""
    config = llama3.small(vocab_size=50_304, num_layers=12, d_model=768, num_heads=12, mlp_dim=2048)
    stack = dataclasses.replace(config.transformer, softmax=softmax)
    few = tuple((f"sinks_{n}", sinks(n, 1024 - n)) for n in (1, 2, 4))
    return StreamingPerplexity(
        model=dataclasses.replace(config, transformer=stack, sink_tokens=sink_tokens),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.HUGGING_FACE, path="tokenizer.json"),
            sequence_length=2048,
            batch_size=256,
        ),
        schedule=Schedule(learning_rate=6e-4, warmup_steps=1430),
        steps=143_000,
        prompts=(),
        modes=(("window", window(1024)), *few),
        stream_tokens=400_001,
    )


def paper_160m() -> StreamingPerplexity:
    """The paper's vanilla 160M model (needs a pod)."""
    return _paper_160m(Softmax.STANDARD, 0)


def paper_160m_zero_sink() -> StreamingPerplexity:
    """The same with the zero sink (needs a pod)."""
    return _paper_160m(Softmax.OFF_BY_ONE, 0)


def paper_160m_sink_token() -> StreamingPerplexity:
    """The same with one sink token (needs a pod)."""
    return _paper_160m(Softmax.STANDARD, 1)


def _sentencepiece(folder: str) -> TokenizerConfig:
    return TokenizerConfig(kind=TokenizerKind.SENTENCEPIECE, path=f"{folder}/tokenizer.model")


def paper_llama2_7b() -> PretrainedStream:
    """Llama-2-7B with 4,096 keys and 0 to 8 sinks, and with fewer keys (needs the model)."""
    counts = tuple((f"sinks_{n}", sinks(n, 4096 - n)) for n in (1, 2, 4, 8))
    sizes = tuple((f"4_{size - 4}", sinks(4, size - 4)) for size in (512, 1024, 2048))
    return PretrainedStream(
        model_path="Llama-2-7b-hf",
        data=DataConfig(
            sources=(SourceConfig(kind=SourceKind.FILES, paths=("pg19/*.txt",)),),
            tokenizer=_sentencepiece("Llama-2-7b-hf"),
            split=Split.ALL,
            shuffle=False,
            repeat=False,
        ),
        modes=(("window", window(4096)), *counts, *sizes),
        stream_tokens=400_001,
    )


def paper_stream_eval() -> LineStream:
    """StreamEval by Llama-2-7B-32K-Instruct, 2,048 keys, 20 to 100 lines back (needs the model)."""
    folder = "Llama-2-7B-32K-Instruct"
    return LineStream(
        model_path=folder,
        tokenizer=_sentencepiece(folder),
        modes=(("window", window(2048)), ("sinks", sinks(4, 2044))),
    )


def paper_arc() -> ChoiceStream:
    """ARC-Challenge in one stream by Llama-2-7B-chat with 1,024 keys (needs model and questions).

    The paper: 53.16 % one by one, 1.39 with a window, 55.03 with sinks.
    """
    folder = "Llama-2-7b-chat-hf"
    return ChoiceStream(
        model_path=folder,
        tokenizer=_sentencepiece(folder),
        modes=(("window", window(1024)), ("sinks", sinks(4, 1020))),
        questions="ARC-Challenge-Test.jsonl",
    )


RELEASED = (paper_llama2_7b, paper_stream_eval, paper_arc)
PAPER = (paper_160m, paper_160m_zero_sink, paper_160m_sink_token, *RELEASED)
RUNS = (smoke, tiny, stream_eval, proof, proof_seeds, fixed_rows, *PAPER)


def get_config(run: str = "tiny") -> Experiment:
    """The config of a run, by its name."""
    return select_run(RUNS, run)
