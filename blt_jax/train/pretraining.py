"""Experiments: the root of a config tree, and the one that pre-trains a model in phases."""

import dataclasses
import functools
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blt_jax.data.loader import DataConfig, evaluation_config, loader
from blt_jax.data.packing import Patcher, statistics_from_state
from blt_jax.data.tokenizers import Tokenizer
from blt_jax.dist.mesh import MeshConfig
from blt_jax.dist.multihost import text_of_first
from blt_jax.dist.sharding import ShardingRules, param_shardings
from blt_jax.layers.model import Model, ModelConfig
from blt_jax.train import state as state_lib
from blt_jax.train.checkpoint import CheckpointingConfig, Checkpoints
from blt_jax.train.config_json import write_model_config
from blt_jax.train.configs import differences, flatten, from_text, to_text
from blt_jax.train.evaluate import evaluate
from blt_jax.train.loop import LoggingConfig, LoopResult, Stage, train
from blt_jax.train.memory import check_memory
from blt_jax.train.optimizer import Decay, OptimizerConfig, Schedule, make_optimizer
from blt_jax.train.state import AveragingConfig, TrainState
from blt_jax.train.step import (
    batch_sharding,
    check_rows,
    make_train_step,
    parameter_table,
    process_rows,
)
from blt_jax.train.workdir import claim_workdir
from blt_jax.train.writers import Writer


@dataclasses.dataclass
class Context:
    """Where an experiment runs: its folder, mesh, random key and writer.

    claimed: `config.txt` of the workdir already holds the experiment that runs in it. shared:
    folder of the parts that several runs have in common, None for the workdir itself.
    """

    workdir: pathlib.Path
    mesh: Mesh
    key: jax.Array
    writer: Writer
    claimed: bool = False
    shared: pathlib.Path | None = None

    def child(self, name: str, key: jax.Array | None = None) -> "Context":
        """The context of a part: own subfolder and writer, same mesh, key derived from `name`."""
        if key is None:
            key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
        return self._part(self.workdir / name, key)

    def shared_child(self, name: str, key: jax.Array) -> "Context":
        """The context of a part that several runs have in common."""
        return self._part((self.shared or self.workdir) / name, key)

    def _part(self, folder: pathlib.Path, key: jax.Array) -> "Context":
        part = make_context(folder, self.mesh, key)
        part.shared = self.shared
        return part


