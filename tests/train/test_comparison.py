"""Comparisons: table, figure, intervals over seeds, finished runs are not run again."""

import dataclasses
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.train import comparison, configs
from blt_jax.train.launch import run_experiment
from blt_jax.train.pretraining import Experiment
from tests.train.tiny_model import tiny_experiment

RAN = []


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Constant(Experiment):
    """Returns `value` plus a tenth of its seed."""

    value: float = 0.0

    def run(self, context):
        RAN.append((self.value, self.seed))
        context.writer.scalars(1, {"score": self.value})
        return {"score": self.value + 0.1 * self.seed, "size": 10.0 * self.seed}


def _mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def _pair(**changes):
    runs = (("base", Constant(value=1.0)), ("better", Constant(value=0.5)))
    return comparison.Comparison(runs=runs, metric="score", **changes)


def test_table_figure_and_numbers(tmp_path):
    RAN.clear()
    numbers = run_experiment(_pair(), tmp_path, _mesh())
    assert RAN == [(1.0, 0), (0.5, 0)]
    assert numbers == {"base/score": 1.0, "better/score": 0.5, "better/difference": -0.5}
    assert (tmp_path / "figures" / "comparison.png").stat().st_size > 1000
    table = (tmp_path / "comparison.txt").read_text().splitlines()
    assert table[0].split() == ["run", "score", "difference", "to", "base", "runs"]
    assert table[2].split() == ["better", "0.5000", "-0.5000", "1"]
    # Again: nothing runs, the numbers are the same.
    assert run_experiment(_pair(), tmp_path, _mesh()) == numbers
    assert len(RAN) == 2


def test_seeds_give_paired_differences_and_intervals(tmp_path):
    RAN.clear()
    numbers = run_experiment(_pair(seeds=(1, 2, 4)), tmp_path, _mesh())
    assert RAN == [(1.0, 1), (1.0, 2), (1.0, 4), (0.5, 1), (0.5, 2), (0.5, 4)]
    values = 1.0 + 0.1 * np.array([1, 2, 4])
    # Student's t for two degrees of freedom, 97.5%: 4.30265.
    interval = 4.30265 * values.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(numbers["base/score"], values.mean())
    np.testing.assert_allclose(numbers["base/interval"], interval, rtol=1e-5)
    np.testing.assert_allclose(numbers["better/difference"], -0.5)
    np.testing.assert_allclose(numbers["better/difference_interval"], 0.0, atol=1e-12)
    rows = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    np.testing.assert_allclose(rows["base"]["values"], values)


def test_further_numbers_are_means_beside_the_metric(tmp_path):
    numbers = run_experiment(_pair(seeds=(1, 2), further=("size", "absent")), tmp_path, _mesh())
    assert numbers["base/size"] == numbers["better/size"] == 15.0
    assert not any("absent" in name for name in numbers)
    table = (tmp_path / "comparison.txt").read_text().splitlines()
    assert table[5].split() == ["size", "15", "15"]


def test_a_metric_of_the_end_alone_has_no_panel_of_curves(tmp_path):
    widths = []
    for metric in ("score", "size"):
        config = dataclasses.replace(_pair(), metric=metric)
        run_experiment(config, tmp_path / metric, _mesh())
        image = matplotlib.image.imread(tmp_path / metric / "figures" / "comparison.png")
        widths.append(image.shape[1])
    assert widths[1] < 0.6 * widths[0]


def test_seed_reaches_initialisation_and_data():
    experiment = configs.replace_seeds(tiny_experiment(), 7)
    assert experiment.seed == 7
    assert experiment.data.seed == 7
    assert tiny_experiment().data.seed == 0


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((), "runs is empty"),
        ((("a", Constant()), ("a", Constant())), "names must differ"),
        ((("a/b", Constant()),), "name 'a/b'"),
    ],
)
def test_bad_comparisons_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        comparison.Comparison(runs=runs)


def test_unknown_metric_names_those_there_are(tmp_path):
    bad = comparison.Comparison(runs=(("a", Constant()),), metric="scor")
    with pytest.raises(ValueError, match=r"metric='scor': run 'a' gives \['score', 'size'\]"):
        run_experiment(bad, tmp_path, _mesh())
