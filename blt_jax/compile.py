"""Compiles a run for a machine that is not here and says what it needs: memory, FLOPs, time.

python -m blt_jax.compile --config=experiments/blt.py:blt_8b --topology=v5p:4x4x4

Fields of the config are overridden by flags after --config, as in blt_jax.run. TPU topologies
(chip:AxB or AxBxC) need the package libtpu; cuda:N stops at lowering. --program: train (the step
of every training of the run, or of --part), prefill or decode. --sweep tries meshes, remat policies
and batch sizes of one training.
--estimate=unrolled adds the time from programs of one and two layers without a loop over them.
"""

import sys

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
        "part": ("", "training of a recipe (blt, entropy_model); default all of them"),
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
        "sweep_expert": ("", "sizes of the mesh axis expert, that of the run if empty"),
        "sweep_context": ("", "sizes of the mesh axis context, that of the run if empty"),
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
    _check(values)
    return values


def _check(values: flags.FlagValues) -> None:
    """ValueError for flags that do not fit each other."""
    tpu, train = topologies.is_tpu(values.topology), values.program == "train"
    if values.slices < 1:
        raise ValueError(f"--slices={values.slices}: must be >= 1")
    if values.slices > 1 and not tpu:
        raise ValueError(
            f"--slices={values.slices}: only for TPU topologies, not {values.topology}"
        )
    for name in ("batch", "length"):
        number = getattr(values, name)
        if number < 0:
            raise ValueError(f"--{name}={number}: must be >= 0")
        if number and train:
            raise ValueError(
                f"--{name}={number}: only for --program=prefill and decode; a training's rows are "
                "--config.data.batch_size and sequence_length"
            )
    if values.sweep and not (train and tpu):
        raise ValueError("--sweep: only for --program=train on a TPU topology")
    if values.estimate == "unrolled" and (values.sweep or not (train and tpu)):
        raise ValueError(
            "--estimate=unrolled: only for --program=train on a TPU topology, without --sweep"
        )


def run(values: flags.FlagValues) -> None:
    """Compiles what the flags say; prints the reports and writes them to --output: one, or a dict
    of them by training.

    Raises DoesNotFitError after the last one if any does not fit.
    """
    from blt_jax.recipes import programs
    from blt_jax.train import compilation, unrolled
    from blt_jax.train.sweep import format_sweep, parse_axes, sweep

    def mesh(config):
        return topologies.mesh(values.topology, config, values.slices)

    names = _parts(values)
    if values.sweep:
        _, config = compilation.select_part(values.config, names[0])
        phase = compilation.select_phase(config, values.phase)
        base = values.config.mesh
        numbers = sweep(config, phase, values.topology, base, mesh, parse_axes(values), print)
        print(format_sweep(numbers))
        if values.output:
            compilation.write_report(numbers, values.output)
        return
    if values.batch:
        _, config = compilation.select_part(values.config, names[0])
        compilation.check_batch(values.batch, mesh(values.config.mesh), config.sharding)
    found, problems = {}, []
    for name in names:
        values.part = name
        label = "" if name == "." else f"{name}: "
        try:
            numbers = compilation.report(programs.make_job(values, mesh), values.topology)
        except compilation.DoesNotFitError as error:
            problems.append(f"{label}{error}")
            found[name] = compilation.made(values.topology) | {"problem": str(error)}
            continue
        if values.estimate == "unrolled":
            _, config = compilation.select_part(values.config, name)
            phase = compilation.select_phase(config, values.phase)
            layers = unrolled.unrolled_estimate(config, phase, mesh(values.config.mesh))
            numbers["unrolled_estimate"] = layers
        print(f"{label}{compilation.format_report(numbers)}")
        found[name] = numbers
    if values.output:
        compilation.write_report(found if len(names) > 1 else found[names[0]], values.output)
    if problems:
        raise compilation.DoesNotFitError("\nerror: ".join(problems))


def _parts(values: flags.FlagValues) -> list[str]:
    """The trainings that are compiled: that of --part, or all of them; for a sweep, prefill and
    decode the first one, which is printed."""
    from blt_jax.train.pretraining import trainings

    if values.part:
        return [values.part]
    names = list(trainings(values.config)) or [""]
    if values.program == "train" and not values.sweep:
        return names
    if len(names) > 1:
        print(f"only {names[0]}; --part chooses among {', '.join(names)}")
    return names[:1]


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
