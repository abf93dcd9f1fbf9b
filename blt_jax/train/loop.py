"""The training loop: stages of steps, late metrics, checkpoints, preemption, non-finite stops."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from blt_jax.train import flops
from blt_jax.train.checkpoint import Checkpoints
from blt_jax.train.evaluate import numbers_from_sums
from blt_jax.train.progress import Progress, format_line
from blt_jax.train.state import TrainState
from blt_jax.train.step import compile_step, put_batch
from blt_jax.train.writers import Writer

# Metrics of a step that are not sums over targets.
LATEST = ("gradient_norm", "parameter_norm", "learning_rate")


class Preempted(Exception):
    """SIGTERM (or the cluster's notice) came; the state of `step` is saved."""

    def __init__(self, step: int):
        super().__init__(f"preempted after step {step}, which is saved; run again to continue")
        self.step = step


class NonFiniteError(ArithmeticError):
    """A loss or gradient norm was infinite or not a number; `step` is the step that gave it."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LoggingConfig:
    """every: steps between progress lines. tensorboard: write event files. quiet: print nothing.

    profile_start, profile_steps: window traced by the profiler of process 0 into the folder
    `profile`, in steps since the start of the process; 0 steps for none.
    """

    every: int = 10
    tensorboard: bool = True
    quiet: bool = False
    profile_start: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"LoggingConfig.every={self.every}: must be >= 1")
        if self.profile_start < 0 or self.profile_steps < 0:
            raise ValueError(
                f"LoggingConfig.profile_start={self.profile_start}, "
                f"profile_steps={self.profile_steps}: must be >= 0"
            )


@dataclasses.dataclass
class Stage:
    """Steps `start`..`stop` - 1 of a run, taken by one step function over one data stream.

    open_batches: makes the iterator (get_state, set_state) of numpy batches of this process.
    source: stages with the same number continue one stream.
    flops_per_row: training FLOPs of one row, 0 if unknown.
    """

    name: str
    start: int
    stop: int
    step: Callable
    open_batches: Callable[[], Iterator]
    source: int
    accumulation: int = 1
    flops_per_row: float = 0.0


class _Sigterm:
    """Sets a flag on SIGTERM while the loop runs; the former handler comes back after it."""

    def __init__(self):
        self.received = False
        self._former = None
        # On several processes the cluster's own notice is used, so that all stop at one step.
        main = threading.current_thread() is threading.main_thread()
        self._active = main and jax.process_count() == 1

    def __enter__(self):
        if self._active:
            self._former = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error):
        if self._active:
            signal.signal(signal.SIGTERM, self._former)

    def _handle(self, number, frame):
        self.received = True


@dataclasses.dataclass
class LoopResult:
    """State after the last step and the numbers of the last log line and evaluation."""

    state: TrainState
    numbers: dict[str, float]
    evaluation: dict[str, float]
    seconds: float
    compile_seconds: float


class _Window:
    """Sums and time since the last log line; the sums are part of a checkpoint."""

    def __init__(self, sums: dict[str, float] | None = None):
        self.sums: dict[str, float] = dict(sums or {})
        # Of this process only: what was timed, which a window continued after a restart is not.
        self.timed_sums: dict[str, float] = {}
        self.seconds, self.steps, self.flops = 0.0, 0, 0.0

    def add(self, metrics: dict[str, float], seconds: float, step_flops: float) -> None:
        for name, value in metrics.items():
            if name not in LATEST:
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.timed_sums[name] = self.timed_sums.get(name, 0.0) + value
        self.seconds += seconds
        self.steps += 1
        self.flops += step_flops


def _first_lines(stage: Stage, batch: dict[str, Any], seconds: float, compiled: Any) -> list[str]:
    lines = [f"{stage.name}: step compiled in {seconds:.1f} s"]
    memory = getattr(compiled, "memory_analysis", lambda: None)()
    if memory is not None:
        lines[0] += f", temporary memory {memory.temp_size_in_bytes / 2**30:.2f} GiB per device"
    if stage.flops_per_row and "target_mask" in batch:
        mask = batch["target_mask"]
        tokens, rows = mask.size / mask.shape[0], mask.shape[0]
        counted = float((batch["target_bytes"] * mask).sum()) / rows
        lines.append(
            f"{stage.name}: training FLOPs per token {stage.flops_per_row / tokens:.3e}, "
            f"per byte {stage.flops_per_row / max(counted, 1.0):.3e} (first batch)"
        )
    return lines


def train(
    stages: tuple[Stage, ...],
    make_state: Callable[[], TrainState],
    abstract: TrainState,
    shardings: TrainState,
    *,
    mesh: Mesh,
    batch_sharding: NamedSharding,
    writer: Writer,
    checkpoints: Checkpoints,
    logging: LoggingConfig,
    checkpoint_every: int = 0,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> LoopResult:
    """Takes all stages from the newest checkpoint, or from `make_state()`, to the last step.

    abstract: shapes of the state, so that a restored run never holds two states at once.
    evaluate: numbers of a state, every `evaluate_every` steps (0: not before the end) and after
    the last. The metrics of a step are read while the next one runs.
    Raises NonFiniteError naming the step, Preempted after SIGTERM.
    """
    loop = _Loop(
        stages, shardings, mesh, batch_sharding, writer, checkpoints, logging, checkpoint_every
    )
    loop.evaluate, loop.evaluate_every = evaluate, evaluate_every
    with _Sigterm() as sigterm:
        try:
            return loop.run(make_state, abstract, sigterm)
        finally:
            loop.end_profile()
            loop.progress.close()
            # Also after an error: the last good checkpoint must reach the disk.
            checkpoints.wait()


class _Loop:
    def __init__(
        self, stages, shardings, mesh, batch_sharding, writer, checkpoints, logging, save_every
    ):
        self.stages, self.shardings, self.mesh = stages, shardings, mesh
        self.batch_sharding, self.writer, self.checkpoints = batch_sharding, writer, checkpoints
        self.logging, self.save_every = logging, save_every
        writer.tensorboard = logging.tensorboard
        self.total = stages[-1].stop
        self.window, self.pending = _Window(), None
        self.numbers: dict[str, float] = {}
        self.evaluated: dict[str, Any] = {}
        self.seconds = self.compile_seconds = 0.0
        self.step_seconds = math.nan
        self.devices = list(mesh.devices.flat)
        self.evaluate, self.evaluate_every = None, 0
        self.tracing = False
        self.progress = Progress(0)
        self.compiled: dict[Any, Any] = {}
        self.clock = time.perf_counter()

    def say(self, line: str) -> None:
        if not self.logging.quiet:
            self.progress.line(line)

    def restore(self, make_state, abstract: TrainState) -> tuple[int, TrainState, Any]:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.shardings,
        )
        found = self.checkpoints.restore(abstract)
        if found is None:
            if self.writer.metrics_path.exists():
                self.say(f"no checkpoint in {self.checkpoints.directory}: again from step 0")
            self.writer.truncate(0)
            return 0, make_state(), None
        state, data, extra = found
        step = int(state.step)
        self.writer.truncate(step)
        self.window = _Window(extra["window"])
        self.numbers, self.evaluated = extra["numbers"], extra["evaluated"]
        self.seconds = extra["seconds"]
        self.say(f"continuing from the checkpoint of step {step}")
        return step, state, data

    def save(self, step: int, state: TrainState, stage: Stage, batches: Iterator) -> None:
        if step in self.checkpoints.steps():
            return
        extra = {
            "window": self.window.sums,
            "numbers": self.numbers,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
        }
        data = {"source": stage.source, "state": batches.get_state()}
        self.checkpoints.save(step, state, data, extra)

    def flush(self) -> None:
        """Reads the metrics of the step before, checks them, and writes its log line."""
        if self.pending is None:
            return
        step, metrics, stage, rows = self.pending
        self.pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("objective", "gradient_norm"):
            if not math.isfinite(metrics[name]):
                steps = self.checkpoints.steps()
                saved = f"step {steps[-1]} in {self.checkpoints.directory}" if steps else "none"
                raise NonFiniteError(
                    f"step {step}: {name} is {metrics[name]} "
                    f"(learning rate {metrics['learning_rate']:.3e}); "
                    f"last good checkpoint: {saved}",
                    step,
                )
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.window.add(metrics, now - self.clock, rows * stage.flops_per_row)
        self.progress.update()
        if step % self.logging.every == 0 or step == self.total:
            self.log(step, metrics)
        self.clock = time.perf_counter()  # what writing a line took is not training time

    def log(self, step: int, metrics: dict[str, float]) -> None:
        window, self.window = self.window, _Window()
        numbers = numbers_from_sums(window.sums)
        seconds = max(window.seconds, 1e-9)
        numbers["bytes_per_second"] = window.timed_sums["bytes"] / seconds
        numbers["tokens_per_second"] = window.timed_sums["weight"] / seconds
        numbers["seconds_per_step"] = self.step_seconds = seconds / max(window.steps, 1)
        mfu = flops.utilization(window.flops, seconds, self.devices) if window.flops else None
        if mfu is not None:
            numbers["mfu"] = mfu
        numbers |= {name: metrics[name] for name in LATEST}
        numbers["seconds"] = self.seconds
        self.numbers = numbers
        self.writer.scalars(step, numbers)
        left = (self.total - step) * self.step_seconds
        self.say(format_line(step, self.total, numbers, left, self.devices[0]))

    def evaluation_due(self, step: int) -> bool:
        every = self.evaluate_every
        return step == self.total or bool(every and step % every == 0)

    def run_evaluation(self, step: int, state: TrainState) -> None:
        if self.evaluate is None or self.evaluated.get("step") == step:
            return
        numbers = self.evaluate(state)
        self.evaluated = {"step": step, "numbers": numbers}
        self.writer.scalars(step, {f"evaluation/{name}": v for name, v in numbers.items()})
        shown = " ".join(
            f"{name} {value:.4f}" for name, value in numbers.items() if name.endswith("per_byte")
        )
        self.say(f"step {step}/{self.total} evaluation {shown}")

    def run(self, make_state, abstract: TrainState, sigterm: _Sigterm) -> LoopResult:
        step, state, data = self.restore(make_state, abstract)
        if not self.logging.quiet:
            self.progress = Progress(self.total, step)
        start = step
        batches = source = None
        if step and self.evaluation_due(step):  # stopped between the step and its evaluation
            self.run_evaluation(step, state)
        for stage in self.stages:
            if stage.stop <= step:
                continue
            if batches is None or stage.source != source:
                batches, source = stage.open_batches(), stage.source
                if data is not None and data["source"] == source:
                    batches.set_state(data["state"])
                data = None
            compiled = None
            while step < stage.stop:
                host_batch = next(batches)
                batch = put_batch(host_batch, stage.accumulation, self.batch_sharding)
                if compiled is None:
                    self.flush()
                    compiled = self.compile(stage, state, batch, host_batch)
                self.profile(step - start)
                state, metrics = compiled(state, batch)
                step += 1
                self.flush()
                rows = math.prod(next(iter(batch.values())).shape[:2])
                self.pending = (step, metrics, stage, rows)
                stopped = sigterm.received or self.checkpoints.reached_preemption(step)
                evaluating = self.evaluation_due(step) and not stopped
                saving = self.save_every and step % self.save_every == 0
                saving = saving or stopped or step == self.total
                if evaluating or saving:
                    self.flush()  # before a save: a bad state must never be kept
                if evaluating:
                    self.run_evaluation(step, state)
                if saving:
                    self.save(step, state, stage, batches)
                self.clock = time.perf_counter() if evaluating or saving else self.clock
                if stopped:
                    self.checkpoints.wait()
                    raise Preempted(step)
        self.run_evaluation(step, state)
        return LoopResult(
            state=state,
            numbers=self.numbers,
            evaluation=self.evaluated.get("numbers", {}),
            seconds=self.seconds,
            compile_seconds=self.compile_seconds,
        )

    def compile(self, stage: Stage, state: TrainState, batch: Any, host_batch: Any):
        shapes = tuple((name, value.shape) for name, value in sorted(batch.items()))
        if (stage.step, shapes) not in self.compiled:
            started = time.perf_counter()
            compiled = compile_step(stage.step, state, self.shardings, batch, self.mesh)
            seconds = time.perf_counter() - started
            self.compile_seconds += seconds
            self.compiled[stage.step, shapes] = compiled
            for line in _first_lines(stage, host_batch, seconds, compiled):
                self.say(line)
        self.clock = time.perf_counter()
        return self.compiled[stage.step, shapes]

    def profile(self, taken: int) -> None:
        """Starts or ends the trace before the step that follows `taken` steps."""
        first, steps = self.logging.profile_start, self.logging.profile_steps
        if not steps or jax.process_index():
            return
        if taken == first:
            self.flush()  # nothing of the step before is in the trace
            jax.profiler.start_trace(str(self.writer.workdir / "profile"))
            self.tracing = True
        elif taken == first + steps:
            self.flush()
            self.end_profile()

    def end_profile(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
            self.say(f"profile in {self.writer.workdir / 'profile'}")
