"""Folders of Megalodon's authors; parity with another reader of them is in tests/parity."""

import dataclasses
import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blt_jax import convert
from blt_jax.interop import megalodon, model_files
from blt_jax.interop.weights import foreign_shapes
from blt_jax.layers.rope import RopeConfig
from blt_jax.models import megalodon_config
from blt_jax.models.megalodon_config import AttentionDropout, EmaKind, GateKind, WeightInit
from tests.interop import small

FILE = "model.safetensors"


def edit(path, change):
    tensors = dict(load_file(path / FILE))
    change(tensors)
    save_file(tensors, path / FILE)


def edit_options(path, **changes):
    attributes = json.loads((path / "config.json").read_text())
    attributes["model"] = {
        k: v for k, v in (attributes["model"] | changes).items() if v is not None
    }
    (path / "config.json").write_text(json.dumps(attributes))


@pytest.fixture
def folder(tmp_path):
    megalodon.save_megalodon(*small.megalodon(), tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "tied_embeddings": True,
            "scale_embeddings": True,
            "rescale_mlp": True,
            "swiglu": False,
            "rope": RopeConfig(theta=100_000.0),
            "initialization": WeightInit.XAVIER,
            "attention_dropout": 0.1,
            "attention_dropout_kind": AttentionDropout.KEYS,
        },
    ],
)
def test_round_trip(tmp_path, changes):
    model, params = small.megalodon(**changes)
    megalodon.save_megalodon(model, params, tmp_path, max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, again = megalodon.load_megalodon(tmp_path)
    assert loaded == model
    small.assert_equal(params, again)


def test_layout_of_the_tensors(folder):
    """What joins, splits and transposes, entry by entry."""
    _, params = small.megalodon()
    tensors, w = load_file(folder / FILE), params["layers"]
    np.testing.assert_array_equal(
        tensors["layers.1.mega.cema.gamma"],
        np.stack([w["ema_gamma_re"][1], w["ema_gamma_im"][1]], axis=-1),
    )
    assert tensors["layers.0.mega.cema.theta"].shape == (16, 1, 1)
    # Row h * J + j of a projection to heads is feature j of head h.
    np.testing.assert_array_equal(
        tensors["layers.1.mega.wv.weight"][6 + 2], w["value_kernel"][1, :, 1, 2]
    )
    np.testing.assert_array_equal(
        tensors["layers.0.mega.wh2.weight"][:, 6 + 2], w["out_kernel"][0, 1, 2]
    )
    np.testing.assert_array_equal(
        tensors["layers.0.mega.gamma"][1, 4 + 3], w["qk_gain"][0, 1, 1, 3]
    )
    np.testing.assert_allclose(tensors["rope.freqs"], [1.0, 0.01], rtol=1e-6)
    assert tensors["output.final_norm.prior_count"].dtype == np.int64


def test_narrow_types_leave_norms_and_averages_alone(tmp_path):
    model, params = small.megalodon()
    megalodon.save_megalodon(model, params, tmp_path, dtype=ml_dtypes.bfloat16)
    _, again = megalodon.load_megalodon(tmp_path, dtype=None)
    assert again["layers"]["value_kernel"].dtype == again["head"]["kernel"].dtype == jnp.bfloat16
    for name in ("ema_alpha", "ema_norm_weight", "norm_bias", "qk_gain", "mlp_norm_weight"):
        np.testing.assert_array_equal(again["layers"][name], params["layers"][name])


def in_ranks(folder, number):
    """Rewrites a folder as that of model-parallel ranks; returns the tensors of each."""
    tensors, ranks = load_file(folder / FILE), [{} for _ in range(number)]
    for name, x in tensors.items():
        axis = megalodon.RANK_AXIS.get(name.split(".")[-2])
        same = axis is None or x.ndim == 0
        parts = [x] * number if same else np.split(x, number, axis)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = np.asarray(part, order="C")
    (folder / FILE).unlink()
    (folder / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": number}))
    return ranks


def test_model_parallel_ranks(folder):
    ranks = in_ranks(folder, 2)

    def write(rank):
        save_file(ranks[rank], folder / f"consolidated.{rank:02d}.safetensors")

    write(0)
    with pytest.raises(FileNotFoundError, match=r"consolidated\.01\.safetensors"):
        megalodon.load_megalodon(folder)
    write(1)
    model, params = small.megalodon()
    loaded, again = megalodon.load_megalodon(folder)
    assert loaded == model
    small.assert_equal(params, again)
    ranks[1]["layers.0.nffn.norm.bias"] = ranks[1]["layers.0.nffn.norm.bias"] + 1
    write(1)
    with pytest.raises(ValueError, match=r"layers\.0\.nffn\.norm\.bias differs between files"):
        megalodon.load_megalodon(folder)
    del ranks[1]["embed.weight"]
    write(1)
    with pytest.raises(ValueError, match=r"01\.safetensors: missing tensors \['embed\.weight'\]"):
        megalodon.load_megalodon(folder)
    (folder / "consolidate_config.json").write_text('{"model_parallel_size": 0}')
    with pytest.raises(ValueError, match="model_parallel_size=0: must be >= 1"):
        megalodon.load_megalodon(folder)


def test_the_released_sizes():
    for make in ("mega_200m", "mega_1_3b", "mega_1_3b_pg19", "mega_7_1b", "mega_7_3b"):
        config = getattr(megalodon_config, make)()
        attributes = megalodon.write_megalodon(config)
        assert megalodon.read_megalodon(json.loads(json.dumps(attributes))) == config
    config = megalodon_config.mega_200m()
    shapes = foreign_shapes(megalodon.megalodon_table(config), config.build())
    fixed = megalodon.constants(config).values()
    assert sum(map(math.prod, shapes.values())) == 220_627_968
    assert shapes["layers.11.mega.wz.weight"] == (256, 1024) and len(fixed) == 1 + 3 * 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_window": 4}, "attention_window=4: the authors' code has 0 alone"),
        ({"prior_count": 2}, "prior_count=2"),
        ({"ema": EmaKind.REAL}, "ema=EmaKind.REAL"),
        ({"gate": GateKind.MEGA}, "gate=GateKind.MEGA"),
        ({"input_phase": True}, "input_phase=True"),
        ({"rope": RopeConfig(theta=1e4, scaling_factor=8.0)}, "rope=RopeConfig"),
    ],
)
def test_models_that_the_authors_code_does_not_have(changes, message):
    config = dataclasses.replace(small.megalodon()[0].config, **changes)
    with pytest.raises(ValueError, match=rf"MegalodonConfig\.{message}"):
        megalodon.write_megalodon(config)


