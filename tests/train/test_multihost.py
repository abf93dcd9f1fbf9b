"""One run on one, two and four processes of this machine, started by the real launcher."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from blt_jax.dist import multihost
from tests.train.launched import ROOT, environment, finish, forget_after, free_port, launch, lines

KEEP = "--config.checkpointing.keep=9"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run `tiny` on one process, to its end."""
    workdir = tmp_path_factory.mktemp("whole")
    launch(1, cache, "tiny", workdir, KEEP)
    return workdir


def assert_close(first, second):
    assert len(lines(first)) == len(lines(second))
    for a, b in zip(lines(first), lines(second), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, err_msg=str(a))


def test_resumed_on_other_numbers_of_processes(cache, whole, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    for count, step, mesh in (
        # Nothing divides the batch here: both processes hold all of its rows.
        (2, 10, "--config.mesh.tensor=2"),
        (4, 20, "--config.mesh.fsdp=2"),
        (1, 25, "--config.mesh.fsdp=1"),
        (2, 30, "--config.mesh.fsdp=1"),
    ):
        forget_after(moved, step)
        output = launch(count, cache, "tiny", moved, mesh, KEEP)
        assert f"continuing from the checkpoint of step {step}" in output
        assert_close(whole, moved)


def test_blt_of_one_process_continues_on_four_and_on_two(cache, tmp_path):
    one, moved = tmp_path / "one", tmp_path / "moved"
    launch(1, cache, "tiny_blt", one)
    shutil.copytree(one, moved)
    for count, step, mesh in ((4, 2, "--config.mesh.fsdp=2"), (2, 4, "--config.mesh.fsdp=1")):
        forget_after(moved, step)
        output = launch(count, cache, "tiny_blt", moved, mesh)
        assert f"devices: {count} x cpu" in output
        assert f"continuing from the checkpoint of step {step}" in output
        assert_close(one, moved)


def python(code, cache, **variables):
    """A process that runs the code, told of no cluster but by the variables."""
    unset = dict.fromkeys(multihost.PROCESS_COUNTS)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(cache, **(unset | variables)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


ALONE = """
import os
from blt_jax.dist import multihost
print(multihost.initialize())
os.environ["PMI_SIZE"] = "1"
print(multihost.initialize())
for name in multihost.PROCESS_COUNTS:  # as Open MPI 5, other MPI, and SLURM without srun set them
    os.environ[name] = "2"
    try:
        print(multihost.initialize())
    except ValueError as error:
        print(error)
    del os.environ[name]
"""


def test_a_lone_host_is_not_an_error_but_a_process_of_an_unknown_cluster_is(cache):
    (output,) = finish([python(ALONE, cache)])
    first, second, *errors = output.splitlines()
    assert (first, second) == ("False", "False")
    for name, error in zip(multihost.PROCESS_COUNTS, errors, strict=True):
        assert error.startswith(f"{name}=2: a launcher started several processes")
        assert "give --coordinator, --num_processes and --process_id" in error


def test_processes_of_open_mpi_4_find_each_other(cache):
    code = (
        "from blt_jax.dist import multihost; import jax; print(multihost.initialize(), "
        "multihost.gather(f'process {jax.process_index()} of {jax.process_count()}'))"
    )
    uri = "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911"
    variables = {
        "OMPI_MCA_orte_hnp_uri": uri,
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),  # otherwise of the number of the job
    }
    outputs = finish(
        [
            python(
                code,
                cache,
                **variables,
                OMPI_COMM_WORLD_RANK=rank,
                OMPI_COMM_WORLD_LOCAL_RANK=rank,
            )
            for rank in "01"
        ]
    )
    for output in outputs:
        assert output.splitlines()[-1] == "True ['process 0 of 2', 'process 1 of 2']"


def test_other_errors_of_the_start_are_not_hidden(monkeypatch):
    def fail(*arguments):
        raise ValueError("process_id is out of range")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match="out of range"):
        multihost.initialize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--num_processes, --process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("host", 2, 0), "--coordinator=host: must be host:port"),
        (("host:1", 0, 0), "--num_processes=0"),
        (("host:1", 2, 2), r"--process_id=2: must be in 0\.\.1"),
    ],
)
def test_flags_of_the_cluster_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        multihost.initialize(*arguments)
