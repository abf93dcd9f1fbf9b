"""Loss by position: in chunks of the attention it adds up to that of all positions."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.data.loader import evaluation_config, loader
from blt_jax.data.packing import Packing
from blt_jax.dist.mesh import make_mesh
from blt_jax.layers.losses import target_nats
from blt_jax.models import megalodon
from blt_jax.recipes.long_context import ChunkBoundaries
from blt_jax.train import pretraining
from blt_jax.train.launch import load_experiment_file, run_experiment
from blt_jax.train.optimizer import OptimizerConfig

ROOT = pathlib.Path(__file__).parents[2]
RUNS = load_experiment_file(ROOT / "experiments" / "megalodon.py")
CHUNK, LENGTH, START, ROWS = 16, 64, 4, 3


def config(**changes) -> ChunkBoundaries:
    smoke = RUNS.smoke()
    names = {field.name for field in dataclasses.fields(ChunkBoundaries)}
    shared = {f.name: getattr(smoke, f.name) for f in dataclasses.fields(smoke) if f.name in names}
    shared |= dict(
        model=dataclasses.replace(
            smoke.model,
            ema=megalodon.EmaKind.NONE,
            norm=megalodon.NormKind.LAYER,
            residual=megalodon.ResidualKind.PRE_NORM,
        ),
        steps=2,
        prompts=(),
        rows=ROWS,
        start=START,
    )
    return ChunkBoundaries(**shared | changes)


def test_the_loss_in_chunks(tmp_path, monkeypatch):
    fits = []
    fit = pretraining.Pretraining.fit

    def keep(self, *arguments, **options):
        fits.append(fit(self, *arguments, **options))
        return fits[-1]

    monkeypatch.setattr(ChunkBoundaries, "fit", keep)
    small = config()
    assert (small.model.chunk_size, small.data.sequence_length) == (CHUNK, LENGTH)
    numbers = run_experiment(small, tmp_path, mesh=make_mesh(devices=jax.devices()[:1]))
    (kept,) = fits
    data = evaluation_config(small.data, batch_size=1, packing=Packing.ONE_DOCUMENT)
    nats, rows = np.zeros(LENGTH), 0
    for batch in loader(data):
        batch = jax.tree.map(jnp.asarray, batch)
        if (batch["segment_ids"] > 0).all() and rows < ROWS:
            logits = kept.model.apply({"params": kept.params}, batch["tokens"]).logits
            mask = np.asarray(batch["target_mask"])[0]
            nats += np.where(mask, np.asarray(target_nats(logits, batch["targets"])[0])[0], 0.0)
            rows += 1
        if rows == ROWS:
            break
    bits = nats.reshape(-1, CHUNK)[1:].sum(0) / np.log(2) / (ROWS * (LENGTH / CHUNK - 1))
    found = numbers["bits_per_byte_at_start"], numbers["bits_per_byte_in_rest"]
    np.testing.assert_allclose(found, [bits[:START].mean(), bits[START:].mean()], rtol=1e-5)
    assert numbers["boundary_jump"] == pytest.approx(found[0] - found[1])
    assert numbers["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(kept.params))
    assert (tmp_path / "figures" / "loss_in_chunk.png").exists()


def test_statistics_of_the_last_chunks(tmp_path):
    """After 4 chunks of 16 the norms are others: within the trained length nothing changes."""
    smoke = dataclasses.replace(RUNS.smoke(), steps=2, prompts=(), sample_tokens=0)
    numbers = run_experiment(smoke, tmp_path)
    within, beyond = numbers["bits_per_byte_within"], numbers["bits_per_byte_beyond"]
    assert numbers["truncated_bits_per_byte_within"] == pytest.approx(within, rel=1e-6)
    assert 1e-4 < abs(numbers["truncated_bits_per_byte_beyond"] - beyond) < 0.5
    assert numbers["truncated_bits_per_byte_to_128"] == numbers["truncated_bits_per_byte_beyond"]
    llama = dict(model=RUNS.proof_llama(), optimizer=OptimizerConfig())
    with pytest.raises(ValueError, match=r"LongContext\.truncate_chunks=4: must be 0 for a Llama3"):
        dataclasses.replace(smoke, **llama)
    with pytest.raises(ValueError, match=r"LongContext\.truncate_chunks=3: must be >= 4 chunks"):
        dataclasses.replace(smoke, truncate_chunks=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"ChunkBoundaries\.rows=0: must be >= 1"),
        ({"model": RUNS.proof_llama()}, r"ChunkBoundaries\.model=Llama3Config.*MegalodonConfig"),
        ({"start": 16}, r"ChunkBoundaries\.start=16: must be in \[1, 16\), 16 is the chunk"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gaps": ()}, r"Recall\.gaps=\(\): must be >= 0, not empty"),
        ({"gaps": (63,)}, r"Recall\.data\.sequence_length=64: must be >= 65 for gaps=\(63,\)"),
    ],
)
def test_refused_settings_of_recall(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUNS.recall(RUNS.recall_megalodon()), **changes)


def test_too_few_rows(tmp_path):
    with pytest.raises(
        ValueError, match=r"ChunkBoundaries\.rows=100000: the validation split has only"
    ):
        run_experiment(config(rows=100_000), tmp_path)
