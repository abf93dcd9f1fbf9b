"""The kept results of the proofs show the claimed effects; slow tests make them again."""

import json
import pathlib

import jax
import pytest

from blt_jax.train.launch import load_experiment_file, run_experiment

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

NGRAM_GAIN = 0.03
"""Bits per byte that hash n-grams must gain (arXiv 2412.09871, ablation of section 7)."""


def kept(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def check_blt(numbers: dict[str, float], seeds: int) -> None:
    metric = "bits_per_byte"
    gain = numbers[f"entropy_4_no_ngrams/{metric}"] - numbers[f"entropy_4/{metric}"]
    assert gain >= NGRAM_GAIN
    for name in ("strided_4", "space", "entropy_as_space"):
        assert 0 < numbers[f"{name}/{metric}"] < 8
        if seeds > 1:
            assert numbers[f"{name}/interval"] > 0


def check_llama3(numbers: dict[str, float]) -> None:
    assert numbers["annealed/bits_per_byte"] < numbers["constant/bits_per_byte"]


def test_blt_proof_shows_the_gain_of_hash_ngrams():
    results = kept("blt_proof_seeds")
    assert results["config"]["seeds"] == "(0, 1, 2)"
    check_blt(results["numbers"], seeds=3)


def test_llama3_proof_shows_the_gain_of_annealing():
    check_llama3(kept("llama3_proof_seeds")["numbers"])


def test_kept_results_name_commit_device_and_versions():
    for name in ("blt_tiny", "blt_proof_seeds", "llama3_tiny", "llama3_proof_seeds"):
        results = kept(name)
        assert results["device"] and results["versions"]["jax"] and results["commit"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["blt", "llama3"])
def test_proof_again(system, tmp_path):
    config = load_experiment_file(ROOT / "experiments" / f"{system}.py").get_config("proof")
    numbers = run_experiment(config, tmp_path)
    if system == "blt":
        check_blt(numbers, seeds=1)
    else:
        check_llama3(numbers)
    assert jax.default_backend() in ("cpu", "gpu", "tpu")
