"""Runs of a few seconds that tests start through the launcher, on one process or several.

The run `tiny` suffers the fault that the variable FAULT asks for, `kill:7:1`: while batch 7 since
its start is fetched, process 1 is killed. The others are `terminate`, `nan` and `hide`, which
renames the file FAULT_FILE.
"""

import os
import pathlib
import signal

import jax
import numpy as np

from blt_jax.data.loader import DataConfig, evaluation_config, loader
from blt_jax.data.sources import SourceConfig
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.recipes.blt_pretraining import BLTPretraining
from blt_jax.train.configs import select_run
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import CheckpointingConfig, EvaluationConfig, Pretraining
from tests.train.tiny_model import TinyConfig, tiny_experiment


class FaultyBatches:
    """Batches of a loader; while one is fetched, the fault happens."""

    def __init__(self, batches):
        self.batches, self.fetched = iter(batches), 0
        fault, at, process = os.environ.get("FAULT", "none:0:0").split(":")
        self.fault, self.at, self.here = fault, int(at), int(process) == jax.process_index()

    def __iter__(self):
        return self

    def __next__(self):
        self.fetched += 1
        due = self.here and self.fetched == self.at
        if due and self.fault == "hide":
            file = pathlib.Path(os.environ["FAULT_FILE"])
            file.rename(file.with_suffix(".hidden"))
        batch = next(self.batches)
        batch["fault"] = np.zeros(len(batch["tokens"]), np.float32)
        if due and self.fault == "nan":
            batch["fault"][:] = np.nan
        elif due and self.fault in ("kill", "terminate"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGTERM)
        return batch

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


class Faulty(Pretraining):
    """Pretraining whose input pipeline suffers faults."""

    def run(self, context):
        def batches(data, rows):
            found = loader(data, rows=rows)
            return FaultyBatches(found) if data.repeat else found

        return self.fit(context, batches=batches).metrics


def tiny() -> Pretraining:
    """Forty steps of the tests' model, a checkpoint at every fifth; two rows are evaluated, fewer
    than there are devices."""
    data = tiny_experiment().data
    return Faulty(
        model=TinyConfig(noise=0.01),
        data=data,
        steps=40,
        evaluation=EvaluationConfig(data=evaluation_config(data, batch_size=2), batches=3),
        checkpointing=CheckpointingConfig(every=5, keep=3),
        logging=LoggingConfig(every=1, tensorboard=False),
    )


def _stack() -> TransformerConfig:
    return TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, scan_layers=False)


def tiny_blt() -> BLTPretraining:
    """A BLT of space patches: six steps, a checkpoint at each."""
    data = DataConfig(
        sources=(SourceConfig(max_bytes=60_000),),
        batch_size=8,
        sequence_length=32,
        max_patches=16,
        num_threads=0,
        prefetch=0,
    )
    training = Pretraining(
        model=blt.BLTConfig(
            local_encoder=_stack(),
            latent=_stack(),
            local_decoder=_stack(),
            ngrams=blt.NgramConfig(sizes=(3,), vocab_size=31),
            max_patches=16,
        ),
        data=data,
        evaluation=EvaluationConfig(batches=1),
        steps=6,
        accumulation=2,
        checkpointing=CheckpointingConfig(every=1, keep=10),
        logging=LoggingConfig(every=1, tensorboard=False),
    )
    return BLTPretraining(
        blt=training, patcher=PatcherConfig(kind=PatcherKind.SPACE), prompts=(), figure_bytes=64
    )


RUNS = (tiny, tiny_blt)


def get_config(run: str = "tiny"):
    """The config of a run by name."""
    return select_run(RUNS, run)
