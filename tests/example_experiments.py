"""Experiment files for the launcher's tests are written from this text (see test_run.py)."""

TEXT = '''
"""Runs of the tiny model of the tests."""

import dataclasses

from blt_jax.train import configs
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import CheckpointingConfig
from tests.train.tiny_model import TinyConfig, tiny_experiment


def tiny():
    """Twelve steps on the standard library.

    Not shown by --list.
    """
    return tiny_experiment(logging=LoggingConfig(every=4))


def long():
    """Steps enough to be interrupted."""
    return tiny_experiment(
        steps=400,
        model=TinyConfig(width=32, noise=0.01),
        checkpointing=CheckpointingConfig(every=25),
        logging=LoggingConfig(every=1, tensorboard=False),
    )


RUNS = (tiny, long)


def get_config(run="tiny"):
    return configs.select_run(RUNS, run)
'''
