"""Compiles a run's real programs for devices that are not here, and says what they need.

Memory and collectives are those of the compiled program. The time is an estimate, a roofline:
matrix products (attention kernels included) at the chip's peak or memory bandwidth, whichever
takes longer, everything else at memory bandwidth, collectives at the bandwidth of all links of a
chip; all from the maker's data sheet. Nothing was measured on a device.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from blt_jax.dist.sharding import ShardingRules, sharding_report
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.layers.tpu_attention import splash_flops
from blt_jax.train import flops as flops_lib
from blt_jax.train import state as state_lib
from blt_jax.train.hlo import Program
from blt_jax.train.memory import bytes_per_device
from blt_jax.train.optimizer import make_optimizer
from blt_jax.train.pretraining import Experiment, Phase, Pretraining, trainings
from blt_jax.train.step import batch_sharding, check_rows, make_train_step, row_parts


class DoesNotFitError(MemoryError):
    """The program needs more memory than a device has; the message names the nearest lever."""


@dataclasses.dataclass
class Job:
    """A program to compile: `function(*arguments)` with shapes and shardings, state donated.

    sizes: bytes per device of the parts of the arguments. model_flops: of one run, over all
    devices; tokens: processed by one run.
    """

    function: Callable
    arguments: tuple
    out_shardings: Any
    donated: tuple[int, ...]
    mesh: Mesh | AbstractMesh
    sizes: dict[str, int]
    model_flops: float
    tokens: int
    model: Model
    levers: tuple[str, ...] = ()


def select_part(experiment: Experiment, name: str = "") -> tuple[str, Pretraining]:
    """The training named `name` inside an experiment (its first one if ""), with its path.

    Raises ValueError naming the parts there are.
    """
    parts = trainings(experiment)
    if not parts:
        raise ValueError(
            f"--config: {type(experiment).__name__} has no training of its own to compile"
        )
    name = name or next(iter(parts))
    if name not in parts:
        raise ValueError(f"--part={name}: the trainings of this run are {', '.join(parts)}")
    return "" if name == "." else f"{name}.", parts[name]


def select_phase(config: Pretraining, index: int = -1) -> Phase:
    """Phase `index`, or for -1 the one with the most steps; ValueError for another number."""
    phases = config.all_phases
    if index == -1:
        return max(phases, key=lambda phase: phase.steps)
    if not 0 <= index < len(phases):
        raise ValueError(f"--phase={index}: the run has phases 0..{len(phases) - 1}")
    return phases[index]


def batch_shapes(
    config: Pretraining, phase: Phase, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the step of a phase reads: arrays [accumulation, rows, length] as the loader makes."""
    data, parts = config.phase_data(phase), config.phase_accumulation(phase)
    sharding = batch_sharding(mesh, config.sharding)
    check_rows(data.batch_size, parts, sharding)
    shape = (parts, data.batch_size // parts, data.sequence_length)
    names = ("tokens", "targets", "segment_ids", "positions", "target_bytes")
    types = dict.fromkeys(names, jnp.int32) | {"target_mask": jnp.bool_}
    shapes = {name: (shape, dtype) for name, dtype in types.items()}
    if data.max_patches:
        shapes["starts"] = (*shape[:2], shape[2] + 1), jnp.bool_
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def check_batch(rows: int, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> None:
    """ValueError if the rows of prefill or decode cannot be divided over the devices."""
    parts = row_parts(batch_sharding(mesh, rules))
    if rows % parts:
        raise ValueError(f"--batch={rows}: must be a multiple of {parts}, the devices along rows")


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStruct that carry shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def train_job(
    config: Pretraining, phase: Phase, mesh: Mesh | AbstractMesh, prefix: str = ""
) -> Job:
    """The train step of a phase, as `Pretraining.fit` makes it."""
    model = (phase.model or config.model).build(config.sharding)
    shapes = state_lib.abstract_params(model)
    optimizer = make_optimizer(config.optimizer, shapes, config.learning_rate)
    averaging = config.placed_averaging
    abstract = state_lib.abstract_state(model, optimizer, averaging)
    shardings = state_lib.state_shardings(model, optimizer, abstract, mesh)
    batch = batch_shapes(config, phase, mesh)
    step = make_train_step(model.loss, optimizer, config.optimizer, config.learning_rate, averaging)
    tokens = batch["tokens"].size
    length = config.phase_data(phase).sequence_length
    sizes = {
        "parameters": bytes_per_device(abstract.params, shardings.params),
        "optimizer": bytes_per_device(abstract.opt_state, shardings.opt_state),
        "average": bytes_per_device(abstract.average, shardings.average),
        "batch": bytes_per_device(batch, jax.tree.map(lambda x: x.sharding, batch)),
    }
    return Job(
        function=step,
        arguments=(placed(abstract, shardings), batch),
        out_shardings=(shardings, None),
        donated=(0,),
        mesh=mesh,
        sizes=sizes,
        model_flops=3.0 * model.flops_per_token(length) * tokens,
        tokens=tokens,
        model=model,
        levers=_levers(config, phase, mesh, prefix),
    )


def stacks_of(model: ModelConfig) -> list[tuple[tuple[str, ...], Any]]:
    """The parts of a model config that have a remat policy, itself included, with their path."""
    parts = [((), model)]
    parts += [((field.name,), getattr(model, field.name)) for field in dataclasses.fields(model)]
    return [(name, part) for name, part in parts if hasattr(part, "remat")]


def replace_stacks(model: ModelConfig, changes: dict[tuple[str, ...], dict]) -> ModelConfig:
    """A copy with other values of fields in the parts of these paths (see `stacks_of`)."""
    changed = {}
    for name, values in changes.items():
        if name:
            values = {name[0]: dataclasses.replace(getattr(model, name[0]), **values)}
        changed |= values
    return dataclasses.replace(model, **changed)


def _levers(
    config: Pretraining, phase: Phase, mesh: Mesh | AbstractMesh, prefix: str
) -> tuple[str, ...]:
    """What lowers the activations, nearest first, in the words of the command line."""
    from blt_jax.layers.transformer import Remat

    stacks = {
        ".".join(("model", *name)): part for name, part in stacks_of(phase.model or config.model)
    }
    largest = max(stacks, key=lambda name: stacks[name].num_layers * stacks[name].d_model)
    levers = []
    if stacks[largest].remat is not Remat.FULL:
        levers.append(f"store less: --config.{prefix}{largest}.remat=FULL")
    data, parts = config.phase_data(phase), config.phase_accumulation(phase)
    sharding = batch_sharding(mesh, config.sharding)
    rows = data.batch_size // parts
    own = sharding.shard_shape((1, rows))[1]
    if own > 1:
        levers.append(
            f"fewer rows at once: --config.{prefix}accumulation={parts * own} gives each device "
            f"1 row of {data.sequence_length} tokens instead of {own}"
        )
    levers.append("divide rows or heads: more devices along the mesh axes context or tensor")
    return tuple(levers)


def _kind(mesh: Mesh | AbstractMesh) -> str:
    return mesh.abstract_mesh.abstract_device.device_kind


def _on(mesh: Mesh | AbstractMesh):
    if isinstance(mesh, AbstractMesh):
        return jax.sharding.use_abstract_mesh(mesh)
    return jax.set_mesh(mesh)


def program_flops(job: Job) -> tuple[float, bool]:
    """FLOPs of all matrix products of one run over all devices, recomputation included, and whether
    they are exact: a loop whose length depends on data is counted once."""

    def count(trips: int | None) -> float:
        with _on(job.mesh):
            return flops_lib.count_flops(
                job.function, *job.arguments, while_trips=trips, kernel_flops=splash_flops
            )

    try:
        return count(None), True
    except flops_lib.UnknownLengthError:
        return count(1), False


@contextlib.contextmanager
def _cache_off() -> Iterator[None]:
    # An entry of the persistent cache cannot be loaded without the device.
    former = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", former)


def compile_job(job: Job) -> tuple[Any, str, float]:
    """The compiled program, its optimised text, and the seconds it took.

    Raises DoesNotFitError where the compiler says that a device's memory does not suffice.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(job.mesh), _cache_off():
        jitted = jax.jit(job.function, donate_argnums=job.donated, out_shardings=job.out_shardings)
        # The text of a compiled TPU program cannot always be made from the executable.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = jitted.lower(*job.arguments).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or "Vmem" in str(error):
                raise  # the latter: of one kernel, which no layout changes
            raise DoesNotFitError(_does_not_fit(job, str(error))) from error
        texts = list(pathlib.Path(folder).glob("*.after_optimizations.txt"))
        text = max(texts, key=lambda path: path.stat().st_size).read_text()
    return compiled, text, time.perf_counter() - started


def _does_not_fit(job: Job, message: str) -> str:
    return advice(job, f"does not fit on {_kind(job.mesh)}: {memory_wanted(message)}")


def memory_wanted(message: str) -> str:
    """What a program needs of what there is, in the words of libtpu's out-of-memory message."""
    used = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT])", message)
    if used:
        return f"{used.group(1)} of {used.group(2)}"
    alone = r"HLO temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
    if found := re.search(alone, message):
        return f"temporaries alone {found.group(1)} of {found.group(2)}"
    return message.splitlines()[0][:300]


