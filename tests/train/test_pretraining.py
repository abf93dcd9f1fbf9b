"""Whole runs of a tiny model: resume, phases, meshes, averages, failures, what is left behind."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.data.loader import DataConfig, loader
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params, param_shardings
from blt_jax.train import configs, pretraining
from blt_jax.train.checkpoint import CheckpointError, Checkpoints, load_params
from blt_jax.train.evaluate import evaluate
from blt_jax.train.launch import run_experiment
from blt_jax.train.loop import LoggingConfig, NonFiniteError, Preempted
from blt_jax.train.optimizer import Decay, Schedule
from blt_jax.train.pretraining import (
    CheckpointingConfig,
    EvaluationConfig,
    Phase,
    annealing_phase,
    make_context,
)
from blt_jax.train.state import Averaging, AveragingConfig, TrainState, abstract_params
from blt_jax.train.workdir import WorkdirError
from blt_jax.train.writers import read_metrics, read_results
from tests.train.tiny_model import TinyConfig, tiny_experiment

TIMINGS = ("bytes_per_second", "tokens_per_second", "seconds_per_step", "seconds")


def one_device_mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def fit(workdir, experiment, mesh=None, **arguments):
    context = make_context(workdir, mesh or one_device_mesh(), jax.random.key(experiment.seed))
    try:
        return experiment.fit(context, **arguments)
    finally:
        context.writer.close()


def lines(workdir):
    """Lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(workdir)
    ]


def sigterm_at(step):
    """Batches that send SIGTERM to this process while the given batch is fetched."""

    class Stream:
        def __init__(self, config, rows):
            self.inner, self.count = iter(loader(config, rows=rows)), 0

        def __iter__(self):
            return self

        def __next__(self):
            self.count += 1
            if self.count == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

        def set_state(self, state):
            self.inner.set_state(state)

    return Stream


def assert_same_run(first, second):
    assert lines(first) == lines(second)  # bitwise: JSON keeps every bit of a float


def params_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_resumed_after_sigterm_is_bitwise_the_same(tmp_path):
    experiment = tiny_experiment(
        model=TinyConfig(noise=0.1),
        averaging=AveragingConfig(kind=Averaging.UNIFORM, start=2),
        evaluation=EvaluationConfig(every=5, batches=1),
        logging=LoggingConfig(every=4, quiet=True, tensorboard=False),
    )
    whole = fit(tmp_path / "whole", experiment)
    with pytest.raises(Preempted, match="after step 5"):
        fit(tmp_path / "parts", experiment, batches=sigterm_at(5))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    parts = fit(tmp_path / "parts", experiment)
    params_equal(whole.params, parts.params)
    params_equal(whole.averaged_params, parts.averaged_params)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [4, 5, 8, 10, 12, 12]
    assert whole.metrics["bits_per_byte"] == parts.metrics["bits_per_byte"]
    assert whole.metrics["averaged_bits_per_byte"] != whole.metrics["bits_per_byte"]


