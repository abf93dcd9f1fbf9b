"""Our side of every benchmark runs, at sizes that say nothing of speed."""

import jax
import numpy as np
import pytest

from benchmarks import (
    blt_generation,
    blt_operations,
    blt_peer,
    blt_training,
    contrastive_decoding,
    llama_options,
    megalodon_training,
    reporting,
    streaming_llm,
)
from benchmarks.megalodon_peer import its_settings


@pytest.fixture
def tables(monkeypatch):
    """What the programs would have kept."""
    kept = {}
    monkeypatch.setattr(reporting, "save", lambda name, text, rows: kept.update({name: rows}))
    return kept


def test_streaming_llm(tables, monkeypatch):
    sizes = dict(CACHES=(8,), WIDTHS=(16,), STREAM_CACHES=(8,), STREAM=24, ALTERNATIONS=1)
    for name, value in sizes.items():
        monkeypatch.setattr(streaming_llm, name, value)
    monkeypatch.setattr(streaming_llm, "STEPS", dict.fromkeys(("sinks", "recompute"), 2))
    streaming_llm.main()
    cases = [row["case"] for row in tables["streaming_llm"]]
    assert len(cases) == 9 and all(row["ms_per_token"] > 0 for row in tables["streaming_llm"])


def test_contrastive_decoding(monkeypatch):
    tiny = dict(num_layers=1, d_model=16, num_heads=2)
    for name, value in dict(EXPERT=tiny, AMATEURS={"equal": tiny}, NEW=3, RUNS=1).items():
        monkeypatch.setattr(contrastive_decoding, name, value)
    rows = contrastive_decoding.measure(2, "equal")
    assert [row["decoder"] for row in rows] == ["expert", "amateur", "pair"]
    assert rows[2]["over_parts"] > 0 and rows[0]["times_expert"] == 1


def test_llama_options(monkeypatch):
    monkeypatch.setattr(llama_options, "TOKENS", 16)
    monkeypatch.setattr(llama_options, "RUNS", 1)
    chosen = dict(list(llama_options.options().items())[:2])
    monkeypatch.setattr(llama_options, "options", lambda: chosen)
    rows = llama_options.measure(8)
    assert [row["option"] for row in rows] == list(chosen)
    assert rows[0]["times_default"] == 1.0


def test_blt_operations():
    for fast, dense, floats, integers in blt_operations.cases(64).values():
        a, b = (blt_operations.with_gradients(form)(floats, integers) for form in (fast, dense))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a, b)
    assert set(blt_operations.measure({"none": lambda: 0.0})) == {"none"}


def test_blt_training_and_generation(monkeypatch):
    tokens, lengths = blt_training.tokens_of(64), blt_peer.variable_lengths(64)
    step = blt_training.our_train_step(tokens, lengths)
    step()
    monkeypatch.setattr(blt_generation, "NEW_BYTES", 3)
    assert blt_generation.our_run(16, 2, spread=True)() > 0


def test_megalodon_training(monkeypatch):
    monkeypatch.setattr(megalodon_training, "RUNS", 1)
    with its_settings():
        row = megalodon_training.measure("step", 8)
    assert row["ratio"] > 0 and row["largest_difference"] < 2e-4
