"""Streams far longer than the rows of the training, read with each cache policy.

`StreamingPerplexity` trains on text; `Backcopy` on a task in which attention sinks form within
minutes; `StreamEval` asks for values named some lines before (arXiv 2309.17453, section 4).
StreamEval's lines as text, and ARC as a stream, are in `streaming_questions`.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from blt_jax.data.loader import DataConfig, evaluation_config, open_documents
from blt_jax.data.sources import Split
from blt_jax.data.synthetic import (
    EVENT,
    VALUE,
    Bigrams,
    GeneratedBatches,
    backcopy_rows,
    byte_bigrams,
    key_value_rows,
)
from blt_jax.data.tokenizers import encode_document
from blt_jax.decoding.streaming_llm import Policy, StreamingConfig
from blt_jax.decoding.streaming_scores import StreamScores, streaming_scores
from blt_jax.interop import hugging_face
from blt_jax.layers.model import Model
from blt_jax.models.llama3 import Llama3Config
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.train.pretraining import Context, Experiment, Fit, Pretraining

Modes = tuple[tuple[str, StreamingConfig], ...]


def check_modes(owner: str, modes: Modes, model: Any) -> None:
    """Raises ValueError unless there are modes with different names and the model is a Llama."""
    names = [name for name, _ in modes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{owner}.modes={names}: give (name, StreamingConfig) pairs, names differ")
    if not isinstance(model, Llama3Config):
        raise ValueError(f"{owner}.model={model}: must be a Llama3Config")


def scores_by_mode(
    model: Model, params: Any, modes: Modes, tokens: np.ndarray
) -> tuple[dict[str, StreamScores], dict[str, float]]:
    """Scores [B, T - 1] of the streams `tokens` [B, T], and the seconds, for each mode."""
    scores, seconds = {}, {}
    for name, config in modes:
        started = time.perf_counter()
        found = jax.device_get(streaming_scores(model, params, config, tokens))
        scores[name], seconds[name] = found, time.perf_counter() - started
    return scores, seconds


def whole_rows(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens [B, T + 1] of a batch, the last target included."""
    return np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)


def position_figure(lines: dict[str, np.ndarray], bucket: int, trained_length: int) -> Any:
    """The paper's Fig. 3: log-perplexity over the position in the stream, one line per mode.

    lines: nats [B, T] of each; the last positions that fill no bucket are left out.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, (name, nats) in enumerate(lines.items()):
        style = ("-", "--", "-.", ":")[index % 4]  # lines may coincide
        buckets = nats.shape[1] // bucket
        means = nats[:, : buckets * bucket].reshape(-1, buckets, bucket).mean((0, 2))
        axes.plot((np.arange(buckets) + 0.5) * bucket, means, style, linewidth=1.3, label=name)
    axes.axvline(trained_length, color="grey", linestyle="--", label="trained length")
    axes.set_xlabel("position in the stream (tokens)")
    axes.set_ylabel("log-perplexity (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def accuracy_figure(
    lines: dict[str, list[float]], distances: Sequence[int], label: str, chance: float | None = None
) -> Any:
    """Exact matches over the distance, one line per mode, and those by chance."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(distances, values, marker=".", label=name)
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label="chance")
    axes.set_xlabel(label)
    axes.set_ylabel("exact matches")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


# -------------------------------------------------------------------------------------- text


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StreamingPerplexity(LanguageModel):
    """`LanguageModel`, then one stream of validation documents read with every mode.

    stream_tokens: length of the stream. bucket: positions per point of the figure.
    """

    modes: Modes = ()
    stream_tokens: int = 100_001
    bucket: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_modes("StreamingPerplexity", self.modes, self.model)
        if self.bucket < 1:
            raise ValueError(f"StreamingPerplexity.bucket={self.bucket}: must be >= 1")
        if self.stream_tokens <= self.data.sequence_length + self.bucket:
            raise ValueError(
                f"StreamingPerplexity.stream_tokens={self.stream_tokens}: must be above the "
                f"training length {self.data.sequence_length} and a bucket of {self.bucket}"
            )

    def after_training(self, context: Context, fit: Fit) -> dict[str, float]:
        """As `stream_numbers`."""
        tokens = text_stream(evaluation_config(self.data), self.stream_tokens)
        read = (self.modes, tokens, self.bucket, self.data.sequence_length)
        return stream_numbers(context, fit.model, fit.params, *read)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PretrainedStream(Experiment):
    """One stream of documents read with every mode by a Llama of a Hugging Face folder.

    model_path: the folder. trained_length: of its rows; what comes after it counts.
    """

    model_path: str
    data: DataConfig
    modes: Modes = ()
    trained_length: int = 4096
    stream_tokens: int = 100_001
    bucket: int = 1000

    def __post_init__(self):
        for name in ("trained_length", "bucket"):
            if getattr(self, name) < 1:
                raise ValueError(f"PretrainedStream.{name}={getattr(self, name)}: must be >= 1")
        if self.stream_tokens <= self.trained_length + self.bucket:
            raise ValueError(
                f"PretrainedStream.stream_tokens={self.stream_tokens}: must be above "
                f"trained_length={self.trained_length} and a bucket of {self.bucket}"
            )

    def run(self, context: Context) -> dict[str, float]:
        """As `stream_numbers`."""
        model, params = hugging_face.load_pretrained(self.model_path)
        check_modes("PretrainedStream", self.modes, model.config)
        tokens = text_stream(self.data, self.stream_tokens)
        read = (self.modes, tokens, self.bucket, self.trained_length)
        return stream_numbers(context, model, params, *read)