def advice(job: Job, reason: str) -> str:
    """A message that says what is large and the nearest lever against it."""
    chip = flops_lib.chip(_kind(job.mesh))
    sizes = dict(job.sizes)
    if "optimizer" in sizes:
        sizes["gradients"] = sizes["parameters"]
    listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items() if size)
    if chip and chip.memory and sum(sizes.values()) > 0.6 * chip.memory:
        lever = "these alone take most of it: more devices along the mesh axes fsdp or tensor"
    else:
        lever = "; then ".join(job.levers)
    return f"{reason}. Per device: {listed}; the rest is temporaries. Lever: {lever}."


def made(topology: str) -> dict[str, Any]:
    """How a report came about: topology, date, versions of the compilers."""
    versions = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "topology": topology,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def report(job: Job, topology: str) -> dict[str, Any]:
    """Compiles a job (lowers it, if its devices are abstract) and gives its report for json.

    Raises DoesNotFitError if its arguments or its peak exceed the memory of a chip.
    """
    kind = _kind(job.mesh)
    chip, needed = flops_lib.chip(kind), sum(job.sizes.values())
    if chip and chip.memory and needed > chip.memory:
        reason = f"{needed / 1e9:.1f} GB of {chip.memory / 1e9:.0f} GB before anything is computed"
        raise DoesNotFitError(advice(job, f"does not fit on {kind}: {reason}"))
    counted, exact = program_flops(job)
    numbers = made(topology) | {
        "device": kind,
        "devices": job.mesh.size,
        "mesh": dict(job.mesh.shape),
        "bytes_per_device": dict(job.sizes),
        "tokens": job.tokens,
        "flops": {"model": job.model_flops, "program": counted, "exact": exact},
        "parameters": sharding_report(job.model, job.mesh),
    }
    if isinstance(job.mesh, AbstractMesh):
        numbers["bytes_per_device"] |= {"arguments": needed, "memory": int(chip.memory)}
        return numbers | _lowered(job, counted)
    compiled, text, seconds = compile_job(job)
    memory = _memory(compiled)
    numbers["bytes_per_device"] |= memory
    if chip and chip.memory:
        numbers["bytes_per_device"]["memory"] = int(chip.memory)
        if memory["peak"] > chip.memory:
            reason = f"does not fit: {memory['peak'] / 1e9:.1f} GB of {chip.memory / 1e9:.0f} GB"
            raise DoesNotFitError(advice(job, reason))
    program = Program(text)
    collectives = program.collectives(dict(job.mesh.shape))
    time_of = estimate(job, work_of(job, program, counted))
    if far := sum(row.sent for row in collectives if row.between_slices):
        time_of["note"] += f"; {far / 1e9:.3g} GB per device between slices are not in it"
    if not program.counts_all_loops():
        time_of["note"] += "; loops whose length depends on data are counted once"
    return numbers | {
        "collectives": [dataclasses.asdict(row) for row in collectives],
        "estimate": time_of,
        "compile_seconds": round(seconds, 1),
    }


