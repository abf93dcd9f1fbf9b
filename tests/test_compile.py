"""The program that compiles for machines that are not here. libtpu is part of the test extra."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.transformer import Remat
from blt_jax.models import llama3
from blt_jax.train import compilation, sweep
from blt_jax.train.launch import load_experiment_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = "--config=experiments/llama3.py:smoke"


DRIVER = """
import contextlib, io, json, sys
from blt_jax import compile
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = compile.main(["compile", *arguments])
    results.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def programs(*command_lines):
    """(status, output, errors) of each command, in one process that is not this one: a process
    that loaded libtpu cannot profile any more."""
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(command_lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Involuntary full rematerialization" not in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def reports(folder, *command_lines):
    """The reports of commands that must all succeed, and the output of the first."""
    files = [folder / f"{index}.json" for index in range(len(command_lines))]
    outputs = programs(
        *((*line, f"--output={file}") for line, file in zip(command_lines, files, strict=True))
    )
    for status, _, errors in outputs:
        assert status == 0, errors
    return [json.loads(file.read_text()) for file in files], outputs[0][1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    stack = ("num_layers=6", "d_model=256", "mlp_dim=1024")
    deep = [f"--config.model.transformer.{setting}" for setting in stack]
    deep += ["--config.data.batch_size=64", "--estimate=unrolled"]
    folder = tmp_path_factory.mktemp("compile")
    (numbers,), text = reports(folder, (SMOKE, "--topology=v5e:2x2", *mesh, *deep))
    return numbers, text


def test_report_of_a_train_step(report):
    numbers, text = report
    assert numbers["devices"] == 4 and numbers["device"] == "TPU v5 lite"
    sizes = numbers["bytes_per_device"]
    assert sum(row["bytes_per_device"] for row in numbers["parameters"]) == sizes["parameters"]
    assert 2 * sizes["parameters"] <= sizes["optimizer"] <= 2 * sizes["parameters"] + 64
    assert sizes["arguments"] <= sizes["peak"] < sizes["memory"] == 16e9
    assert 1.0 <= numbers["flops"]["program"] / numbers["flops"]["model"] < 1.2
    assert {tuple(row["axes"]) for row in numbers["collectives"]} >= {("fsdp",), ("tensor",)}
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in numbers["collectives"])
    mfu = numbers["estimate"]["mfu"]
    assert 0 < mfu["collectives_exposed"] <= mfu["collectives_hidden"] <= 1
    assert "not measured" in text and "transformer/layers/mlp/gate" in text


def test_unrolled_layers_estimate_what_the_loop_over_them_does(report):
    numbers, text = report
    scanned, unrolled = numbers["estimate"], numbers["unrolled_estimate"]
    assert unrolled["program_flops"] == pytest.approx(numbers["flops"]["program"], rel=1e-6)
    for name in ("collectives_hidden", "collectives_exposed"):
        assert unrolled["step_seconds"][name] == pytest.approx(
            scanned["step_seconds"][name], rel=0.03
        )
    assert "from unrolled layers: estimated step" in text


def test_a_run_that_does_not_fit_names_a_lever(tmp_path):
    big = [f"--config.model.transformer.{name}" for name in ("d_model=1024", "num_heads=8")]
    rows = ("--config.data.batch_size=4096", "--config.data.sequence_length=4096")
    kept = tmp_path / "report.json"
    (activations, arguments) = programs(
        (SMOKE, "--topology=v5e:1x1", *big, *rows, f"--output={kept}"),
        ("--config=experiments/llama3.py:llama3_405b", "--topology=cuda:8"),
    )
    status, _, errors = activations
    assert status == 1
    assert re.search(r"does not fit on TPU v5 lite: .*[\d.]+[GT] of 15.75G\. Per device", errors)
    assert "parameters 0.0" in errors and "RESOURCE_EXHAUSTED" not in errors
    assert "--config.model.transformer.remat=FULL" in errors
    assert "--config.accumulation=4096" in errors
    numbers = json.loads(kept.read_text())
    assert numbers["problem"] in errors and {"date", "versions", "topology"} < set(numbers)
    status, output, errors = arguments
    assert status == 1 and "GB of 80 GB before anything is computed" in errors and not output
    assert "these alone take most of it: more devices along the mesh axes fsdp" in errors


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (67.36G) exceeds available HBM (31.24G).",
            "temporaries alone 67.36G of 31.24G",
        ),
        (
            "E1000. Ran out of memory in memory space hbm. Used 29.21G of 15.75G hbm. Exceeded",
            "29.21G of 15.75G",
        ),
        ("RESOURCE_EXHAUSTED: of another kind\nmore", "RESOURCE_EXHAUSTED: of another kind"),
    ],
)
def test_memory_wanted_in_the_messages_of_the_compiler(message, wanted):
    assert compilation.memory_wanted(message) == wanted