def test_bad_folders(folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        megalodon.load_megalodon(folder / "nowhere")
    with pytest.raises(FileExistsError, match=r"already holds \['model\.safetensors'\]"):
        megalodon.save_megalodon(*small.megalodon(), folder)
    for options, message in (
        ({"attention_sink": 4}, r"config\.json\.model: unknown attributes \{'attention_sink': 4\}"),
        ({"attention_sink": None, "norm_affine": False}, "norm_affine=False is not supported"),
        ({"norm_affine": True, "output_size": 7}, "output_size=7 is not supported"),
        ({"output_size": -1, "init_mode": "zero"}, "init_mode='zero': allowed are"),
        ({"init_mode": "none", "value_dim": 16}, "shapes that do not fit the config"),
    ):
        edit_options(folder, **options)
        with pytest.raises(ValueError, match=message):
            megalodon.load_megalodon(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.mega.beta"), r"missing.*layers\.1\.mega\.beta"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), r"unexpected tensors \['extra'\]"),
        (
            lambda t: t.update({"rope.freqs": t["rope.freqs"] * 2}),
            r"rope\.freqs is .*the config says",
        ),
        (
            lambda t: t.update({"output.final_norm.prior_count": np.array(3)}),
            r"final_norm\.prior_count is 3\.0, the config says 0",
        ),
        (lambda t: t.update({"embed.weight": np.ones((3, 3), np.int64)}), "types of .*embed"),
    ],
)
def test_bad_tensors(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        megalodon.load_megalodon(folder)


def test_two_tables_where_one_is_tied(tmp_path):
    changes = {"tied_embeddings": True, "swiglu": False, "rescale_mlp": True}
    megalodon.save_megalodon(*small.megalodon(**changes), tmp_path)
    edit(tmp_path, lambda t: t.update({"output.output.weight": t["embed.weight"] + 1}))
    with pytest.raises(ValueError, match=r"share_emb=True, but output\.output\.weight is not"):
        megalodon.load_megalodon(tmp_path)


def test_convert(folder, tmp_path, capsys):
    ours, target = tmp_path / "ours", tmp_path / "target"

    def run(*arguments):
        return convert.main(["convert", *map(str, arguments)])

    assert run("--from=megalodon", f"--input={folder}", f"--output={ours}") == 0
    small.assert_equal(model_files.load_model(ours)[1], small.megalodon()[1])
    assert run("--to=megalodon", f"--input={ours}", f"--output={target}") == 0
    for file in (FILE, "config.json"):
        assert (folder / file).read_bytes() == (target / file).read_bytes(), file
    edit_options(folder, num_layers=3)
    assert run("--from=megalodon", f"--input={folder}", f"--output={tmp_path / 'no'}") == 1
    assert "missing tensors ['layers.2." in capsys.readouterr().err
    model, params = small.llama()
    model_files.save_model(tmp_path / "llama", model, params)
    assert run("--to=megalodon", f"--input={tmp_path / 'llama'}", f"--output={tmp_path / 'x'}") == 1
    assert "only a MegalodonConfig can be written" in capsys.readouterr().err
