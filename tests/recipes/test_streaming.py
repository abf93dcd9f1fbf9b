"""The recipes of streams: backcopy on the same rows again and again, and refused settings."""

import dataclasses
import pathlib

import numpy as np
import pytest

from blt_jax.data.loader import DataConfig, evaluation_config
from blt_jax.recipes.streaming import Backcopy
from blt_jax.train.launch import load_experiment_file, run_experiment

ROOT = pathlib.Path(__file__).parents[2]


class Captured(Exception):
    """Raised with the batches in place of the training."""


@pytest.fixture(scope="module")
def smoke() -> Backcopy:
    return load_experiment_file(ROOT / "experiments" / "streaming_llm.py").smoke()


def four_batches(config: Backcopy, monkeypatch, workdir, held_out: bool) -> list[np.ndarray]:
    """The tokens of the first batches that the recipe would train on or evaluate."""

    def fit(self, context, batches):
        raise Captured(batches(evaluation_config(self.data) if held_out else self.data, None))

    monkeypatch.setattr(Backcopy, "fit", fit)
    with pytest.raises(Captured) as captured:
        run_experiment(config, workdir)
    batches = captured.value.args[0]
    return [next(batches)["tokens"] for _ in range(4)]


def test_training_rows_come_again_and_held_out_rows_do_not(smoke, monkeypatch, tmp_path):
    fixed = dataclasses.replace(smoke, training_rows=2 * smoke.data.batch_size)
    first, second, third, fourth = four_batches(fixed, monkeypatch, tmp_path / "fixed", False)
    assert (first == third).all() and (second == fourth).all() and (first != second).any()
    for name, config, held_out in (("new", smoke, False), ("held_out", fixed, True)):
        rows = np.concatenate(four_batches(config, monkeypatch, tmp_path / name, held_out))
        assert len(np.unique(rows, axis=0)) == len(rows)


def test_negative_training_rows_are_refused(smoke):
    with pytest.raises(ValueError, match=r"Backcopy\.training_rows=-1: must be >= 0"):
        dataclasses.replace(smoke, training_rows=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_symbols=65), r"StreamEval\.model\.vocab_size=66: must be >= num_symbols \+ 2"),
        (dict(distances=()), r"StreamEval\.distances=\(\): must be >= 0, not empty"),
        (dict(distances=(0, 32)), "must be below stream_lines=128 and half of num_symbols=64"),
        (dict(data=DataConfig(sequence_length=60)), "sequence_length=60: must be a multiple of 8"),
    ],
)
def test_bad_stream_eval(change, message):
    runs = load_experiment_file(ROOT / "experiments" / "streaming_llm.py")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(runs.stream_eval(), **change)
