"""Classification of sequences by Megalodon's bidirectional blocks (arXiv 2404.08801, section 4.4),
on ListOps (arXiv 1804.06028), a task of the Long Range Arena (arXiv 2011.04006)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from blt_jax.data.loader import DataConfig
from blt_jax.data.synthetic import LISTOPS_VOCABULARY, GeneratedBatches, listops_row
from blt_jax.models.megalodon_classifier import ClassifierConfig
from blt_jax.train.pretraining import Context, EvaluationConfig, Pretraining

DIGITS = 10


def listops_batches(
    config: DataConfig, depth: int, values: int, rows: Sequence[int] | None = None
) -> GeneratedBatches:
    """Batches without end of expressions of up to `sequence_length` ids: tokens and segment_ids
    int32 [B, T], labels int32 [B]."""

    def make(numbers: Sequence[int], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
        tokens = np.zeros((len(numbers), config.sequence_length), np.int32)
        segment_ids, labels = np.zeros_like(tokens), np.zeros(len(numbers), np.int32)
        for row, number in enumerate(numbers):
            ids, labels[row] = listops_row(
                config.sequence_length, depth=depth, values=values, seed=(*seed, number)
            )
            tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
        return {"tokens": tokens, "segment_ids": segment_ids, "labels": labels}

    return GeneratedBatches(config, make, rows)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ListOps(Pretraining):
    """Training of a classifier on the values 0 to 9 of nested expressions, evaluated on new ones.

    depth: operators inside each other at most. values: arguments of an operator at most.
    """

    model: ClassifierConfig
    evaluation: EvaluationConfig = dataclasses.field(
        default_factory=lambda: EvaluationConfig(batches=16)
    )
    depth: int = 10
    values: int = 10

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("depth", 1), ("values", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"ListOps.{name}={getattr(self, name)}: must be >= {least}")
        if self.data.sequence_length < 4:
            raise ValueError(
                f"ListOps.data.sequence_length={self.data.sequence_length}: must be >= 4"
            )
        if self.model.num_classes != DIGITS:
            raise ValueError(
                f"ListOps.model.num_classes={self.model.num_classes}: must be {DIGITS}"
            )
        if self.model.blocks.vocab_size < LISTOPS_VOCABULARY:
            raise ValueError(
                f"ListOps.model.blocks.vocab_size={self.model.blocks.vocab_size}: must be >= "
                f"{LISTOPS_VOCABULARY}"
            )

    def run(self, context: Context) -> dict[str, float]:
        """`accuracy` of new expressions, and `most_frequent`, the share of the value that most of
        512 other ones have."""

        def batches(data, rows):
            return listops_batches(data, self.depth, self.values, rows)

        fit = self.fit(context, batches=batches)
        data = dataclasses.replace(self.data, batch_size=512, seed=self.data.seed + 1)
        labels = next(listops_batches(data, self.depth, self.values))["labels"]
        most_frequent = np.bincount(labels, minlength=DIGITS).max() / len(labels)
        return fit.metrics | {"most_frequent": float(most_frequent)}
