"""Every run of every experiment file: valid, listed, and equal to its kept flat text."""

import os
import pathlib

import pytest

from blt_jax.train import configs
from blt_jax.train.launch import load_experiment_file

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted((ROOT / "experiments").glob("*.py"))
RUNS = [
    pytest.param(path, function.__name__, id=f"{path.stem}.{function.__name__}")
    for path in FILES
    for function in load_experiment_file(path).RUNS
]


@pytest.mark.parametrize(("path", "run"), RUNS)
def test_config_equals_its_kept_text(path, run):
    """A change of any run shows here; UPDATE_GOLDEN=1 pytest tests/experiments rewrites."""
    config = load_experiment_file(path).get_config(run)
    configs.validate(config)
    text, file = configs.to_text(config), GOLDEN / f"{path.stem}.{run}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_no_kept_text_is_left_over():
    assert {file.stem for file in GOLDEN.glob("*.txt")} == {param.id for param in RUNS}


def test_baselines_have_the_flops_of_the_tiny_blt():
    runs = load_experiment_file(ROOT / "experiments" / "blt.py")
    length, ratio = runs.TINY_LENGTH, runs.BPE_BYTES_PER_TOKEN
    flops = runs.tiny().blt.model.build().flops_per_token(length)
    by_byte = runs.byte_llama().build().flops_per_token(length)
    by_token = runs.bpe_llama().build().flops_per_token(round(length / ratio))
    assert by_byte == pytest.approx(flops, rel=0.02)
    assert by_token / ratio == pytest.approx(flops, rel=0.02)
