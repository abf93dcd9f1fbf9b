"""Two processes train one model, on this machine."""

import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import pytest

from blt_jax.dist import multihost
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.train.checkpoint import CheckpointingConfig
from blt_jax.train.pretraining import make_context
from blt_jax.train.writers import read_metrics
from tests.train.tiny_model import tiny_experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run_two(workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.two_processes", str(port), str(i), str(workdir)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output.strip().splitlines()[-1] for output, _ in outputs]


def test_two_processes_train_evaluate_and_resume(tmp_path):
    first, second = _run_two(tmp_path)
    assert first == second
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    # Again from step 2, with both processes' data states.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    again, _ = _run_two(tmp_path)
    assert again == first
    losses = [line.get("loss") for line in lines]
    assert [line.get("loss") for line in read_metrics(tmp_path)] == losses
    # One process cannot continue two packed streams, and says so.
    experiment = tiny_experiment(
        steps=4, accumulation=2, checkpointing=CheckpointingConfig(every=2, keep=3)
    )
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=1))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(ValueError, match="saved by 2 processes"):
        experiment.fit(make_context(tmp_path, mesh, jax.random.key(0)))


def test_a_lone_host_is_not_an_error(tmp_path):
    code = "from blt_jax.dist import multihost; print(multihost.initialize())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert output.stdout.strip() == "False", output.stderr


def test_other_errors_of_the_start_are_not_hidden(monkeypatch):
    def fail():
        raise ValueError("process_id is out of range")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="out of range"):
        multihost.initialize()
