"""Compiles a run for a machine that is not here and says what it needs: memory, FLOPs, time.

python -m blt_jax.compile --config=experiments/blt.py:blt_8b --topology=v5p:4x4x4

Fields of the config are overridden by flags after --config, as in blt_jax.run. TPU topologies
(chip:AxB or AxBxC) need the package libtpu; cuda:N stops at lowering. --program: train (the step
of --part and --phase), prefill or decode. --sweep tries meshes, remat policies and batch sizes.
--estimate=unrolled adds the time from programs of one and two layers without a loop over them.
"""

import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from blt_jax.dist import topology as topologies


def parse(argv: list[str]) -> flags.FlagValues:
    """Parsed flags of a command line (with the program's name); config overrides applied.

    Raises ValueError for unknown files, runs, fields and topologies, flags.Error for wrong types.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "file.py:run", flag_values=values, sys_argv=argv, lock_config=False
    )
    strings = {
        "topology": ("v5p:4x4x4", "chip:AxBxC, or cuda:N"),
        "part": ("", "training of a recipe (blt, entropy_model); default its first"),
        "output": ("", "json file of the report"),
    }
    for name, (default, text) in strings.items():
        flags.DEFINE_string(name, default, text, flag_values=values)
    numbers = {
        "phase": (-1, "phase of the training, -1 for the one with the most steps"),
        "slices": (1, "TPU slices, the data axis across them"),
        "batch": (0, "rows of prefill and decode, 0 for one per device"),
        "length": (0, "tokens of prefill, cache of decode; 0 for those of training"),
    }
    for name, (default, text) in numbers.items():
        flags.DEFINE_integer(name, default, text, flag_values=values)
    programs = ["train", "prefill", "decode"]
    flags.DEFINE_enum("program", "train", programs, "what to compile", flag_values=values)
    flags.DEFINE_enum(
        "estimate",
        "scanned",
        ["scanned", "unrolled"],
        "time of the step by loops times their trip counts, or also from one and two layers",
        flag_values=values,
    )
    flags.DEFINE_bool("sweep", False, "table over meshes, remat, rows", flag_values=values)
    lists = {
        "sweep_data": ("1", "sizes of the mesh axis data that --sweep tries"),
        "sweep_tensor": ("1,2,4", "sizes of the mesh axis tensor"),
        "sweep_remat": ("SAVE_NAMES,FULL", "remat policies"),
        "sweep_rows": ("", "rows per step, those of the run if empty"),
    }
    for name, (default, text) in lists.items():
        flags.DEFINE_list(name, default, text, flag_values=values)
    flags.DEFINE_bool("help", False, "shows this help", short_name="h", flag_values=values)
    if any(argument.lstrip("-") in ("help", "h") for argument in argv[1:]):
        values([argv[0], "--help"])
        return values
    for argument in argv[1:]:
        if argument.startswith("--topology="):
            topologies.set_environment(argument.partition("=")[2])
    topologies.set_environment("v5p")

    from blt_jax.train.launch import check_command_line

    check_command_line(argv[1:])
    rest = values(argv)[1:]
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]!r}")
    tpu = topologies.is_tpu(values.topology)
    if values.estimate == "unrolled" and (values.sweep or values.program != "train" or not tpu):
        raise ValueError(
            "--estimate=unrolled: only for --program=train on a TPU topology, without --sweep"
        )
    return values


def run(values: flags.FlagValues) -> None:
    """Compiles what the flags say; prints the report and writes it to --output."""
    from blt_jax.recipes import programs
    from blt_jax.train import compilation
    from blt_jax.train.sweep import format_sweep, sweep

    def mesh(config):
        return topologies.mesh(values.topology, config, values.slices)

    if values.sweep:
        _, config = compilation.select_part(values.config, values.part)
        phase = compilation.select_phase(config, values.phase)
        numbers = sweep(config, phase, values.topology, mesh, _sweep_axes(values), print)
        print(format_sweep(numbers))
    else:
        try:
            numbers = compilation.report(programs.make_job(values, mesh), values.topology)
        except compilation.DoesNotFitError as error:
            numbers = {"topology": values.topology, "problem": str(error)}
            if values.output:
                compilation.write_report(numbers, values.output)
            raise
        if values.estimate == "unrolled":
            numbers["unrolled_estimate"] = _unrolled_estimate(values, mesh)
        print(compilation.format_report(numbers))
    if values.output:
        compilation.write_report(numbers, values.output)


def _unrolled_estimate(values: flags.FlagValues, mesh: Callable) -> dict:
    from blt_jax.train import compilation, unrolled

    _, config = compilation.select_part(values.config, values.part)
    phase = compilation.select_phase(config, values.phase)
    return unrolled.unrolled_estimate(config, phase, mesh(values.config.mesh))


def _sweep_axes(values: flags.FlagValues):
    from blt_jax.layers.transformer import Remat
    from blt_jax.train.sweep import Axes

    def numbers(name):
        return tuple(int(text) for text in getattr(values, name))

    unknown = set(values.sweep_remat) - set(Remat.__members__)
    if unknown:
        raise ValueError(
            f"--sweep_remat={unknown.pop()}: allowed are {', '.join(Remat.__members__)}"
        )
    return Axes(
        data=numbers("sweep_data"),
        tensor=numbers("sweep_tensor"),
        remat=tuple(Remat[name] for name in values.sweep_remat),
        rows=numbers("sweep_rows"),
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if the program does not fit, 2 for a wrong command
    line."""
    argv = list(sys.argv if argv is None else argv)
    try:
        values = parse(argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        from blt_jax.train import configs

        configs.validate(values.config)
        run(values)
    except MemoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