def _lowered(job: Job, counted: float) -> dict[str, Any]:
    started = time.perf_counter()
    with _on(job.mesh):
        jitted = jax.jit(job.function, donate_argnums=job.donated, out_shardings=job.out_shardings)
        lowered = jitted.trace(*job.arguments).lower(lowering_platforms=("cuda",))
    return {
        "module_bytes": len(lowered.as_text()),
        "estimate": {
            "note": "lowered for CUDA, not compiled: no temporaries, no collectives",
            # Recomputation included: no program of these products is faster.
            "least_seconds": counted / job.mesh.size / flops_lib.peak_flops(_kind(job.mesh)),
            "most_mfu": job.model_flops / counted,
        },
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def _memory(compiled: Any) -> dict[str, int]:
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "results": new,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    return sizes | {"peak": sum(sizes.values())}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program costs: FLOPs of products over all devices; bytes per device moved
    for products, for everything else, and sent to other devices."""

    flops: float
    products: float
    others: float
    sent: float

    def scaled(self, factor: float) -> "Work":
        return Work(*(factor * value for value in dataclasses.astuple(self)))

    def plus(self, other: "Work") -> "Work":
        return Work(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )


def work_of(job: Job, program: Program, flops: float) -> Work:
    """The work of a compiled job, loops times their trip counts, without transfers between
    slices."""
    traffic = program.traffic()
    collectives = program.collectives(dict(job.mesh.shape))
    sent = sum(row.sent for row in collectives if not row.between_slices)
    return Work(flops, traffic.products, traffic.others, float(sent))


def estimate(job: Job, work: Work) -> dict[str, Any]:
    """Time and MFU of `work` by the roofline of the chip, or a note that says why not."""
    chip = flops_lib.chip(_kind(job.mesh))
    if chip is None or not chip.bandwidth or not chip.network:
        return {"note": f"no estimate: bandwidths of {_kind(job.mesh)} n/a"}
    computing = work.flops / job.mesh.size / chip.flops
    products = max(computing, work.products / chip.bandwidth)
    others, network = work.others / chip.bandwidth, work.sent / chip.network
    ideal = job.model_flops / job.mesh.size / chip.flops
    hidden, exposed = max(products + others, network), products + others + network
    return {
        "note": "roofline of data-sheet peaks; not measured",
        "products_at_peak_seconds": computing,
        "products_seconds": products,
        "other_memory_seconds": others,
        "collective_seconds": network,
        "step_seconds": {"collectives_hidden": hidden, "collectives_exposed": exposed},
        "mfu": {"collectives_hidden": ideal / hidden, "collectives_exposed": ideal / exposed},
    }


def format_report(numbers: dict[str, Any]) -> str:
    """What the program prints of a report."""
    gb = {name: size / 1e9 for name, size in numbers["bytes_per_device"].items() if size}
    mesh = ", ".join(f"{name} {size}" for name, size in numbers["mesh"].items() if size > 1)
    lines = [
        f"{numbers['topology']}: {numbers['devices']} x {numbers['device']}, mesh {mesh or '1'}",
        "parameter | logical axes | mesh axes | bytes per device",
        *(
            f"  {row['name']} {row['shape']} | {row['logical']} | {row['physical']} | "
            f"{row['bytes_per_device']:,}"
            for row in numbers["parameters"]
        ),
        "GB per device: " + ", ".join(f"{name} {size:.2f}" for name, size in gb.items()),
        f"FLOPs: model {numbers['flops']['model']:.3e} (analytic), program "
        f"{'' if numbers['flops']['exact'] else 'at least '}{numbers['flops']['program']:.3e} "
        "(products of the traced program)",
    ]
    for row in numbers.get("collectives", ()):
        lines.append(f"  {row['kind']} over {_reach(row)}: {row['count']} x {row['bytes']:,} bytes")
    lines.append(_format_estimate(numbers["estimate"]))
    if "unrolled_estimate" in numbers:
        lines.append(f"from unrolled layers: {_format_estimate(numbers['unrolled_estimate'])}")
    lines.append(f"compiled in {numbers['compile_seconds']:.1f} s")
    return "\n".join(lines)


def _reach(collective: dict[str, Any]) -> str:
    if collective["between_slices"]:
        return "slices"
    return "+".join(collective["axes"]) or "one device"


def _format_estimate(numbers: dict[str, Any]) -> str:
    if "least_seconds" in numbers:
        return (
            f"{numbers['note']}; bounds by the products at the peak of the data sheet: at least "
            f"{numbers['least_seconds']:.3g} s, MFU at most {100 * numbers['most_mfu']:.0f} %"
        )
    if "step_seconds" not in numbers:
        return numbers["note"]
    step, mfu = numbers["step_seconds"], numbers["mfu"]
    return (
        f"estimated step ({numbers['note']}): {step['collectives_hidden']:.3f} s with "
        f"collectives hidden, {step['collectives_exposed']:.3f} s without; MFU "
        f"{100 * mfu['collectives_hidden']:.0f} % and {100 * mfu['collectives_exposed']:.0f} %"
    )


def write_report(numbers: Any, path: str) -> None:
    """Writes a report (or a list of them) as json."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"report in {path}", file=sys.stderr)
