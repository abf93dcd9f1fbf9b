"""The kept reports of pod layouts: of today's configs, and the table made from them."""

import importlib.util
import math
import pathlib

import pytest

from blt_jax.dist import topology
from blt_jax.dist.sharding import sharding_report
from blt_jax.train import compilation
from blt_jax.train.launch import load_experiment_file
from blt_jax.train.pretraining import trainings

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def make_pods():
    spec = importlib.util.spec_from_file_location("make_pods", RESULTS / "make_pods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = make_pods()
REPORTS = PAGE.reports()
CONFIGS = {
    function.__name__: function
    for file in ("blt", "llama3", "megalodon")
    for function in load_experiment_file(ROOT / "experiments" / f"{file}.py").RUNS
}


def test_table_is_made_from_the_kept_reports():
    assert (RESULTS / "pods.md").read_text() == PAGE.page()


def test_every_pod_run_has_a_report_of_its_trainings():
    pods = {name for name in CONFIGS if name.rpartition("_")[2].isdigit()}
    assert {run for run, _, _ in REPORTS} == pods
    for run, part, _ in REPORTS:
        assert (part or ".") in trainings(CONFIGS[run]())


@pytest.mark.parametrize(
    ("run", "part", "numbers"),
    [pytest.param(*kept, id=" ".join(kept[:2]).strip()) for kept in REPORTS],
)
def test_report_is_of_the_config_of_today(run, part, numbers):
    config = CONFIGS[run]()
    shape = numbers["topology"].partition(":")[2].split("x")
    mesh = topology.mesh(f"cuda:{math.prod(map(int, shape))}", config.mesh)
    _, training = compilation.select_part(config, part)
    phase = compilation.select_phase(training)
    job = compilation.train_job(training, phase, mesh)
    if "problem" in numbers:
        for name in ("parameters", "optimizer"):
            assert f"{name} {job.sizes[name] / 1e9:.2f} GB" in numbers["problem"]
        assert "these alone take most of it: more devices along the mesh axes fsdp" in PAGE.row(
            run, numbers
        )
        return
    assert numbers["devices"] == mesh.size and numbers["mesh"] == dict(mesh.shape)
    sizes = numbers["bytes_per_device"]
    assert {name: sizes[name] for name in job.sizes} == job.sizes
    assert sizes["peak"] < 0.9 * sizes["memory"]
    assert (numbers["tokens"], numbers["flops"]["model"]) == (job.tokens, job.model_flops)
    assert numbers["parameters"] == sharding_report(job.model, mesh)