def make_context(workdir: str | pathlib.Path, mesh: Mesh, key: jax.Array) -> Context:
    """A context with a new writer in `workdir`."""
    workdir = pathlib.Path(workdir)
    return Context(workdir=workdir, mesh=mesh, key=key, writer=Writer(workdir))


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Experiment:
    """Root of a config tree: what `python -m blt_jax.run` runs.

    seed: of the context's key. mesh: devices along each axis. Both count for the root only.
    """

    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def run(self, context: Context) -> dict[str, float]:
        """Does the work in `context.workdir` and returns its numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")


def shared_context(context: Context, name: str, config: Experiment) -> Context:
    """The folder of a part that several runs of one comparison have in common.

    `<name>` in the shared folder, or `<name>_<checksum>` if another configuration lies there.
    """
    key = jax.random.key(config.seed)
    child = context.shared_child(name, key)
    previous = child.workdir / "config.txt"
    found = text_of_first(previous.read_text() if previous.exists() else "")
    if found and differences(from_text(found), flatten(config)):
        checksum = zlib.crc32(to_text(config).encode())
        child = context.shared_child(f"{name}_{checksum:08x}", key)
    return child


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class EvaluationConfig:
    """every: steps between evaluations, 0 for the end only. batches: at most so many, 0 for all.

    data: what is evaluated, None for one pass over the validation split of the training data.
    """

    data: DataConfig | None = None
    every: int = 0
    batches: int = 0

    def __post_init__(self):
        if self.every < 0 or self.batches < 0:
            raise ValueError(
                f"EvaluationConfig.every={self.every}, batches={self.batches}: must be >= 0"
            )
        if self.data is not None and self.data.repeat:
            raise ValueError(
                "EvaluationConfig.data.repeat=True: evaluation is one pass, use repeat=False"
            )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Phase:
    """`steps` steps with the run's settings, except those given here.

    data: other rows (longer, more, from other sources). model: another config with the same
    parameters (other RoPE scaling, say). schedule: own one, counted from the phase's start,
    where learning_rate 0 means the rate that the phase before ended with. accumulation: 0 for
    the run's.
    """

    steps: int
    name: str = ""
    data: DataConfig | None = None
    model: ModelConfig | None = None
    schedule: Schedule | None = None
    accumulation: int = 0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Phase.steps={self.steps}: must be >= 1")
        if self.accumulation < 0:
            raise ValueError(f"Phase.accumulation={self.accumulation}: must be >= 0")


def annealing_phase(steps: int, **changes: Any) -> Phase:
    """A phase whose learning rate goes linearly from where it is to 0."""
    schedule = Schedule(learning_rate=0.0, decay=Decay.LINEAR, final_ratio=0.0)
    return Phase(steps=steps, name="annealing", schedule=schedule, **changes)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Pretraining(Experiment):
    """Trains one model on one stream of documents, in one phase or several.

    steps: of a run without phases; with phases it must be 0. accumulation: micro-batches per
    step. The schedule spans all phases that have none of their own.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    steps: int = 0
    phases: tuple[Phase, ...] = ()
    accumulation: int = 1
    averaging: AveragingConfig = dataclasses.field(default_factory=AveragingConfig)
    checkpointing: CheckpointingConfig = dataclasses.field(default_factory=CheckpointingConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    sharding: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"Pretraining.steps={self.steps}: must be >= 0")
        if bool(self.steps) == bool(self.phases):
            raise ValueError(
                f"Pretraining.steps={self.steps} with {len(self.phases)} phases: give the steps "
                "of the run or its phases, one of the two"
            )
        if self.accumulation < 1:
            raise ValueError(f"Pretraining.accumulation={self.accumulation}: must be >= 1")
        if self.phases and self.all_phases[0].schedule is not None:
            first = self.all_phases[0].schedule
            if not first.learning_rate:
                raise ValueError(
                    "Pretraining.phases[0].schedule.learning_rate=0: there is no phase before it"
                )
        for phase in self.all_phases:
            rows, parts = self.phase_data(phase).batch_size, self.phase_accumulation(phase)
            if rows % parts:
                raise ValueError(
                    f"DataConfig.batch_size={rows}: must be divisible by accumulation={parts}"
                )

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases, or the single one that `steps` stands for."""
        return self.phases or (Phase(steps=self.steps),)

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.all_phases)

    def phase_data(self, phase: Phase) -> DataConfig:
        """Training data of a phase."""
        return phase.data or self.data

    def phase_accumulation(self, phase: Phase) -> int:
        """Micro-batches per step of a phase."""
        return phase.accumulation or self.accumulation

    @property
    def placed_averaging(self) -> AveragingConfig:
        """The averaging with its first step as a number."""
        if self.averaging.start >= 0:
            return self.averaging
        last = self.total_steps - self.all_phases[-1].steps
        return dataclasses.replace(self.averaging, start=last)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError where rows or parameters of a phase cannot be divided over the mesh."""
        rows = batch_sharding(mesh, self.sharding)
        for phase in self.all_phases:
            check_rows(self.phase_data(phase).batch_size, self.phase_accumulation(phase), rows)
            param_shardings((phase.model or self.model).build(self.sharding), mesh)

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        """Learning rate of step `step` (from 0), over all phases; float32 scalar."""
        step = jnp.asarray(step, jnp.int32)
        followers = sum(phase.steps for phase in self.all_phases if phase.schedule is None)
        pieces, ends, done, followed = [], [], 0, 0
        for phase in self.all_phases:
            if phase.schedule is None:
                # Steps of other phases do not count for the run's schedule.
                offset, schedule, length = done - followed, self.schedule, followers
                followed += phase.steps
                peak = jnp.float32(schedule.learning_rate)
            else:
                offset, schedule, length = done, phase.schedule, phase.steps
                peak = jnp.float32(schedule.learning_rate)
                if not schedule.learning_rate:
                    peak = pieces[-1](jnp.int32(done))

            def piece(step, offset=offset, schedule=schedule, length=length, peak=peak):
                return peak * schedule.ratio(step - offset, length)

            pieces.append(piece)
            done += phase.steps
            ends.append(done)
        values = [piece(step) for piece in pieces]
        conditions = [step < end for end in ends[:-1]]
        return jnp.select(conditions, values[:-1], values[-1]) if conditions else values[0]

    def fit(
        self,
        context: Context,
        *,
        patcher: Patcher | None = None,
        tokenizer: Tokenizer | None = None,
        params: Any = None,
        batches: Callable[[DataConfig, Sequence[int]], Iterable] | None = None,
        build: Callable[[ModelConfig], Model] | None = None,
    ) -> "Fit":
        """Trains (or continues) in `context.workdir`; returns the model and its parameters.

        patcher: start mask of a tokenized document, for models of patches. params: where to
        start instead of a random initialisation. batches: makes the data stream of a config and
        the rows of each batch that this process reads, in place of `blt_jax.data.loader`.
        build: makes the module of a model config, in place of
        its own `build`.
        Raises ValueError if the workdir holds another configuration, MemoryError if the run
        cannot fit, NonFiniteError and Preempted as `train`.
        """
        build = build or (lambda config: config.build(self.sharding))
        return _Fitting(self, context, patcher, tokenizer, batches, build).fit(params)

    def run(self, context: Context) -> dict[str, float]:
        """`fit`; the numbers of the last evaluation and of training."""
        return self.fit(context).metrics