def test_batches_are_made_of_the_rows_of_this_process(tmp_path, monkeypatch):
    asked = []

    def batches(config, rows):
        asked.append(list(rows))
        return loader(config)

    monkeypatch.setattr(pretraining, "process_rows", lambda size, _: range(size // 2, size))
    fit(tmp_path, tiny_experiment(steps=1, evaluation=EvaluationConfig(batches=1)), batches=batches)
    # Evaluation pads its rows to those of all devices, so every process reads them all.
    assert asked == [[4, 5, 6, 7], list(range(8))]


def phased(**changes):
    long = DataConfig(batch_size=4, sequence_length=64, num_threads=0, prefetch=0)
    return tiny_experiment(
        steps=0,
        phases=(
            Phase(steps=4),
            Phase(steps=4, data=long, accumulation=2),
            annealing_phase(4, data=long),
        ),
        schedule=Schedule(learning_rate=1e-2, warmup_steps=2, decay=Decay.COSINE),
        averaging=AveragingConfig(kind=Averaging.UNIFORM),
        **changes,
    )


def test_phases_change_data_schedule_and_average(tmp_path):
    experiment = phased()
    result = fit(tmp_path, experiment)
    rates = [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line]
    expected = [float(experiment.learning_rate(step)) for step in range(12)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # The run's schedule ends after eight steps, at 0.1 of the peak; the annealing starts there.
    np.testing.assert_allclose(rates[8:], 1e-3 * np.array([1.0, 0.75, 0.5, 0.25]), rtol=1e-5)
    assert result.averaged_params is not None
    average = load_params(tmp_path, abstract_params(result.model), averaged=True)
    params_equal(average, result.averaged_params)


def test_resumed_mid_phase_is_bitwise_the_same(tmp_path):
    experiment = phased()
    whole = fit(tmp_path / "whole", experiment)
    with pytest.raises(Preempted, match="after step 10"):
        # The stream of the last two phases is one: its sixth batch belongs to step 10.
        fit(tmp_path / "parts", experiment, batches=sigterm_at(6))
    parts = fit(tmp_path / "parts", experiment)
    params_equal(whole.params, parts.params)
    params_equal(whole.averaged_params, parts.averaged_params)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_continued_from_a_periodic_checkpoint(tmp_path):
    experiment = tiny_experiment(checkpointing=CheckpointingConfig(every=5, keep=3))
    whole = fit(tmp_path, experiment)
    before = lines(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir()) == [5, 10, 12]
    shutil.rmtree(checkpoints / "12")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1')  # a line cut off by a crash
    again = fit(tmp_path, experiment)
    params_equal(whole.params, again.params)
    assert lines(tmp_path) == before


def _truncate(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    experiment = tiny_experiment(checkpointing=CheckpointingConfig(every=5, keep=3))
    whole = fit(tmp_path, experiment)
    before = lines(tmp_path)
    _truncate(tmp_path / "checkpoints" / "12")
    again = fit(tmp_path, experiment)
    out = capsys.readouterr().out
    assert re.search(r"checkpoint 12 in .* is damaged .*falling back to the one before", out)
    assert (tmp_path / "checkpoints.damaged" / "12").is_dir()
    params_equal(whole.params, again.params)
    assert lines(tmp_path) == before


def test_failed_save_is_reported_by_close_too(tmp_path):
    state = TrainState(
        params={"w": jnp.arange(20_000, dtype=jnp.float32)},
        opt_state=(),
        step=jnp.asarray(3),
        key=jax.random.key(0),
        average=None,
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(CheckpointError, match=r"could not be written to .*: File too large"):
            try:
                checkpoints.save(3, state, 0, {})
            finally:
                checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(tmp_path).steps() == []


def test_eight_devices_equal_one(tmp_path):
    experiment = tiny_experiment()
    one = fit(tmp_path / "one", experiment)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    eight = fit(tmp_path / "eight", experiment, mesh=mesh)
    assert "fsdp" in eight.params["embedding"].sharding.spec
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "eight"), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    np.testing.assert_allclose(
        one.metrics["bits_per_byte"], eight.metrics["bits_per_byte"], rtol=1e-5
    )


def test_resumed_on_another_device_count(tmp_path):
    experiment = tiny_experiment()
    fit(tmp_path / "one", experiment)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    with pytest.raises(Preempted):
        fit(tmp_path / "moved", experiment, mesh=mesh, batches=sigterm_at(6))
    moved = dataclasses.replace(experiment, mesh=MeshConfig(data=1))
    fit(tmp_path / "moved", moved)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "moved"), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)


def test_every_step_has_its_line_although_metrics_are_late(tmp_path):
    fit(tmp_path, tiny_experiment())
    found = [line["step"] for line in lines(tmp_path) if "loss" in line]
    assert found == list(range(1, 13))
    for line in lines(tmp_path)[:12]:
        np.testing.assert_allclose(line["bits_per_byte"], line["loss"] / np.log(2), rtol=0.02)
        assert {"gradient_norm", "parameter_norm", "learning_rate", "accuracy"} <= line.keys()


def test_window_of_a_log_line_is_a_sum_over_its_steps(tmp_path):
    fit(tmp_path / "each", tiny_experiment())
    fit(
        tmp_path / "third",
        tiny_experiment(logging=LoggingConfig(every=3, quiet=True, tensorboard=False)),
    )
    each = [line["loss"] for line in lines(tmp_path / "each") if "loss" in line]
    third = [line["loss"] for line in lines(tmp_path / "third") if "loss" in line]
    # Rows are full, so all steps weigh nearly the same.
    np.testing.assert_allclose(third, np.reshape(each, (4, 3)).mean(1), rtol=1e-3)


def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    experiment = tiny_experiment(
        steps=0,
        phases=(Phase(steps=5), Phase(steps=5, model=TinyConfig(scale=float("inf")))),
        checkpointing=CheckpointingConfig(every=2, keep=2),
    )
    with pytest.raises(NonFiniteError, match=r"step 6: .* last good checkpoint: step 4"):
        fit(tmp_path, experiment)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()
    params = load_params(tmp_path, abstract_params(TinyConfig().build()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_other_configuration_is_refused_with_its_fields(tmp_path):
    experiment = tiny_experiment(steps=2)
    fit(tmp_path, experiment)
    other = tiny_experiment(steps=2, model=TinyConfig(width=8))
    with pytest.raises(WorkdirError, match=r"model\.width: 16 -> 8"):
        fit(tmp_path, other)
    fit(tmp_path, dataclasses.replace(experiment, logging=LoggingConfig(quiet=True)))


def test_checkpoint_of_another_type_is_refused(tmp_path):
    result = fit(tmp_path, tiny_experiment(steps=2))
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "bfloat16"), abstract_params(result.model)
    )
    with pytest.raises(ValueError, match=r"'bias' is float32\[32\].*needs bfloat16\[32\]"):
        load_params(tmp_path, abstract)
    with pytest.raises(ValueError, match="lacks the array 'extra'"):
        load_params(tmp_path, {**abstract_params(result.model), "extra": abstract["bias"]})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_params(tmp_path / "nowhere", abstract)


def test_params_given_are_where_training_starts(tmp_path):
    first = fit(tmp_path / "first", tiny_experiment(steps=3))
    before = evaluate_tiny(first.model, first.params)
    still = tiny_experiment(steps=1, schedule=Schedule(learning_rate=0.0))
    second = fit(tmp_path / "second", still, params=first.params)
    params_equal(first.params, second.params)
    assert evaluate_tiny(second.model, second.params) == before


def evaluate_tiny(model, params, **arguments):
    config = DataConfig(
        batch_size=3, sequence_length=32, num_threads=0, prefetch=0, repeat=False, shuffle=False
    )
    rows = [next(stream := iter(loader(config))), next(stream)]
    return evaluate(model, params, rows, **arguments)


def test_evaluation_is_from_sums_over_all_rows():
    model = TinyConfig().build()
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 260, size=(7, 10)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "target_mask": rng.random(tokens.shape) < 0.5,
        "target_bytes": rng.integers(0, 3, size=tokens.shape).astype(np.int32),
    }
    whole = evaluate(model, params, [batch])
    # The last batch is shorter: nothing of it may be lost.
    split = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    parts = evaluate(model, params, split)
    sums = model.loss(params, {name: jnp.asarray(value) for name, value in batch.items()})
    expected = float(sums.metrics["nats"]) / np.log(2) / float(sums.metrics["bytes"])
    np.testing.assert_allclose(whole["bits_per_byte"], expected, rtol=1e-6)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5)
    assert whole["targets"] == batch["target_mask"].sum()
    assert evaluate(model, params, split, max_batches=1)["targets"] < whole["targets"]
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, params, [])
    # Fewer rows than devices, and some batches with none for most of them.
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    placed = jax.device_put(params, param_shardings(model, mesh))
    for batches in ([batch], split):
        divided = evaluate(model, placed, batches, mesh=mesh)
        assert divided["targets"] == whole["targets"] and divided["bytes"] == whole["bytes"]
        for name, value in whole.items():
            np.testing.assert_allclose(divided[name], value, rtol=1e-5)


