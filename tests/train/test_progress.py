"""Progress lines, the bar on a terminal, the profiler's window."""

import pathlib
import subprocess
import sys

import jax

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import make_context
from blt_jax.train.progress import Progress, format_duration, format_line, format_utilization
from tests.train.tiny_model import tiny_experiment


def test_line_of_a_log_step():
    numbers = {"loss": 1.23456, "bits_per_byte": 1.78, "bytes_per_second": 51234.0}
    assert format_line(1200, 5000, numbers, 750.4, jax.devices()[0]) == (
        "step 1200/5000 loss 1.2346 bpb 1.7800 bytes/s 5.12e+04 "
        "mfu n/a: unknown device cpu eta 00:12:30"
    )
    assert format_utilization(0.4149, jax.devices()[0]) == "41%"
    assert format_duration(100.0 * 3600 + 61.2) == "100:01:01"


def test_no_bar_without_a_terminal(capsys):
    progress = Progress(10)
    progress.line("a line")
    progress.update()
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert captured.err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(10, start=4)
    progress.update(3)
    progress.line("a line")
    progress.close()
    captured = capsys.readouterr()
    assert "a line" in captured.out
    assert "7/10" in captured.err


def profiled_run(workdir):
    """Trains with a profile of two steps in workdir/profile."""
    logging = LoggingConfig(
        quiet=True, tensorboard=False, every=4, profile_start=1, profile_steps=2
    )
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tiny_experiment(steps=4, logging=logging).fit(make_context(workdir, mesh, jax.random.key(0)))


def test_profile_of_a_window(tmp_path):
    # In a process of its own: the profiler crashes in one that loaded libtpu to compile with.
    program = "import pathlib, sys; from tests.train import test_progress as t; "
    program += "t.profiled_run(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parents[2], timeout=300)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