def test_sweep(tmp_path):
    tried = ("--sweep", "--sweep_tensor=1,2", "--sweep_rows=4,8", "--sweep_remat=FULL")
    (rows,), text = reports(tmp_path, (SMOKE, "--topology=v5e:2x2", *tried))
    assert {(row["tensor"], row["rows"]) for row in rows} == {(1, 4), (1, 8), (2, 4), (2, 8)}
    assert all("problem" not in row for row in rows) and any(row["pareto"] for row in rows)
    assert "| data | fsdp | tensor | expert | context | remat | rows |" in text


def test_a_sweep_keeps_the_axes_that_it_does_not_try():
    config = load_experiment_file(ROOT / "experiments" / "llama3.py").smoke()
    axes = sweep.Axes(tensor=(1, 2), remat=(Remat.FULL,))
    meshes = []

    def make_mesh(mesh):
        meshes.append(mesh)
        raise ValueError("not made")

    base, phase = MeshConfig(context=2), config.phases[0]
    rows = sweep.sweep(config, phase, "v5e:2x2", base, make_mesh, axes, lambda line: None)
    assert meshes == [MeshConfig(data=1, fsdp=-1, tensor=size, context=2) for size in (1, 2)]
    assert [row["problem"] for row in rows] == ["not made"] * 2
    assert "| 1 |  | 2 | 1 | 2 | FULL | 8 | not made |" in sweep.format_sweep(rows)


def test_remat_of_a_sweep():
    none, full = Remat.NONE, Remat.FULL

    def policies(config, remat):
        return [part.remat for _, part in compilation.stacks_of(sweep.with_remat(config, remat))]

    plain = llama3.small(vocab_size=8, num_layers=1, d_model=8, num_heads=1)
    assert policies(plain, full) == [full]
    runs = load_experiment_file(ROOT / "experiments" / "blt.py")
    assert policies(runs.smoke().blt.model, full) == [full] * 3
    # The paper sizes store everything of the small encoder.
    assert policies(runs.blt_1b().blt.model, full) == [none, full, full]


MODELS = ("llama3", "blt", "megalodon")


@pytest.fixture(scope="module")
def inference(tmp_path_factory):
    """Reports of prefill and decode of every model that decodes, by (model, program)."""
    names = [(model, program) for model in MODELS for program in ("prefill", "decode")]
    lines = [
        (
            f"--config=experiments/{model}.py:smoke",
            *("--topology=v5e:2x2", f"--program={program}", "--batch=8", "--length=64"),
        )
        for model, program in names
    ]
    found, _ = reports(tmp_path_factory.mktemp("inference"), *lines)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_prefill_and_decode_step(model, inference):
    prefill, decode = (inference[model, program] for program in ("prefill", "decode"))
    assert (prefill["tokens"], decode["tokens"]) == (8 * 64, 8)
    for numbers in (prefill, decode):
        sizes = numbers["bytes_per_device"]
        assert "optimizer" not in sizes and sizes["arguments"] <= sizes["peak"] < sizes["memory"]
        assert numbers["flops"]["program"] > 0
    kept = [numbers["bytes_per_device"]["parameters"] for numbers in (prefill, decode)]
    assert kept[0] == kept[1]
    own = sum(row["bytes_per_device"] for row in prefill["parameters"])
    # A BLT decodes with its entropy model.
    assert kept[0] > own if model == "blt" else kept[0] == own


def test_the_cache_is_an_input_of_a_decode_step(inference):
    keys_and_values = 2 * 8 * 2 * 64 * 8 * 2  # of 8 rows, 2 heads, 64 slots, width 8, bfloat16
    inputs = inference["llama3", "decode"]["bytes_per_device"]["inputs"]
    assert keys_and_values / 4 < inputs < keys_and_values / 4 + 100


def test_data_axis_across_slices(tmp_path):
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    (numbers,), _ = reports(tmp_path, (SMOKE, "--topology=v5e:2x2", "--slices=2", *mesh))
    assert numbers["devices"] == 8
    assert {name: numbers["mesh"][name] for name in ("data", "fsdp")} == {"data": 2, "fsdp": 4}
    across = [row for row in numbers["collectives"] if row["between_slices"]]
    # Weights stay inside a slice: only sums (of gradients, metrics) cross.
    assert {row["kind"] for row in across} == {"all-reduce"}
    own = numbers["bytes_per_device"]["parameters"]
    assert own / 2 <= sum(row["sent"] for row in across) < 4 * own  # gradients in bfloat16
    assert "between slices are not in it" in numbers["estimate"]["note"]