def trainings(experiment: Experiment) -> dict[str, Pretraining]:
    """The trainings of an experiment by name; "." is the experiment itself, where it is one."""
    found = {".": experiment} if isinstance(experiment, Pretraining) else {}
    for field in dataclasses.fields(experiment):
        if isinstance(value := getattr(experiment, field.name), Pretraining):
            found[field.name] = value
    return found


@dataclasses.dataclass
class Fit:
    """What training gives: the module, its parameters, their average (or None), the numbers."""

    model: Model
    params: Any
    averaged_params: Any
    metrics: dict[str, float]


class _CountedBatches:
    """An iterator of batches that the model checks; it counts row positions and those without a
    token."""

    def __init__(self, batches: Iterator, model: Model):
        self._batches, self._model = batches, model
        self.positions = self.padding = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        self._model.check_batch(batch)
        if "segment_ids" in batch:
            self.positions += batch["segment_ids"].size
            self.padding += int(np.count_nonzero(batch["segment_ids"] == 0))
        return batch

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


class _Fitting:
    def __init__(self, config: Pretraining, context: Context, patcher, tokenizer, batches, build):
        self.config, self.context = config, context
        self.patcher, self.tokenizer, self.batches = patcher, tokenizer, batches
        self.build = build
        self.batch_sharding = batch_sharding(context.mesh, config.sharding)
        self.training_batches: Any = None
        self.averaging = config.placed_averaging

    def say(self, line: str) -> None:
        if not self.config.logging.quiet and jax.process_index() == 0:
            print(line, flush=True)

    def open_training_batches(self, data: DataConfig, model: Model) -> "_CountedBatches":
        rows = process_rows(data.batch_size, self.batch_sharding)
        self.training_batches = _CountedBatches(iter(self.open_batches(data, rows)), model)
        return self.training_batches

    def packing_numbers(self) -> dict[str, float]:
        """Share of padding and of dropped targets in the rows of the last phase."""
        batches = self.training_batches
        if self.batches is not None or batches is None or not batches.positions:
            return {}
        statistics = statistics_from_state(batches.get_state())
        numbers = {
            "padding_rate": batches.padding / batches.positions,
            "drop_rate": statistics.drop_rate,
        }
        self.say("packing: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        return numbers

    def open_batches(self, data: DataConfig, rows: Sequence[int]) -> Iterable:
        if self.batches is not None:
            return self.batches(data, rows)
        return loader(data, tokenizer=self.tokenizer, patcher=self.patcher, rows=rows)

    def evaluate(self, model: Model, state: TrainState) -> dict[str, float]:
        config = self.config
        data = config.evaluation.data or evaluation_config(self.config.data)
        trees = {"": state.params}
        if state.average is not None and int(state.average.count):
            trees["averaged_"] = state.average.params
        numbers = {}
        for prefix, params in trees.items():
            found = evaluate(
                model,
                params,
                self.open_batches(data, range(data.batch_size)),
                mesh=self.context.mesh,
                max_batches=config.evaluation.batches,
            )
            numbers |= {prefix + name: value for name, value in found.items()}
        return numbers

    def stages(self, models: list[Model], steps: list[Callable]) -> tuple[Stage, ...]:
        stages, done, source, former = [], 0, -1, None
        for index, phase in enumerate(self.config.all_phases):
            data = self.config.phase_data(phase)
            if data != former:
                source, former = source + 1, data
            length = data.sequence_length
            flops = _flops_per_token(models[index], length)
            stages.append(
                Stage(
                    name=phase.name or ("training" if index == 0 else f"phase {index}"),
                    start=done,
                    stop=done + phase.steps,
                    step=steps[index],
                    open_batches=functools.partial(self.open_training_batches, data, models[index]),
                    source=source,
                    accumulation=self.config.phase_accumulation(phase),
                    flops_per_row=3.0 * flops * length,
                )
            )
            done += phase.steps
        return tuple(stages)

    def first_lines(self, model: Model, abstract: TrainState, memory: str) -> tuple[int, int]:
        mesh = self.context.mesh
        device = mesh.devices.flat[0]
        axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        self.say(f"devices: {mesh.size} x {device.device_kind} ({device.platform})")
        self.say(f"mesh: {axes}")
        table, total, rest = parameter_table(abstract.params)
        self.say(table)
        self.say(memory)
        flops = _flops_per_token(model, self.config.data.sequence_length)
        if flops:
            self.say(f"FLOPs per token, forward: {flops:.3e}")
        return total, rest

    def fit(self, params: Any) -> Fit:
        config, context = self.config, self.context
        if not context.claimed:
            claim_workdir(context.workdir, config)
        if jax.process_index() == 0:
            write_model_config(context.workdir, config.all_phases[-1].model or config.model)
        started = time.perf_counter()
        configs = [phase.model or config.model for phase in config.all_phases]
        built = {model: self.build(model) for model in dict.fromkeys(configs)}
        model = built[configs[0]]
        shapes = state_lib.abstract_params(model)
        for other in built.values():
            _check_same_parameters(shapes, state_lib.abstract_params(other))
        optimizer = make_optimizer(config.optimizer, shapes, config.learning_rate)
        abstract = state_lib.abstract_state(model, optimizer, self.averaging)
        shardings = state_lib.state_shardings(model, optimizer, abstract, context.mesh)
        memory = check_memory(abstract, shardings, context.mesh.devices.flat[0])
        total, rest = self.first_lines(model, abstract, memory)

        def make_state() -> TrainState:
            return state_lib.create_state(
                model, optimizer, self.averaging, context.key, context.mesh, params
            )

        step_of = {
            key: make_train_step(
                value.loss, optimizer, config.optimizer, config.learning_rate, self.averaging
            )
            for key, value in built.items()
        }
        last_model = built[configs[-1]]
        checkpoints = Checkpoints(
            config.checkpointing.directory or context.workdir / "checkpoints",
            config.checkpointing.keep,
        )
        try:
            result = train(
                self.stages([built[c] for c in configs], [step_of[c] for c in configs]),
                make_state,
                abstract,
                shardings,
                mesh=context.mesh,
                batch_sharding=self.batch_sharding,
                writer=context.writer,
                checkpoints=checkpoints,
                logging=config.logging,
                checkpoint_every=config.checkpointing.every,
                evaluate=lambda state: self.evaluate(last_model, state),
                evaluate_every=config.evaluation.every,
            )
        finally:
            checkpoints.close()
        numbers = _final_numbers(result, config.total_steps, time.perf_counter() - started)
        numbers |= self.packing_numbers()
        numbers |= {"parameters": float(total), "parameters_without_embeddings": float(rest)}
        average = result.state.average
        averaged = average.params if average is not None and int(average.count) else None
        return Fit(
            model=last_model, params=result.state.params, averaged_params=averaged, metrics=numbers
        )


def _final_numbers(result: LoopResult, steps: int, wall: float) -> dict[str, float]:
    numbers = dict(result.evaluation)
    numbers |= {f"training_{k}": result.numbers[k] for k in ("loss", "bits_per_byte")}
    for name in ("bytes_per_second", "tokens_per_second", "mfu"):
        if name in result.numbers:
            numbers[name] = result.numbers[name]
    numbers |= {
        "steps": float(steps),
        "training_seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "fit_seconds": wall,
    }
    return numbers


def _flops_per_token(model: Model, length: int) -> float:
    try:
        return float(model.flops_per_token(length))
    except NotImplementedError:
        return 0.0


def _check_same_parameters(first: Any, other: Any) -> None:
    def describe(tree):
        return {
            jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    a, b = describe(first), describe(other)
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if changed:
        raise ValueError(
            f"Phase.model changes the parameters {', '.join(changed)}: the models of all phases "
            "must have the same"
        )
