"""Faults of launched runs: only the steps since the last checkpoint are lost, and done again."""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest

from blt_jax.train.writers import read_metrics
from tests.train.launched import PATIENCE, finish, forget_after, launch, lines, start, start_several

TWO = "--config.mesh.fsdp=2"  # parameters lie on both processes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run on one process, without a fault."""
    workdir = tmp_path_factory.mktemp("whole")
    launch(1, cache, "tiny", workdir)
    return workdir


@pytest.fixture(scope="module")
def whole_of_two(cache, tmp_path_factory):
    """The run on two processes, without a fault."""
    workdir = tmp_path_factory.mktemp("whole_of_two")
    launch(2, cache, "tiny", workdir, TWO)
    return workdir


def fault(kind, at, process=0):
    return {"variables": {"FAULT": f"{kind}:{at}:{process}"}}


def steps_continued(outputs):
    """The steps of the checkpoints that starts continued from; None for no checkpoint."""
    found = [re.search(r"continuing from the checkpoint of step (\d+)", text) for text in outputs]
    return [int(match[1]) if match else None for match in found]


def finished_checkpoint(workdir):
    """Step of the newest checkpoint that was written to its end; None if there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def kill_at_random(victim, workdir, draw):
    """Kills at any moment, soon after some step that the run did not reach before."""

    def reached():
        return max((line["step"] for line in read_metrics(workdir)), default=0)

    target = min(reached() + draw.randint(0, 5), 36)
    while victim.poll() is None and reached() < target:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    victim.kill()


def test_killed_seven_times_at_random_moments(cache, whole, tmp_path):
    draw, outputs, expected = random.Random(0), [], [None]
    for _ in range(7):
        process = start(cache, "tiny", tmp_path, "--config.checkpointing.every=2")
        kill_at_random(process, tmp_path, draw)
        outputs += finish([process], status=-signal.SIGKILL)
        expected.append(finished_checkpoint(tmp_path))
    outputs.append(launch(1, cache, "tiny", tmp_path))
    started = [(text, step) for text, step in zip(outputs, expected, strict=True) if text]
    # One that was killed early said nothing.
    assert steps_continued([started[-1][0]]) == [expected[-1]] and expected[-1] >= 2
    for text, step in started:
        assert steps_continued([text])[0] in (step, None)
    assert lines(tmp_path) == lines(whole)


def test_one_of_two_processes_killed_three_times(cache, whole_of_two, tmp_path):
    draw = random.Random(1)
    for _ in range(3):
        victim = draw.randrange(2)
        processes = start_several(2, cache, "tiny", tmp_path, TWO)
        kill_at_random(processes[victim], tmp_path, draw)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert processes[victim].returncode == -signal.SIGKILL, outputs
        # The other one ends by itself: it says so, or jax ends it when the first process is lost.
        assert processes[1 - victim].returncode in (1, -signal.SIGABRT), outputs
    launch(2, cache, "tiny", tmp_path, TWO)
    assert lines(tmp_path) == lines(whole_of_two)


def test_sigterm_to_one_of_two_processes_saves_the_same_step_on_both(cache, whole_of_two, tmp_path):
    processes = start_several(
        2,
        cache,
        "tiny",
        tmp_path,
        TWO,
        "--config.checkpointing.every=0",
        **fault("terminate", 3, 1),
    )
    output, _ = finish(processes)
    (step,) = re.findall(r"preempted after step (\d+), which is saved", output)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [step]
    output = launch(2, cache, "tiny", tmp_path, TWO)
    assert steps_continued([output]) == [int(step)]
    assert lines(tmp_path) == lines(whole_of_two)


def files_of(checkpoint):
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    return files


def test_damaged_and_unfinished_checkpoints_are_skipped_and_named(cache, whole, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "40", checkpoints / "45.orbax-checkpoint-tmp")
    for path in files_of(checkpoints / "40"):  # cut off
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(checkpoints / "35" / "params")  # a part is missing
    output = launch(1, cache, "tiny", workdir)
    assert "checkpoint 45 in" in output and "was never finished: removed" in output
    assert re.search(r"checkpoint 40 in .* is damaged \(.*\): falling back", output)
    assert re.search(r"checkpoint 35 in .* is damaged \(.*\): falling back", output)
    assert steps_continued([output]) == [30]
    assert lines(workdir) == lines(whole)


def test_damage_in_the_files_of_one_process_turns_both_back(cache, whole_of_two, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(whole_of_two, workdir)
    (shard,) = (workdir / "checkpoints" / "40").glob("params/ocdbt.process_1")
    for path in files_of(shard):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    output = launch(2, cache, "tiny", workdir, TWO)
    assert re.search(r"checkpoint 40 in .* is damaged \(.*\): falling back", output)
    assert steps_continued([output]) == [35]
    assert lines(workdir) == lines(whole_of_two)


@contextlib.contextmanager
def little_space(folder):
    """(what a process must run first, the error of its writes) where little fits into `folder`: a
    file system of 2 MB that is all but full or, where this user may not mount one, a limit on the
    size of files."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield limit_files, "too large"
        return
    try:
        yield None, "No space left"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_full_disk_while_saving(cache, whole, tmp_path):
    with little_space(tmp_path) as (first, error):
        workdir, ballast = tmp_path / "run", tmp_path / "ballast"
        shutil.copytree(whole, workdir)
        forget_after(workdir, 30)
        if first is None:
            ballast.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 60_000))
        (output,) = finish([start(cache, "tiny", workdir, preexec_fn=first)], status=1)
        line = f"error: a checkpoint could not be written to {workdir}/checkpoints: .*{error}"
        assert re.match(line, output.splitlines()[-1]), output
        ballast.unlink(missing_ok=True)
        output = launch(1, cache, "tiny", workdir)
        assert steps_continued([output]) == [30]
        assert lines(workdir) == lines(whole)


