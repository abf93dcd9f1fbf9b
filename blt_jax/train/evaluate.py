"""Evaluation from sums over all counted targets: no average of averages, no dropped bytes."""

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blt_jax.layers.model import LossSums, Model
from blt_jax.train.step import batch_sharding, process_rows, put_batch, row_parts


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Model, params: Any, batch: dict[str, jax.Array]) -> LossSums:
    return model.loss(params, {name: value[0] for name, value in batch.items()})


def _pad_rows(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    # Rows of zeros count nothing: their targets are masked.
    def pad(value):
        missing = rows - value.shape[0]
        return np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) if missing else value

    return {name: pad(np.asarray(value)) for name, value in batch.items()}


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Bits per UTF-8 byte; infinite where no byte was counted."""
    return nats / (math.log(2.0) * num_bytes) if num_bytes else math.inf


def numbers_from_sums(sums: dict[str, float]) -> dict[str, float]:
    """`loss` (nats per target), `bits_per_byte`, `accuracy`, other sums per target.

    sums: `weight`, `nats`, `bytes`, and whatever else a model counts.
    """
    weight = sums["weight"] or math.nan
    numbers = {
        "loss": sums["nats"] / weight,
        "bits_per_byte": bits_per_byte(sums["nats"], sums["bytes"]),
    }
    for name, value in sums.items():
        if name not in ("weight", "nats", "bytes"):
            numbers["accuracy" if name == "correct" else name] = value / weight
    return numbers


def evaluate(
    model: Model,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh | None = None,
    max_batches: int = 0,
) -> dict[str, float]:
    """Loss, bits per byte, accuracy over all batches (at most `max_batches`, 0 for all).

    batches: whole ones, the same on every process, of any number of rows, but none of more than
    the first. Returns also the sums `bytes` and `targets`. Raises ValueError if there is no batch
    or no counted target.
    """
    if mesh is None:
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1),
            ("data", "fsdp", "tensor", "expert", "context"),
        )
    sharding = batch_sharding(mesh, model.sharding)
    totals: dict[str, float] = {}
    pending, rows = None, 0

    def add(sums: LossSums):
        fetched = jax.device_get(sums)
        for name, value in {
            "weight": fetched.weight,
            "objective": fetched.objective,
            **fetched.metrics,
        }.items():
            totals[name] = totals.get(name, 0.0) + float(value)

    for batch in itertools.islice(batches, max_batches or None):
        model.check_batch(batch)
        if not rows:  # those of every device
            parts = row_parts(sharding)
            rows = -(-next(iter(batch.values())).shape[0] // parts) * parts
            own = np.asarray(process_rows(rows, sharding))
        batch = {name: value[own] for name, value in _pad_rows(batch, rows).items()}
        with jax.set_mesh(mesh):
            sums = _sums(model, params, put_batch(batch, 1, sharding))
        if pending is not None:
            add(pending)
        pending = sums
    if pending is None:
        raise ValueError("evaluate: there is no batch (an empty data set?)")
    add(pending)
    if not totals["weight"]:
        raise ValueError("evaluate: no target was counted in the batches")
    numbers = numbers_from_sums(totals)
    return {**numbers, "bytes": totals["bytes"], "targets": totals["weight"]}
