"""The launcher's work: experiment files, checked overrides, running a config in a workdir."""

import importlib.util
import inspect
import pathlib
import re
import time
import types
from typing import Any

import jax
from jax.sharding import Mesh

from blt_jax.dist.mesh import make_mesh
from blt_jax.train import configs
from blt_jax.train.checkpoint import claim_workdir
from blt_jax.train.pretraining import Experiment, make_context


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


def run_experiment(
    experiment: Experiment, workdir: str | pathlib.Path, mesh: Mesh | None = None
) -> dict[str, float]:
    """Runs a validated config in `workdir`: numbers, results.json and report.html.

    Raises ValueError if the workdir holds another configuration.
    """
    from blt_jax.train.report import write_report

    started = time.perf_counter()
    configs.validate(experiment)
    if not isinstance(experiment, Experiment):
        raise TypeError(f"a run's config must be an Experiment, not {type(experiment).__name__}")
    workdir = pathlib.Path(workdir)
    claim_workdir(workdir, experiment)
    mesh = make_mesh(experiment.mesh) if mesh is None else mesh
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
