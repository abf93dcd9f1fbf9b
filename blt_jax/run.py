"""Runs an experiment: python -m blt_jax.run --config=experiments/blt.py:tiny --workdir=runs/blt

Fields of the config are overridden by flags, --config.model.num_layers=4, after --config. The
same command again continues the run where it stopped. --list shows every run there is.

On several processes the same command is started in each: a TPU pod, SLURM and Open MPI 4
are recognised, elsewhere --coordinator=host:port --num_processes=4 --process_id=0 (to 3) say it.
"""

import os
import signal
import sys
import traceback
from typing import Any

from absl import flags
from ml_collections import config_flags

from blt_jax.dist.huge_pages import use_huge_pages


def parse(argv: list[str]) -> flags.FlagValues:
    """Parsed flags of a command line (with the program's name); config overrides applied.

    Raises ValueError for unknown files, runs and fields, flags.Error for values of a wrong type.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "experiment file and run: file.py:run",
        flag_values=values,
        sys_argv=argv,
        lock_config=False,
    )
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool("list", False, "lists the runs of all experiments", flag_values=values)
    flags.DEFINE_string("experiments_dir", "experiments", "where --list looks", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of this run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process", flag_values=values)
    flags.DEFINE_string(
        "profile_steps", None, "steps to profile, as 10:13; see docs/launch", flag_values=values
    )
    flags.DEFINE_bool("help", False, "shows this help", short_name="h", flag_values=values)
    if not any(argument.lstrip("-") in ("list", "help", "h") for argument in argv[1:]):
        from blt_jax.train.launch import check_command_line

        check_command_line(argv[1:])
    rest = values(argv)[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")
    return values


def _terminate(number: int, frame: Any) -> None:
    # Outside of the training loop, which saves first, there is nothing to save.
    print("stopped by SIGTERM; run the same command again to continue", flush=True)
    sys.exit(0)


def run(values: flags.FlagValues, mesh: Any = None) -> dict[str, float]:
    """Runs the parsed config in its workdir and prints its numbers. mesh: None for its own."""
    import jax

    from blt_jax.train import launch

    numbers = launch.run_experiment(values.config, values.workdir, mesh)
    if jax.process_index() == 0:
        print(launch.format_numbers(numbers))
        print(f"results, figures and report.html in {values.workdir}", flush=True)
    return numbers


def _check(values: flags.FlagValues) -> None:
    """ValueError for flags that do not fit each other; applies those that change the config."""
    from blt_jax.dist import multihost
    from blt_jax.train import configs, launch

    if not values.workdir:
        raise ValueError("--workdir=<folder of the run> is missing")
    if "://" in values.workdir:
        raise ValueError(
            f"--workdir={values.workdir}: must be a local or mounted folder; checkpoints may lie "
            f"in a bucket{launch.checkpoint_flags(values.config, values.workdir)}"
        )
    multihost.check_cluster(values.coordinator, values.num_processes, values.process_id)
    if values.profile_steps is not None:
        launch.set_profile(values.config, values.profile_steps)
    configs.validate(values.config)


def _join_cluster(values: flags.FlagValues) -> None:
    import jax

    from blt_jax.dist import multihost
    from blt_jax.train.launch import use_compile_cache

    multihost.initialize(values.coordinator, values.num_processes, values.process_id)
    folder = use_compile_cache()
    if jax.process_index() == 0:
        print(f"compiled programs are kept in {folder}" if folder else "no compile cache")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, also after SIGTERM, 1 for an error of the run, 2
    for a wrong command line or a config that does not fit the devices.

    argv: program name and arguments, None for those of this process, which then also joins its
    cluster if there is one and keeps compiled programs for the next run.
    """
    is_program, argv = argv is None, list(sys.argv if argv is None else argv)
    try:
        values = parse(argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.list:
            from blt_jax.train.launch import list_runs

            print(list_runs(values.experiments_dir))
            return 0
        _check(values)
        if is_program:
            _join_cluster(values)
        from blt_jax.train.launch import checked_mesh

        mesh = checked_mesh(values.config)
    except (ValueError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _guarded_run(values, mesh)


def _guarded_run(values: flags.FlagValues, mesh: Any) -> int:
    """`run`; errors that a user can act upon are one line, and the exit status 1."""
    import jax

    from blt_jax.data.packing import DataStateError
    from blt_jax.train.loop import NonFiniteError, Preempted
    from blt_jax.train.workdir import WorkdirError

    # On several processes jax listens to SIGTERM, so that all of them stop at one step.
    alone = jax.process_count() == 1
    former = signal.signal(signal.SIGTERM, _terminate) if alone else None
    try:
        run(values, mesh)
    except Preempted as stop:
        if jax.process_index() == 0:
            print(stop, flush=True)
    except (WorkdirError, DataStateError, MemoryError, NonFiniteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if alone or "peer" not in str(error):
            raise
        print(
            f"error: another process of this run ended; start all again ({error})", file=sys.stderr
        )
        return 1
    finally:
        if alone:
            signal.signal(signal.SIGTERM, former)
    return 0


def _program() -> int:
    """`main`; a process that fails ends at once: other processes of the run would wait for it, and
    so would it for the threads of a save that failed, which print after its error."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(_program())
