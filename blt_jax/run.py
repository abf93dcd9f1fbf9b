"""Runs an experiment: python -m blt_jax.run --config=experiments/blt.py:tiny --workdir=runs/blt

Fields of the config are overridden by flags, --config.model.num_layers=4, after --config. The
same command again continues the run where it stopped. --list shows every run there is.
"""

import signal
import sys
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


def run(values: flags.FlagValues) -> dict[str, float]:
    """Runs the parsed config in its workdir and prints its numbers."""
    from blt_jax.train import launch

    numbers = launch.run_experiment(values.config, values.workdir)
    print(f"{launch.format_numbers(numbers)}\nresults, figures and report.html in {values.workdir}")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, also after SIGTERM, 1 for an error of the run, 2
    for a wrong command line.

    argv: program name and arguments, None for those of this process, which then also joins its
    cluster if there is one.
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
        if not values.workdir:
            raise ValueError("--workdir=<folder of the run> is missing")
        from blt_jax.train import configs

        configs.validate(values.config)
    except (ValueError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from blt_jax.dist import multihost
    from blt_jax.train.checkpoint import WorkdirError
    from blt_jax.train.loop import NonFiniteError, Preempted

    if is_program:
        multihost.initialize()
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        run(values)
    except Preempted as stop:
        print(stop, flush=True)
    except (WorkdirError, MemoryError, NonFiniteError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, former)
    return 0


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main())
