"""The program that compiles for machines that are not here. libtpu is part of the test extra."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = "--config=experiments/llama3.py:smoke"


def program(*arguments):
    """Runs the command in a process of its own: one that loaded libtpu cannot profile any more."""
    return subprocess.run(
        [sys.executable, "-m", "blt_jax.compile", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("compile") / "report.json"
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    result = program(SMOKE, "--topology=v5e:2x2", *mesh, f"--output={path}")
    assert result.returncode == 0, result.stderr
    assert "Involuntary full rematerialization" not in result.stderr
    return json.loads(path.read_text()), result.stdout


def test_report_of_a_train_step(report):
    numbers, text = report
    assert numbers["devices"] == 4 and numbers["device"] == "TPU v5 lite"
    sizes = numbers["bytes_per_device"]
    assert sum(row["bytes_per_device"] for row in numbers["parameters"]) == sizes["parameters"]
    assert 2 * sizes["parameters"] <= sizes["optimizer"] <= 2 * sizes["parameters"] + 64
    assert sizes["arguments"] <= sizes["peak"] < sizes["memory"] == 16e9
    assert 1.0 <= numbers["flops"]["program"] / numbers["flops"]["model"] < 1.2
    assert {tuple(row["axes"]) for row in numbers["collectives"]} >= {("fsdp",), ("tensor",)}
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in numbers["collectives"])
    mfu = numbers["estimate"]["mfu"]
    assert 0 < mfu["collectives_exposed"] <= mfu["collectives_hidden"] <= 1
    assert "not measured" in text and "transformer/layers/mlp/gate" in text