def test_what_a_run_leaves(tmp_path):
    @dataclasses.dataclass(kw_only=True, unsafe_hash=True)
    class WithText(type(tiny_experiment())):
        def run(self, context):
            import matplotlib.figure

            numbers = self.fit(context.child("part")).metrics
            context.writer.text("sample", "a <generated> text")
            figure = matplotlib.figure.Figure()
            figure.add_subplot().plot([1, 2])
            context.writer.figure("patches", figure)
            return numbers

    base = tiny_experiment(logging=LoggingConfig(every=4, quiet=True))
    experiment = WithText(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    numbers = run_experiment(experiment, tmp_path, one_device_mesh())
    results = read_results(tmp_path)
    assert results["numbers"]["bits_per_byte"] == numbers["bits_per_byte"]
    assert results["config"]["model.width"] == "16"
    assert results["versions"]["jax"] == jax.__version__
    assert results["device"] == "cpu" and "mfu" not in results["numbers"]
    assert results["peak_flops"] == "n/a: unknown device cpu"
    assert results["wall_time_seconds"] > 0
    assert "commit" in results
    names = {path.name.split(".")[0] for path in (tmp_path / "part").iterdir()}
    assert {"config", "metrics", "checkpoints", "events"} <= names
    report = (tmp_path / "report.html").read_text()
    assert report.count("<svg") == 1
    assert "bits_per_byte" in report
    assert "data:image/png;base64," in report
    assert "a &lt;generated&gt; text" in report
    assert "model.width = 16" in report
    assert not re.search(r'(src|href)="(?!data:|#)', report)  # self-contained
    context = make_context(tmp_path, one_device_mesh(), jax.random.key(0))
    with pytest.raises(ValueError, match="letters, digits"):
        context.writer.text("../x", "")


def test_config_text_round_trip_and_differences():
    old = configs.flatten(phased())
    assert configs.from_text(configs.to_text(phased())) == old
    changed = dataclasses.replace(phased(), mesh=MeshConfig(data=2), seed=3)
    assert configs.differences(old, configs.flatten(changed)) == ["seed: 0 -> 3"]


def test_validation_walks_the_tree_children_first():
    experiment = phased()
    experiment.phases[1].data.batch_size = 3
    with pytest.raises(ValueError, match="batch_size=3: must be divisible by accumulation=2"):
        configs.validate(experiment)
    experiment.phases[1].data.batch_size = 0
    with pytest.raises(ValueError, match="batch_size is 0"):
        configs.validate(experiment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 with 0 phases"),
        ({"phases": (Phase(steps=1),)}, "one of the two"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"accumulation": 3}, "batch_size=8: must be divisible by accumulation=3"),
        ({"steps": 0, "phases": (annealing_phase(3),)}, "no phase before it"),
    ],
)
def test_bad_experiments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_experiment(**changes)


def test_phase_with_other_parameters_is_refused(tmp_path):
    experiment = tiny_experiment(
        steps=0, phases=(Phase(steps=1), Phase(steps=1, model=TinyConfig(width=8)))
    )
    with pytest.raises(ValueError, match=r"Phase\.model changes the parameters.*embedding"):
        fit(tmp_path, experiment)


def test_metrics_file_is_plain_json_lines(tmp_path):
    fit(tmp_path, tiny_experiment(steps=2))
    text = pathlib.Path(tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 2]
