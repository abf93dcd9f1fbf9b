"""The folder of a run: one configuration, one job at a time."""

import contextlib
import datetime
import errno
import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax

from blt_jax.dist.multihost import text_of_first
from blt_jax.train import configs


class WorkdirError(ValueError):
    """The workdir holds another configuration, is in use, or cannot be written."""


def claim_workdir(workdir: str | pathlib.Path, config: Any) -> None:
    """Writes `config.txt`, or checks that the one there is of the same configuration.

    Process 0 does so for all. Raises WorkdirError listing the fields that differ, on every
    process; fields that do not change what is computed (mesh, sharding, logging, checkpointing)
    may differ.
    """
    _on_first(lambda: _write_config(pathlib.Path(workdir), config), workdir)


@contextlib.contextmanager
def locked_workdir(workdir: str | pathlib.Path) -> Iterator[None]:
    """Keeps other jobs out of the workdir while the body runs; made if it does not exist.

    The lock of the file `.lock` is held by process 0 and ends with it, however it ends; shared
    folders hold it too where they support locks (NFS does). Raises WorkdirError on every process
    of a second job.
    """
    files: list[TextIO] = []
    try:
        _on_first(lambda: files.append(_lock(pathlib.Path(workdir))), workdir)
        yield
    finally:
        for file in files:
            file.close()


def _on_first(action: Callable[[], None], workdir: str | pathlib.Path) -> None:
    """Does the action on process 0; its failure is raised everywhere, so that nobody waits."""
    problem = ""
    if jax.process_index() == 0:
        try:
            action()
        except WorkdirError as error:
            problem = str(error)
        except OSError as error:
            problem = f"workdir {workdir} cannot be used: {error}"
    problem = text_of_first(problem)
    if problem:
        raise WorkdirError(problem)


def _write_config(workdir: pathlib.Path, config: Any) -> None:
    path = workdir / "config.txt"
    if path.exists():
        lines = configs.differences(configs.from_text(path.read_text()), configs.flatten(config))
        if lines:
            raise WorkdirError(
                f"workdir {workdir} holds a run of another configuration; choose another "
                f"--workdir or remove it. Fields that differ:\n  " + "\n  ".join(lines)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(configs.to_text(config))
    partial.replace(path)


def _lock(workdir: pathlib.Path) -> TextIO:
    import fcntl

    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            holder = file.read().strip() or "another job"
            file.close()
            raise WorkdirError(
                f"workdir {workdir} is in use by {holder}: stop it or choose another --workdir"
            ) from None
        print(f"{workdir} cannot be locked ({error}): take care to start no second run in it")
        return file
    file.truncate(0)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} on {platform.node()} since {now}\n")
    file.flush()
    return file