def text_stream(data: DataConfig, length: int) -> np.ndarray:
    """Tokens [1, length] of the documents of a data config one after the other.

    Raises ValueError if there are fewer.
    """
    tokenizer, documents, parts, total = data.tokenizer.build(), open_documents(data), [], 0
    for index in range(len(documents)):
        parts.append(encode_document(tokenizer, documents[index].text))
        total += len(parts[-1])
        if total >= length:
            return np.concatenate(parts)[None, :length].astype(np.int32)
    raise ValueError(f"stream_tokens={length}: the documents have only {total} tokens")


def stream_numbers(
    context: Context,
    model: Model,
    params: Any,
    modes: Modes,
    tokens: np.ndarray,
    bucket: int,
    trained_length: int,
) -> dict[str, float]:
    """`nats_<mode>`: log-perplexity of the tokens [1, T] beyond the trained length, and
    `seconds_<mode>`, compilation included; the figure `log_perplexity`."""
    scores, seconds = scores_by_mode(model, params, modes, tokens)
    nats = {name: found.nats for name, found in scores.items()}
    context.writer.figure("log_perplexity", position_figure(nats, bucket, trained_length))
    numbers = {f"nats_{name}": float(x[:, trained_length:].mean()) for name, x in nats.items()}
    return numbers | {f"seconds_{name}": value for name, value in seconds.items()}


