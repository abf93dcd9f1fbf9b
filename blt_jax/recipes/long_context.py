"""Training on short rows, then the loss by position of rows many times longer or within chunks of
the attention, and a recall task.

The second model is trained from scratch on the recall task of `data.synthetic.recall_rows`: one of
a few letters at the start of a row has to be named again after noise.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blt_jax.data.loader import DataConfig, evaluation_config, loader
from blt_jax.data.packing import Packing
from blt_jax.data.synthetic import RECALL_VOCABULARY, GeneratedBatches, recall_rows
from blt_jax.layers.losses import target_nats
from blt_jax.layers.model import Model
from blt_jax.models.megalodon_config import MegalodonConfig
from blt_jax.models.megalodon_truncated import TruncatedDecoder, check_chunks
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.train.evaluate import bits_per_byte
from blt_jax.train.pretraining import Context, EvaluationConfig, Fit, Pretraining
from blt_jax.train.step import batch_sharding, process_rows, put_batch, row_parts

# ------------------------------------------------------------------------------------ recall


def recall_batches(
    config: DataConfig, gaps: tuple[int, ...], rows: Sequence[int] | None = None
) -> GeneratedBatches:
    """Batches of the recall task without end, with the gaps in turn."""

    def make(numbers: Sequence[int], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
        length = config.sequence_length
        parts = [
            recall_rows(1, gaps[i % len(gaps)], length=length, seed=(*seed, i)) for i in numbers
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return GeneratedBatches(config, make, rows)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Recall(Pretraining):
    """Training on the recall task alone, evaluated on new rows.

    gaps: tokens of noise between the letter and the question, asked for equally often.
    """

    evaluation: EvaluationConfig = dataclasses.field(
        default_factory=lambda: EvaluationConfig(batches=4)
    )
    gaps: tuple[int, ...] = (8, 24, 48)

    def __post_init__(self):
        super().__post_init__()
        if not self.gaps or min(self.gaps) < 0:
            raise ValueError(f"Recall.gaps={self.gaps}: must be >= 0, not empty")
        needed = max(self.gaps) + 2
        if self.data.sequence_length < needed:
            raise ValueError(
                f"Recall.data.sequence_length={self.data.sequence_length}: must be >= {needed} for "
                f"gaps={self.gaps}"
            )
        if self.model.vocab_size < RECALL_VOCABULARY:
            raise ValueError(
                f"Recall.model.vocab_size={self.model.vocab_size}: must be >= {RECALL_VOCABULARY}"
            )

    def run(self, context: Context) -> dict[str, float]:
        """`recall_accuracy`, and of new rows with each gap `recall_accuracy_N`; chance is 1 / 8."""
        gaps = self.gaps
        fit = self.fit(context, batches=lambda data, rows: recall_batches(data, gaps, rows))
        numbers = {"recall_accuracy": fit.metrics["accuracy"]}
        held_out = evaluation_config(self.data)

        @jax.jit
        def accuracy(params, batch):
            logits = fit.model.apply({"params": params}, *fit.model.inputs(batch)).logits
            right = (logits.argmax(-1) == batch["targets"]) & batch["target_mask"]
            return right.sum() / batch["target_mask"].sum()

        for gap in gaps:
            batch = next(recall_batches(held_out, (gap,)))
            numbers[f"recall_accuracy_{gap}"] = float(accuracy(fit.params, batch))
        return numbers


# ------------------------------------------------------------------- far beyond the trained length


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LongContext(LanguageModel):
    """`LanguageModel`, then its loss on rows of `long_length` bytes of one document each.

    long_rows: how many at least, of the validation split. bucket: positions per point of the
    figure. recall: the training on the recall task; None: without. truncate_chunks: of a second
    reading of a Megalodon's rows, by `megalodon_truncated`; 0: without.
    """

    long_length: int = 8192
    long_rows: int = 8
    bucket: int = 256
    recall: Recall | None = None
    truncate_chunks: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.truncate_chunks:
            if not isinstance(self.model, MegalodonConfig):
                raise ValueError(
                    f"LongContext.truncate_chunks={self.truncate_chunks}: must be 0 for a "
                    f"{type(self.model).__name__}, only a Megalodon has statistics to replace"
                )
            check_chunks("LongContext.truncate_chunks", self.truncate_chunks, self.model)
        for name in ("long_length", "long_rows", "bucket"):
            if getattr(self, name) < 1:
                raise ValueError(f"LongContext.{name}={getattr(self, name)}: must be >= 1")
        trained = self.data.sequence_length
        if self.long_length <= trained or trained % self.bucket or self.long_length % self.bucket:
            raise ValueError(
                f"LongContext.long_length={self.long_length}: must be above the training length "
                f"{trained}, and both multiples of bucket={self.bucket}"
            )

    def truncated_nats(self, model: Model, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """-log p [B, T] of the targets, with statistics of the last chunks."""
        decoder = TruncatedDecoder.create(model, params, chunks=self.truncate_chunks)
        rows = jnp.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
        return decoder.stream_nats(rows)

    def after_training(self, context: Context, fit: Fit) -> dict[str, float]:
        """`bits_per_byte_within` and `_beyond` the training length on long rows, and `_to_N` for
        each doubling N of it (positions N/2 to N), and all these with `truncated_` in front;
        forward `flops_per_token` at both lengths; `recall_accuracy` by gap."""
        numbers = loss_by_position(self, context, fit.model, fit.params)
        for name, length in (("", self.data.sequence_length), ("_long", self.long_length)):
            numbers[f"flops_per_token{name}"] = float(fit.model.flops_per_token(length))
        if self.recall is not None:
            numbers |= self.recall.run(context.child("recall"))
        return numbers


def _model_nats(model: Model, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    output = model.apply({"params": params}, *model.inputs(batch))
    return target_nats(output.logits, batch["targets"])[0]


def sums_by_position(
    data: DataConfig,
    name: str,
    rows: int,
    context: Context,
    model: Model,
    params: Any,
    nats_of: Callable[[Model, Any, dict[str, jax.Array]], jax.Array] = _model_nats,
) -> np.ndarray:
    """Sums [2, T] of nats and of bytes at every position, over at least `rows` rows of the
    validation split that one document fills.

    nats_of: (model, params, batch) -> [B, T], -log p of the targets. Raises ValueError if there are
    fewer rows, for the field `name`.
    """
    sharding = batch_sharding(context.mesh, model.sharding)
    data = evaluation_config(data, batch_size=row_parts(sharding), packing=Packing.ONE_DOCUMENT)

    @jax.jit
    def sums(params, batch):
        full = (batch["segment_ids"] > 0).all(axis=1)
        mask = batch["target_mask"] & full[:, None]
        nats = jnp.where(mask, nats_of(model, params, batch), 0.0)
        counted = jnp.where(mask, batch["target_bytes"], 0).astype(jnp.float32)
        return jnp.stack([nats, counted]).sum(1), full.sum()

    totals, found = np.zeros((2, data.sequence_length)), 0
    with jax.set_mesh(context.mesh):
        for batch in loader(data, rows=process_rows(data.batch_size, sharding)):
            if found >= rows:
                break
            placed = {k: v[0] for k, v in put_batch(batch, 1, sharding).items()}
            more, full = sums(params, placed)
            totals, found = totals + np.asarray(more, np.float64), found + int(full)
    if found < rows:
        raise ValueError(
            f"{name}={rows}: the validation split has only {found} pieces of documents of "
            f"{data.sequence_length} bytes"
        )
    return totals


def loss_by_position(
    config: LongContext, context: Context, model: Model, params: Any
) -> dict[str, float]:
    """Bits per byte within and beyond the training length; the figure `loss_by_position`."""
    data = dataclasses.replace(config.data, sequence_length=config.long_length)
    rows = data, "LongContext.long_rows", config.long_rows, context, model, params
    totals = {"": sums_by_position(*rows)}
    if config.truncate_chunks:
        totals["truncated_"] = sums_by_position(*rows, nats_of=config.truncated_nats)
    totals = {k: sums.reshape(2, -1, config.bucket).sum(2) for k, sums in totals.items()}
    label, length = "position in the document (bytes)", config.data.sequence_length
    context.writer.figure("loss_by_position", _figure(totals, label, length, config.bucket))
    trained, numbers = length // config.bucket, {}
    for kind, sums in totals.items():
        numbers[f"{kind}bits_per_byte_within"] = bits_per_byte(*sums[:, :trained].sum(1))
        numbers[f"{kind}bits_per_byte_beyond"] = bits_per_byte(*sums[:, trained:].sum(1))
        end = 2 * trained
        while end <= sums.shape[1]:
            name = f"{kind}bits_per_byte_to_{end * config.bucket}"
            numbers[name] = bits_per_byte(*sums[:, end // 2 : end].sum(1))
            end *= 2
    return numbers


FIGURE_LABELS = {"": "statistics of all tokens", "truncated_": "of the last chunks"}


def _figure(totals: dict[str, np.ndarray], label: str, trained: int = 0, bucket: int = 1) -> Any:
    """Bits per byte over the position, from sums [2, buckets]; a line at the trained length."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for kind, sums in totals.items():
        position = np.arange(sums.shape[1]) * bucket + bucket // 2
        name = FIGURE_LABELS[kind] if len(totals) > 1 else None
        axes.plot(position, sums[0] / (np.log(2) * sums[1]), marker=".", label=name)
    if trained:
        axes.axvline(trained, color="grey", linestyle="--", label="trained length")
        axes.legend()
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    return figure