def test_rows_of_a_llama_on_two_devices(tmp_path):
    """The reach of its attention depends on the device: loops without a known length."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
    (numbers,), _ = reports(tmp_path, (SMOKE, "--topology=v5e:2x2", *mesh))
    assert numbers["mesh"]["context"] == 2 and not numbers["flops"]["exact"]
    assert "loops whose length depends on data are counted once" in numbers["estimate"]["note"]
    assert any("context" in row["axes"] for row in numbers["collectives"])


def test_moving_average_of_a_row_on_two_devices(tmp_path):
    """A train step of Megalodon with the TPU kernel inside the context axis."""
    line = ("--config=experiments/megalodon.py:smoke", "--topology=v5e:2x2")
    mesh = ("--config.mesh.data=2", "--config.mesh.context=2")
    (numbers,), _ = reports(tmp_path, (*line, *mesh, "--config.model.scan_form=TPU"))
    assert numbers["mesh"]["context"] == 2
    rows, width, size = 8 // 2, 32, 8
    states = 4 * 2 * rows * width * size  # one part, real or imaginary, of both devices
    gathered = [row for row in numbers["collectives"] if row["kind"] == "all-gather"]
    assert (["context"], states) in [(row["axes"], row["bytes"]) for row in gathered]


def test_lowering_for_cuda(tmp_path):
    (numbers,), text = reports(tmp_path, (SMOKE, "--topology=cuda:8"))
    assert numbers["devices"] == 8 and numbers["module_bytes"] > 10_000
    estimate, sizes, flops = (numbers[key] for key in ("estimate", "bytes_per_device", "flops"))
    assert "not compiled" in estimate["note"] and "step_seconds" not in estimate
    assert estimate["least_seconds"] == pytest.approx(flops["program"] / 8 / 989e12)
    assert estimate["most_mfu"] == pytest.approx(flops["model"] / flops["program"])
    assert 0 < sizes["arguments"] < sizes["memory"] == 80e9
    assert "bounds by the products" in text


def test_every_training_of_a_run_is_compiled(tmp_path):
    recipe = ("--config=experiments/contrastive_decoding.py:smoke", "--topology=cuda:4")
    (both, one), text = reports(tmp_path, recipe, (*recipe, "--part=small"))
    assert set(both) == {"expert", "small"}
    assert both["small"]["parameters"] == one["parameters"] != both["expert"]["parameters"]
    assert "expert: cuda:4" in text and "small: cuda:4" in text
    ((status, output, _),) = programs((*recipe, "--program=decode"))
    assert status == 0 and "only expert; --part chooses among expert, small" in output


def test_bad_command_lines():
    expected = [
        ((SMOKE, "--topology=v5e:3x999"), "libtpu does not know it"),
        (("--config=experiments/llama3.py:nothing",), "its runs are"),
        ((SMOKE, "--topology=v5e:2x2", "--part=blt"), "--part=blt"),
        ((SMOKE, "--topology=v5e:2x2", "--phase=7"), "phases 0..1"),
        ((SMOKE, "--topology=cuda:8", "--estimate=unrolled"), "only for --program=train"),
        ((SMOKE, "--topology=v9:2x2"), "v4, v5e, v5p, v6e"),
        ((SMOKE, "--topology=cuda:8", "--sweep"), "--sweep: only for --program=train on a TPU"),
        ((SMOKE, "--sweep", "--program=decode"), "--sweep: only for --program=train on a TPU"),
        ((SMOKE, "--topology=v5e:2x2", "--sweep", "--sweep_tensor=a"), "--sweep_tensor=a: must be"),
        ((SMOKE, "--topology=v5e:2x2", "--sweep", "--sweep_rows=0"), "--sweep_rows=0: must be"),
        ((SMOKE, "--topology=v5e:2x2", "--sweep", "--sweep_remat=some"), "allowed are NONE"),
        ((SMOKE, "--topology=v5e:2x2", "--slices=0"), "--slices=0: must be >= 1"),
        ((SMOKE, "--topology=cuda:8", "--slices=2"), "--slices=2: only for TPU"),
        ((SMOKE, "--batch=4"), "--batch=4: only for --program=prefill and decode"),
        ((SMOKE, "--length=4"), "--length=4: only for --program=prefill and decode"),
        ((SMOKE, "--program=decode", "--batch=-4"), "--batch=-4: must be >= 0"),
        ((SMOKE, "--topology=cuda:4", "--program=decode", "--batch=3"), "must be a multiple of 4"),
        (("--config=experiments/llama3.py:proof",), "Comparison has no training of its own"),
    ]
    results = programs(*(line for line, _ in expected))
    for (line, message), (status, _, errors) in zip(expected, results, strict=True):
        assert status == 2 and message in errors, line