def test_files_that_may_not_grow_while_saving(cache, whole, tmp_path):
    workdir = tmp_path / "full"
    shutil.copytree(whole, workdir)
    forget_after(workdir, 30)
    process = start(cache, "tiny", workdir, preexec_fn=limit_files)
    (output,) = finish([process], status=1)
    expected = f"error: a checkpoint could not be written to {workdir}/checkpoints: .*too large"
    assert re.fullmatch(expected, output.splitlines()[-1])
    assert finished_checkpoint(workdir) == 30


def test_second_job_in_a_workdir_is_refused(cache, whole, tmp_path):
    # The first one is stopped: it keeps its lock, and uses no time.
    first = start(cache, "tiny", tmp_path)
    for _ in first.stdout:
        if (tmp_path / "config.txt").exists():
            break
    first.send_signal(signal.SIGSTOP)
    try:
        (output,) = finish([start(cache, "tiny", tmp_path)], status=1)
        assert f"in use by process {first.pid} on" in output
        assert "choose another --workdir" in output
        several = finish(start_several(2, cache, "tiny", tmp_path), status=1)
        assert all(f"in use by process {first.pid} on" in output for output in several)
    finally:
        first.send_signal(signal.SIGCONT)
    finish([first])
    assert lines(tmp_path) == lines(whole)


def without_override():
    """Takes the process the right to write where permissions forbid it, which the superuser has."""
    import ctypes

    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def test_read_only_workdir(cache, tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    process = start(cache, "tiny", folder, preexec_fn=without_override)
    (output,) = finish([process], status=1)
    assert f"error: workdir {folder} cannot be used: [Errno 13] Permission denied" in output
    assert "Traceback" not in output


def test_read_only_checkpoints_in_a_writable_workdir(cache, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    forget_after(workdir, 30)
    folder = workdir / "checkpoints"
    folder.chmod(0o555)
    try:
        process = start(cache, "tiny", workdir, preexec_fn=without_override)
        (output,) = finish([process], status=1)
    finally:
        folder.chmod(0o755)
    assert steps_continued([output]) == [30]
    last = output.splitlines()[-1]
    assert re.match(f"error: a checkpoint could not be written to {folder}: .*Permission", last)
    assert finished_checkpoint(workdir) == 30


def test_nan_at_a_step(cache, whole, tmp_path):
    process = start(cache, "tiny", tmp_path, **fault("nan", 13))
    (output,) = finish([process], status=1)
    assert "error: step 13: objective is nan" in output
    assert "last good checkpoint: step 10" in output
    output = launch(1, cache, "tiny", tmp_path)
    assert steps_continued([output]) == [10]
    assert lines(tmp_path) == lines(whole)


def test_input_shard_that_disappears(cache, tmp_path):
    shards = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for number, shard in enumerate(shards):
        texts = [f"document {number} {i} " * 9 for i in range(40)]
        shard.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = "--config.data.sources[0]"
    flags = [f"{source}.kind=files", f"{source}.paths=('{tmp_path}/*.jsonl',)"]
    flags.append("--config.data.shuffle_rows=0")  # documents are read when they are needed
    launch(1, cache, "tiny", tmp_path / "whole", *flags)

    workdir = tmp_path / "parts"
    hidden = {"FAULT": "hide:12:0", "FAULT_FILE": str(shards[1])}
    (output,) = finish([start(cache, "tiny", workdir, *flags, variables=hidden)], status=1)
    assert f"error: [Errno 2] No such file or directory: '{shards[1]}'" in output
    # Without it the order of the documents would be another one.
    (output,) = finish([start(cache, "tiny", workdir, *flags)], status=1)
    assert "error: the data state was saved with" in output
    shards[1].with_suffix(".hidden").rename(shards[1])
    output = launch(1, cache, "tiny", workdir, *flags)
    assert steps_continued([output])[0] >= 5
    assert lines(workdir) == lines(tmp_path / "whole")
