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


def test_a_run_that_does_not_fit_names_a_lever():
    big = [f"--config.model.transformer.{name}" for name in ("d_model=1024", "num_heads=8")]
    rows = ("--config.data.batch_size=4096", "--config.data.sequence_length=4096")
    result = program(SMOKE, "--topology=v5e:1x1", *big, *rows)
    assert result.returncode == 1
    assert "does not fit" in result.stderr and "parameters 0.0" in result.stderr
    assert "--config.model.transformer.remat=FULL" in result.stderr
    assert "--config.accumulation=4096" in result.stderr


def test_sweep(tmp_path):
    path = tmp_path / "sweep.json"
    tried = ("--sweep", "--sweep_tensor=1,2", "--sweep_rows=4,8", "--sweep_remat=FULL")
    result = program(SMOKE, "--topology=v5e:2x2", *tried, f"--output={path}")
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())
    assert {(row["tensor"], row["rows"]) for row in rows} == {(1, 4), (1, 8), (2, 4), (2, 8)}
    assert all("problem" not in row for row in rows) and any(row["pareto"] for row in rows)
    assert "| data | fsdp | tensor | remat | rows |" in result.stdout


def test_decode_step(tmp_path):
    path = tmp_path / "decode.json"
    options = ("--topology=v5e:2x2", "--program=decode", "--batch=8", "--length=256")
    result = program(SMOKE, *options, f"--output={path}")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(path.read_text())
    assert numbers["tokens"] == 8 and "optimizer" not in numbers["bytes_per_device"]
    cache = 2 * 8 * 2 * 256 * 8 * 2  # keys and values, rows, heads, slots, width, bfloat16
    assert numbers["bytes_per_device"]["inputs"] >= cache / 4


def test_lowering_for_cuda(tmp_path):
    path = tmp_path / "cuda.json"
    result = program(SMOKE, "--topology=cuda:8", f"--output={path}")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(path.read_text())
    assert numbers["devices"] == 8 and numbers["module_bytes"] > 10_000
    assert "not compiled" in numbers["estimate"]["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SMOKE, "--topology=v9:2x2"), "v4, v5e, v5p, v6e"),
        ((SMOKE, "--topology=v5e:3x999"), "libtpu does not know it"),
        (("--config=experiments/llama3.py:nothing",), "its runs are"),
        ((SMOKE, "--topology=v5e:2x2", "--part=blt"), "--part=blt"),
        ((SMOKE, "--topology=v5e:2x2", "--phase=7"), "phases 0..1"),
    ],
)
def test_bad_command_lines(arguments, message):
    result = program(*arguments)
    assert result.returncode == 2 and message in result.stderr