# ---------------------------------------------------------------------------- chunk boundaries


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ChunkBoundaries(LanguageModel):
    """`LanguageModel`, then its loss by the position within chunks of a Megalodon's attention.

    rows: of the validation split, filled by one document each, at least. start: positions that
    count as a chunk's start. A row's first chunk, which nothing precedes, is left out.
    """

    rows: int = 200
    start: int = 8

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.model, MegalodonConfig) or self.model.attention_window:
            raise ValueError(
                f"ChunkBoundaries.model={self.model!r:.40}: must be a MegalodonConfig with "
                "attention_window=0, whose attention has chunks"
            )
        chunk, length = self.model.chunk_size, self.data.sequence_length
        if self.rows < 1:
            raise ValueError(f"ChunkBoundaries.rows={self.rows}: must be >= 1")
        if not 1 <= self.start < chunk:
            raise ValueError(
                f"ChunkBoundaries.start={self.start}: must be in [1, {chunk}), {chunk} is the chunk"
            )
        if length % chunk or length < 2 * chunk:
            raise ValueError(
                f"ChunkBoundaries.data.sequence_length={length}: must be several chunks of {chunk}"
            )

    def after_training(self, context: Context, fit: Fit) -> dict[str, float]:
        """`bits_per_byte_at_start` of chunks and `_in_rest`, and their difference `boundary_jump`;
        the figure `loss_in_chunk`."""
        totals = sums_by_position(
            self.data, "ChunkBoundaries.rows", self.rows, context, fit.model, fit.params
        )
        chunk = self.model.chunk_size
        totals = totals.reshape(2, -1, chunk)[:, 1:].sum(1)
        context.writer.figure(
            "loss_in_chunk", _figure({"": totals}, "position in the chunk (bytes)")
        )
        start, rest = (
            bits_per_byte(*part.sum(1)) for part in np.split(totals, [self.start], axis=1)
        )
        return {
            "bits_per_byte_at_start": start,
            "bits_per_byte_in_rest": rest,
            "boundary_jump": start - rest,
        }
