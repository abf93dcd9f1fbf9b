"""Starts `python -m blt_jax.run` for tests, on one process or several of this machine."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

from blt_jax.train.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = "tests/train/launched_runs.py"
TIMINGS = ("bytes_per_second", "tokens_per_second", "seconds_per_step", "seconds")
PATIENCE = 300  # seconds; machines of tests may be busy


def environment(cache, **variables):
    """Variables of a launched process: on CPU, with quick compiles that are kept in `cache`.

    A variable that is None is left out.
    """
    values = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **variables,
    }
    return {name: value for name, value in values.items() if value is not None}


def start(cache, run, workdir, *flags, variables=None, **options):
    """A launched process, its output and errors in one pipe."""
    command = [sys.executable, "-m", "blt_jax.run", f"--config={RUNS}:{run}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment(cache, **(variables or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def start_several(count, cache, run, workdir, *flags, **options):
    """`count` processes of one run, joined by flags."""
    port = free_port()
    return [
        start(
            cache,
            run,
            workdir,
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={count}",
            f"--process_id={index}",
            *flags,
            **options,
        )
        for index in range(count)
    ]


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(processes, status=0):
    """The outputs of processes that must all end with `status`."""
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == status, output
    return outputs


def launch(count, cache, run, workdir, *flags, **options):
    """Output of process 0 of a run on `count` processes that must succeed."""
    if count == 1:
        return finish([start(cache, run, workdir, *flags, **options)])[0]
    return finish(start_several(count, cache, run, workdir, *flags, **options))[0]


def lines(workdir):
    """Lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(workdir)
    ]


def forget_after(workdir, step):
    """Removes the checkpoints of later steps, so that the next start takes that of `step`."""
    folders = list((pathlib.Path(workdir) / "checkpoints").iterdir())
    assert str(step) in [folder.name for folder in folders]
    for folder in folders:
        if int(folder.name) > step:
            shutil.rmtree(folder)
