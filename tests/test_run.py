"""The launcher: flags, errors, --list, and runs that are killed and started again."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from blt_jax import run
from blt_jax.train.writers import read_metrics, read_results
from tests.example_experiments import TEXT
from tests.train.launched import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMINGS = ("bytes_per_second", "tokens_per_second", "seconds_per_step", "seconds")


@pytest.fixture
def experiments(tmp_path):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "toy.py").write_text(TEXT)
    return folder


def error_of(capsys, *arguments):
    status = run.main(["run", *map(str, arguments)])
    return status, capsys.readouterr().err


def test_list_shows_every_run_with_its_first_line(experiments, capsys):
    (experiments / "other.py").write_text(TEXT.replace("Twelve", "Other"))
    assert run.main(["run", "--list", f"--experiments_dir={experiments}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == f"{experiments}/other.py:tiny  Other steps on the standard library."
    assert lines[3] == f"{experiments}/toy.py:long    Steps enough to be interrupted."


def test_list_of_a_missing_folder(tmp_path, capsys):
    status, error = error_of(capsys, "--list", f"--experiments_dir={tmp_path}/none")
    assert status == 2
    assert "no such directory" in error


@pytest.mark.parametrize(
    ("run_name", "overrides", "message"),
    [
        ("tiny", ["--config.model.widht=3"], "TinyConfig has no field 'widht'; allowed are"),
        ("tiny", ["--config.model.widht=3"], "noise, precision, scale, vocab_size, width"),
        ("tiny", ["--config.stepz=3"], "has no field 'stepz'"),
        ("tiny", ["--config.data.sources[1].kind=stdlib"], "has 1 items, no [1]"),
        ("tiny", ["--config.steps.x=3"], "steps is 12 and has no field 'x'"),
        ("tny", [], "has no run 'tny'; its runs are tiny, long"),
        ("tiny", ["--config.model.width=wide"], "--config.model.width=wide"),
        ("tiny", ["--config.model.width=0"], "TinyConfig.width=0: must be >= 1"),
        ("tiny", ["--config.schedule.decay=cosin"], "--config.schedule.decay=cosin"),
        ("tiny", ["--config.accumulation=3"], "batch_size=8: must be divisible"),
        ("tiny", ["--config.mesh.tensor=3"], "8 devices cannot be divided by 3"),
        ("tiny", ["--config.data.batch_size=12"], "batch of 12 rows cannot be divided"),
        (
            "tiny",
            ["--config.mesh.tensor=8", "--config.model.vocab_size=300"],
            "'vocab' of size 300",
        ),
        ("tiny", ["--workdri=x"], "workdri"),
        ("tiny", ["left_over"], "unexpected argument 'left_over'"),
    ],
)
def test_wrong_command_lines(experiments, tmp_path, capsys, run_name, overrides, message):
    status, error = error_of(
        capsys, f"--config={experiments}/toy.py:{run_name}", f"--workdir={tmp_path}/w", *overrides
    )
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "w").exists()


def test_missing_flags_and_files(experiments, tmp_path, capsys):
    status, error = error_of(capsys, f"--workdir={tmp_path}")
    assert status == 2
    assert "--config=<experiment file>.py:<run> is missing" in error
    status, error = error_of(capsys, f"--config={experiments}/toy.py:tiny")
    assert status == 2
    assert "--workdir=<folder of the run> is missing" in error
    status, error = error_of(capsys, f"--config={experiments}/none.py:tiny", "--workdir=x")
    assert status == 2
    assert "does not exist" in error
    (experiments / "empty.py").write_text("")
    status, error = error_of(capsys, f"--config={experiments}/empty.py:tiny", "--workdir=x")
    assert status == 2
    assert "does not define RUNS" in error


def test_overrides_are_typed_and_checked_together(experiments):
    values = run.parse(
        [
            "run",
            f"--config={experiments}/toy.py:tiny",
            "--config.model.width=8",
            "--config.schedule.decay=linear",
            "--config.schedule.learning_rate=1",
            "--config.optimizer.undecayed=('norm','embed')",
            "--noconfig.logging.tensorboard",
        ]
    )
    config = values.config
    assert config.model.width == 8
    assert config.schedule.decay.name == "LINEAR"
    assert isinstance(config.schedule.learning_rate, float)
    assert config.optimizer.undecayed == ("norm", "embed")
    assert config.logging.tensorboard is False


def command(experiments, workdir, run_name, *more):
    config = f"--config={experiments}/toy.py:{run_name}"
    return [sys.executable, "-m", "blt_jax.run", config, f"--workdir={workdir}", *more]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(arguments[0].parent / "compiled"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    for _ in range(6000):
        if any(line["step"] >= step for line in read_metrics(workdir)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never reached")


def lines(workdir):
    return [
        json.dumps({name: value for name, value in line.items() if name not in TIMINGS})
        for line in read_metrics(workdir)
    ]


def test_killed_terminated_and_whole_runs_are_bitwise_the_same(experiments, tmp_path):
    whole = start(experiments, tmp_path / "whole", "long")
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    assert "devices: 1 x cpu" in out
    assert "without embeddings" in out
    assert "training FLOPs per token" in out
    assert "step compiled in" in out
    assert "step 400/400 loss" in out
    assert "mfu n/a: unknown device cpu eta 00:00:00" in out
    assert read_results(tmp_path / "whole")["numbers"]["steps"] == 400

    parts = tmp_path / "parts"
    killed = start(experiments, parts, "long")
    wait_for_step(killed, parts, 60)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL

    terminated = start(experiments, parts, "long")
    wait_for_step(terminated, parts, 150)
    terminated.send_signal(signal.SIGTERM)
    out, err = terminated.communicate(timeout=60)
    assert terminated.returncode == 0, err
    assert "continuing from the checkpoint of step" in out
    assert "preempted after step" in out
    assert read_results(parts) is None

    last = start(experiments, parts, "long")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert "continuing from the checkpoint of step" in out
    assert lines(tmp_path / "whole") == lines(parts)
    assert (
        read_results(parts)["numbers"]["bits_per_byte"]
        == read_results(tmp_path / "whole")["numbers"]["bits_per_byte"]
    )


def test_errors_of_a_run_are_one_line(experiments, tmp_path, capsys):
    config = f"--config={experiments}/toy.py:tiny"
    arguments = ["run", config, f"--workdir={tmp_path}/w", "--config.logging.tensorboard=false"]
    assert run.main(arguments) == 0
    assert "report.html in" in capsys.readouterr().out
    assert (tmp_path / "w" / "report.html").exists()
    assert run.main([*arguments, "--config.model.width=8"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: workdir")
    assert "model.width: 16 -> 8" in error
    arguments[2] = f"--workdir={tmp_path}/inf"
    assert run.main([*arguments, "--config.model.scale=inf"]) == 1
    assert capsys.readouterr().err.startswith("error: step 1: objective is nan")
    huge = ["--config.model.width=4194304", "--config.model.vocab_size=65536"]
    arguments[2] = f"--workdir={tmp_path}/huge"
    assert run.main([*arguments, *huge]) == 1
    assert "blt_jax.compile" in capsys.readouterr().err
