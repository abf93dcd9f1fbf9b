"""The launcher's work: experiment files, checked overrides, running a config in a workdir."""

import dataclasses
import importlib.util
import inspect
import os
import pathlib
import re
import time
import types
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from blt_jax.dist.mesh import make_mesh
from blt_jax.train import configs
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.pretraining import Experiment, Pretraining, make_context, trainings
from blt_jax.train.workdir import claim_workdir, locked_workdir


def load_experiment_file(path: str | pathlib.Path) -> types.ModuleType:
    """The module of an experiment file; ValueError if it is not one."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"experiment file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"experiment file {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("RUNS", "get_config"):
        if not hasattr(module, name):
            raise ValueError(f"experiment file {str(path)!r} does not define {name}")
    return module


def list_runs(directory: str | pathlib.Path) -> str:
    """One line per run of every experiment file: `file.py:run` and its docstring's first line."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"--experiments_dir={directory}: no such directory")
    rows = []
    for path in sorted(directory.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        for function in load_experiment_file(path).RUNS:
            first, *_ = (inspect.getdoc(function) or "(no docstring)").splitlines()
            rows.append((f"{path}:{function.__name__}", first))
    if not rows:
        raise ValueError(f"--experiments_dir={directory}: no experiment file in it")
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {first}" for name, first in rows)


def split_config(value: str) -> tuple[str, str | None]:
    """`file.py:run` as (file, run); run is None where it is not given."""
    path, colon, run = value.rpartition(":")
    return (path, run) if colon and path.endswith(".py") else (value, None)


def config_value(argv: list[str]) -> str | None:
    """Value of the last --config in a command line, None if there is none."""
    value = None
    for index, argument in enumerate(argv):
        if re.fullmatch(r"--?config", argument) and index + 1 < len(argv):
            value = argv[index + 1]
        elif match := re.match(r"--?config=(.*)", argument, re.DOTALL):
            value = match.group(1)
    return value


def check_command_line(argv: list[str]) -> None:
    """ValueError for an unknown file, run or field, naming what is allowed.

    The flag parser itself answers such mistakes with a traceback or less.
    """
    value = config_value(argv)
    if not value:
        raise ValueError("--config=<experiment file>.py:<run> is missing; --list shows the runs")
    path, run = split_config(value)
    module = load_experiment_file(path)
    names = [function.__name__ for function in module.RUNS]
    if run is not None and run not in names:
        raise ValueError(f"{path} has no run {run!r}; its runs are {', '.join(names)}")
    config = module.get_config() if run is None else module.get_config(run)
    for argument in argv:
        if match := re.match(r"--?(no)?config\.([^=]+)", argument):
            negated, name = match.groups()
            configs.check_path(config, name)
            del negated


def checkpoint_flags(config: Experiment, bucket: str) -> str:
    """The flags that have every training of an experiment save in a bucket, each in its folder."""
    names = ["" if name == "." else name for name in trainings(config)]
    return "".join(
        f" --config.{name}{'.' if name else ''}checkpointing.directory={bucket.rstrip('/')}/"
        f"{name or 'checkpoints'}"
        for name in names
    )


def set_profile(config: Any, steps: str) -> None:
    """Has every training of a config tree traced by the profiler, for the steps `10:13`.

    Steps count from 0 at the start of this process; 10:13 are three. Raises ValueError for
    another form.
    """
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--profile_steps={steps}: must be first:last+1, as 10:13")
    for logging in _parts(config, LoggingConfig):
        logging.profile_start = int(match[1])
        logging.profile_steps = int(match[2]) - int(match[1])


def _parts(config: Any, kind: type) -> Iterator[Any]:
    """Every config of this class in a config tree."""
    if isinstance(config, kind):
        yield config
    if isinstance(config, tuple):
        for item in config:
            yield from _parts(item, kind)
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _parts(getattr(config, field.name), kind)


def use_compile_cache() -> str:
    """Keeps compiled programs for later runs; returns the folder, "" if the user has it off.

    `JAX_COMPILATION_CACHE_DIR` wins (an empty value is off); otherwise `blt_jax/compiled` in the
    user's cache folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(root) / "blt_jax" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Runs have dozens of small programs, which together take as long as the step.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return jax.config.jax_compilation_cache_dir or ""


def checked_mesh(experiment: Experiment, mesh: Mesh | None = None) -> Mesh:
    """The given mesh or, for None, the one of the config over all devices.

    Raises ValueError for a config that is not valid, and where the rows or parameters of one of
    its trainings cannot be divided over the mesh.
    """
    configs.validate(experiment)
    if not isinstance(experiment, Experiment):
        raise TypeError(f"a run's config must be an Experiment, not {type(experiment).__name__}")
    mesh = make_mesh(experiment.mesh) if mesh is None else mesh
    for training in _parts(experiment, Pretraining):
        training.check_mesh(mesh)
    return mesh


def run_experiment(
    experiment: Experiment, workdir: str | pathlib.Path, mesh: Mesh | None = None
) -> dict[str, float]:
    """Runs a config in `workdir`: numbers, results.json and report.html.

    Raises ValueError as `checked_mesh`, WorkdirError if the workdir holds another configuration or
    another job runs in it.
    """
    mesh = checked_mesh(experiment, mesh)
    with locked_workdir(workdir):
        return _run(experiment, pathlib.Path(workdir), mesh)


def _run(experiment: Experiment, workdir: pathlib.Path, mesh: Mesh) -> dict[str, float]:
    from blt_jax.train.report import write_report

    started = time.perf_counter()
    claim_workdir(workdir, experiment)
    context = make_context(workdir, mesh, jax.random.key(experiment.seed))
    context.claimed = True
    try:
        numbers = experiment.run(context)
        context.writer.results(numbers, experiment, time.perf_counter() - started)
        if jax.process_index() == 0:
            write_report(workdir)
    finally:
        context.writer.close()
    return numbers


def format_numbers(numbers: dict[str, Any]) -> str:
    """One `name value` line per number."""
    width = max((len(name) for name in numbers), default=0)
    return "\n".join(
        f"  {name:<{width}}  {value:.6g}"
        if isinstance(value, float)
        else f"  {name:<{width}}  {value}"
        for name, value in numbers.items()
    )
