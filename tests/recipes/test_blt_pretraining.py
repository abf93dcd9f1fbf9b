"""The BLT recipe: entropies in pieces, their cache, calibration, and the run as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import init_params
from blt_jax.interop import model_files
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.recipes import blt_pretraining as recipe
from blt_jax.recipes.patch_figure import patch_figure
from blt_jax.train.pretraining import Pretraining, make_context
from blt_jax.train.writers import read_metrics
from experiments import blt as runs


@pytest.fixture(scope="module")
def entropy_model():
    stack = TransformerConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=32, window=5)
    model = blt.EntropyModelConfig(transformer=stack).build()
    return model, init_params(model, jax.random.key(0))


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(4, 260, n - 2) for n in lengths]
    return [np.concatenate([[1], body, [2]]).astype(np.int32) for body in bodies]


@pytest.mark.parametrize("reset", [False, True])
def test_entropies_in_pieces_equal_those_of_the_whole_document(entropy_model, reset):
    model, params = entropy_model
    texts = documents([70, 3, 41])
    texts[0][[10, 30]] = 10 + 4  # newlines
    found = recipe.model_entropies(
        model, params, texts, chunk=16, batch_size=3, reset_at_newline=reset
    )
    for tokens, values in zip(texts, found, strict=True):
        rows, segments = tokens[None], np.ones((1, len(tokens)), np.int32)
        whole = recipe._entropies_of_rows(model, params, rows, segments, reset)
        np.testing.assert_allclose(values, np.asarray(whole)[0], atol=1e-5)
    plain = recipe.model_entropies(model, params, texts, reset_at_newline=not reset)
    assert np.abs(plain[0] - found[0]).max() > 1e-3


def test_entropies_are_computed_once_and_the_oldest_go():
    calls = []

    def compute(batch):
        calls.append(len(batch))
        return [np.full(len(tokens), tokens[1], np.float32) for tokens in batch]

    a, b, c = documents([5, 6, 7])
    table = recipe.DocumentEntropies(compute, capacity=2)
    table.fill([a, b, a])
    assert calls == [2]
    np.testing.assert_array_equal(table(a), np.full(5, a[1]))
    table(c)  # drops a
    table(b)
    assert calls == [2, 1]
    table(a)
    assert calls == [2, 1, 1]


def test_cross_fitted_ngrams_score_a_document_without_its_own_counts():
    texts = documents([400] * 6)
    fitted = recipe.CrossFittedNgrams.build(texts, order=3)
    in_sample = recipe.ngram_entropy(texts, order=3)
    held_out = np.mean([values.mean() for values in fitted(texts)])
    assert held_out > np.mean([in_sample(tokens).mean() for tokens in texts]) + 0.5
    with pytest.raises(ValueError, match="at least two different training documents"):
        recipe.CrossFittedNgrams.build(texts[:1], order=3)


def test_exact_ngram_tables_of_a_run_are_kept_with_it(tmp_path):
    config = runs.smoke()
    ngrams = blt.NgramConfig(kind=blt.NgramKind.EXACT, sizes=(3,), vocab_size=100)
    model = dataclasses.replace(config.blt.model, ngrams=ngrams)
    config = dataclasses.replace(
        config,
        blt=dataclasses.replace(config.blt, model=model, steps=2),
        patcher=PatcherConfig(kind=PatcherKind.SPACE),
        prompts=(),
    )
    config.run(make_context(tmp_path, make_mesh(devices=jax.devices()[:1]), jax.random.key(0)))
    loaded, params = model_files.load_model(tmp_path)
    assert loaded.ngram_tables.keys[3].shape == (96, 3)
    assert model_files.load_patcher(tmp_path) == config.patcher
    tokens = jnp.array([[1, 104, 105, 106, 107, 108]], jnp.int32)
    output = loaded.apply({"params": params}, tokens, jnp.ones((1, 7), bool))
    assert np.isfinite(output.logits).all()


def test_patch_figure_has_one_cell_per_byte_and_checks_lengths():
    text = b"def f():\n"
    starts = np.array([True, False, False, True, True] + [False] * 4)
    figure = patch_figure(text, starts, np.linspace(0, 2, 9), 1.0, bytes_per_row=5)
    assert len(figure.axes) == 2
    cells = [cell.get_facecolor() for axis in figure.axes for cell in axis.patches[-9:]]
    assert len(set(cells)) > 1
    with pytest.raises(ValueError, match="need as many starts"):
        patch_figure(text, starts[:-1])


def test_smoke_run_leaves_numbers_figure_patcher_and_text(tmp_path):
    config = runs.smoke()
    numbers = config.run(
        make_context(tmp_path, make_mesh(devices=jax.devices()[:1]), jax.random.key(0))
    )
    assert abs(numbers["patch_size"] / 4.0 - 1) < 0.02
    assert 0 < numbers["bits_per_byte"] < 9
    assert 0 < numbers["padding_rate"] < 0.5 and numbers["drop_rate"] == 0
    assert model_files.load_patcher(tmp_path).threshold == numbers["threshold"]
    assert (tmp_path / "figures" / "patches.png").stat().st_size > 10_000
    assert (tmp_path / "entropy_model" / "metrics.jsonl").exists()
    again = config.run(
        make_context(tmp_path, make_mesh(devices=jax.devices()[:1]), jax.random.key(0))
    )
    assert again["bits_per_byte"] == numbers["bits_per_byte"]
    assert "def " in (tmp_path / "texts" / "samples.txt").read_text()


def test_calibration_to_the_size_of_space_patches(tmp_path):
    config = dataclasses.replace(runs.smoke(), match_space=True, ngram_order=3)
    sample = recipe.take_bytes(recipe.tokenized_documents(config.blt.data), 20_000)
    fitted = recipe.DocumentEntropies(recipe.CrossFittedNgrams.build(sample, 3))
    patcher = config._calibrated(sample, fitted)
    space = recipe._patch_sizes(PatcherConfig(kind=PatcherKind.SPACE), sample, None)["patch_size"]
    assert abs(recipe._patch_sizes(patcher, sample, fitted)["patch_size"] / space - 1) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy_model": None}, "needs entropies"),
        ({"ngram_order": -1}, "ngram_order=-1"),
        ({"patcher": PatcherConfig(kind=PatcherKind.TOPK, target_patch_size=4.0)}, "not causal"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(runs.smoke(), **changes)


def test_rows_and_model_must_agree_on_the_number_of_patches():
    config = runs.smoke()
    data = dataclasses.replace(config.blt.data, max_patches=40)
    with pytest.raises(ValueError, match="max_patches=40"):
        dataclasses.replace(config, blt=dataclasses.replace(config.blt, data=data))
    assert isinstance(config.blt, Pretraining)


def test_rows_in_pieces_train_alike_on_every_mesh(tmp_path):
    """Context parallelism from the data to the losses; the mesh never changes a run."""
    config = runs.smoke()
    ngrams = blt.NgramConfig(sizes=(3, 4), vocab_size=252)
    model = dataclasses.replace(config.blt.model, row_pieces=2, ngrams=ngrams)
    data = dataclasses.replace(config.blt.data, row_pieces=2, piece_halo=model.piece_halo)
    config = dataclasses.replace(
        config,
        blt=dataclasses.replace(config.blt, model=model, data=data, steps=3),
        patcher=PatcherConfig(kind=PatcherKind.SPACE),
        prompts=(),
    )
    numbers = []
    for count, axes in ((1, {}), (4, {"fsdp": 2, "context": 2})):
        mesh = make_mesh(MeshConfig(data=1, **axes), jax.devices()[:count])
        folder = tmp_path / str(count)
        numbers.append(config.run(make_context(folder, mesh, jax.random.key(0))))
    for name in ("bits_per_byte", "padding_rate"):
        np.testing.assert_allclose(numbers[1][name], numbers[0][name], rtol=1e-5, err_msg=name)
    one, four = (read_metrics(tmp_path / folder)[0] for folder in ("1", "4"))
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, err_msg=name)
    short = dataclasses.replace(data, piece_halo=3)
    with pytest.raises(ValueError, match="piece_halo=3; the model's windows and n-grams need"):
        dataclasses.replace(config, blt=dataclasses.replace(config.blt, data=short))
    whole = dataclasses.replace(runs.smoke().blt.data, repeat=False)
    whole = dataclasses.replace(config.blt.evaluation, data=whole)
    with pytest.raises(ValueError, match="have row_pieces=1, the model 2; they must be equal"):
        dataclasses.replace(config, blt=dataclasses.replace(config.blt, evaluation=whole))