# ----------------------------------------------------------------------------------- backcopy


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Backcopy(Pretraining):
    """Trains on `data.synthetic.backcopy_rows`, then reads streams of the task with every mode.

    num_symbols, triggers: of the task, whose bigrams are those of the training text of the data
    config. bos: rows begin with an id of their own. training_rows: how many are trained on, again
    and again; 0 for new ones in every batch. num_streams, stream_length: what is read.
    """

    num_symbols: int = 64
    triggers: tuple[int, ...] = (2, 3, 4)
    bos: bool = True
    training_rows: int = 0
    modes: Modes = ()
    num_streams: int = 64
    stream_length: int = 512

    def __post_init__(self):
        super().__post_init__()
        check_modes("Backcopy", self.modes, self.model)
        if self.model.vocab_size <= self.num_symbols:
            raise ValueError(
                f"Backcopy.model.vocab_size={self.model.vocab_size}: must be above "
                f"num_symbols={self.num_symbols}"
            )
        if self.training_rows < 0:
            raise ValueError(f"Backcopy.training_rows={self.training_rows}: must be >= 0")
        if self.stream_length <= self.data.sequence_length or self.num_streams < 1:
            raise ValueError(
                f"Backcopy.stream_length={self.stream_length}: must be above the training length "
                f"{self.data.sequence_length}, with num_streams={self.num_streams} >= 1"
            )

    def run(self, context: Context) -> dict[str, float]:
        """`nats_<mode>` beyond the training length, of targets after a trigger and of others too;
        `nats_before_eviction`; `eviction_cost`, what a window loses to as many keys with sinks."""
        documents = open_documents(self.data)
        texts = (documents[index].text for index in range(len(documents)))
        bigrams = byte_bigrams(texts, self.num_symbols)
        fit = self.fit(context, batches=lambda data, rows: self._batches(data, bigrams, rows))
        streams = evaluation_config(
            self.data, sequence_length=self.stream_length, batch_size=self.num_streams
        )
        batch = next(self._batches(streams, bigrams))
        tokens = whole_rows(batch)
        scores, _ = scores_by_mode(fit.model, fit.params, self.modes, tokens)
        nats = {name: found.nats for name, found in scores.items()}
        trained = self.data.sequence_length
        context.writer.figure("log_perplexity", position_figure(nats, 16, trained))
        return dict(fit.metrics) | self._numbers(nats, batch["follows_trigger"])

    def _batches(
        self, data: DataConfig, bigrams: Bigrams, rows: Sequence[int] | None = None
    ) -> GeneratedBatches:
        def make(numbers: Sequence[int], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
            task = dict(length=data.sequence_length, bigrams=bigrams, triggers=self.triggers)
            return backcopy_rows(numbers, seed, **task, bos=self.bos)

        distinct = self.training_rows if data.split is Split.TRAIN else 0
        return GeneratedBatches(data, make, rows, distinct)

    def _numbers(self, nats: dict[str, np.ndarray], copies: np.ndarray) -> dict[str, float]:
        trained = self.data.sequence_length
        full = max(config.size for _, config in self.modes if config.policy is not Policy.DENSE)
        start = min(full, trained)
        # Before anything is evicted all modes are the same function.
        first = next(iter(nats.values()))[:, :start]
        numbers = {"nats_before_eviction": float(first.mean())}
        for kind, chosen in (("copies", copies), ("others", ~copies)):
            numbers[f"nats_before_eviction_{kind}"] = float(first[chosen[:, :start]].mean())
        for name, values in nats.items():
            late, late_copies = values[:, trained:], copies[:, trained:]
            numbers[f"nats_{name}"] = float(late.mean())
            numbers[f"nats_{name}_copies"] = float(late[late_copies].mean())
            numbers[f"nats_{name}_others"] = float(late[~late_copies].mean())
        if {"window", "sinks"} <= nats.keys():
            numbers["eviction_cost"] = numbers["nats_window"] - numbers["nats_sinks"]
        return numbers


# --------------------------------------------------------------------------------- StreamEval


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StreamEval(Pretraining):
    """Trains on `data.synthetic.key_value_rows`, then asks for values some lines back in streams.

    distances: lines between a question and the line that it asks about. stream_lines: per stream;
    questions in the first half, when caches are filling, do not count.
    """

    num_symbols: int = 64
    modes: Modes = ()
    distances: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 12, 16)
    num_streams: int = 16
    stream_lines: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_modes("StreamEval", self.modes, self.model)
        if self.data.sequence_length % (2 * EVENT):
            raise ValueError(
                f"StreamEval.data.sequence_length={self.data.sequence_length}: must be a multiple "
                f"of {2 * EVENT}"
            )
        if self.model.vocab_size < 2 + self.num_symbols:
            raise ValueError(
                f"StreamEval.model.vocab_size={self.model.vocab_size}: must be >= "
                f"num_symbols + 2 = {2 + self.num_symbols}"
            )
        if not self.distances or not 0 <= min(self.distances) <= max(self.distances):
            raise ValueError(f"StreamEval.distances={self.distances}: must be >= 0, not empty")
        if max(self.distances) >= min(self.stream_lines, self.num_symbols // 2):
            raise ValueError(
                f"StreamEval.distances={self.distances}: must be below "
                f"stream_lines={self.stream_lines} and half of num_symbols={self.num_symbols}"
            )

    def run(self, context: Context) -> dict[str, float]:
        """`accuracy_<mode>_<distance in tokens>`: answers with every id right."""
        fit = self.fit(context, batches=lambda data, rows: self._batches(data, -1, rows))
        numbers, lines = dict(fit.metrics), {name: [] for name, _ in self.modes}
        streams = evaluation_config(
            self.data, sequence_length=2 * EVENT * self.stream_lines, batch_size=self.num_streams
        )
        for distance in self.distances:
            batch = next(self._batches(streams, distance))
            tokens = whole_rows(batch)
            scores, _ = scores_by_mode(fit.model, fit.params, self.modes, tokens)
            half = tokens.shape[1] // 2
            late = batch["target_mask"][:, half:]
            for name, found in scores.items():
                right = found.correct[:, half:][late].reshape(-1, VALUE).all(axis=1)
                accuracy = float(right.mean())
                numbers[f"accuracy_{name}_{self.tokens_back(distance)}"] = accuracy
                lines[name].append(accuracy)
        back = [self.tokens_back(distance) for distance in self.distances]
        label, chance = "tokens between the line and the answer", self.num_symbols**-VALUE
        context.writer.figure("accuracy_by_distance", accuracy_figure(lines, back, label, chance))
        return numbers

    def tokens_back(self, distance: int) -> int:
        """Tokens from a line's value to the token that predicts the answer, from their firsts."""
        return 2 * EVENT * distance + EVENT - 1

    def _batches(
        self, data: DataConfig, distance: int, rows: Sequence[int] | None = None
    ) -> GeneratedBatches:
        def make(numbers: Sequence[int], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
            task = dict(lines=data.sequence_length // (2 * EVENT), num_symbols=self.num_symbols)
            return key_value_rows(numbers, seed, **task, distance=distance)

        return GeneratedBatches(data, make, rows)
