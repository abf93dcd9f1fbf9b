import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from blt_jax import convert
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.interop import hugging_face, model_files
from blt_jax.layers.model import ModelConfig
from blt_jax.models import blt, llama3
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from blt_jax.train.config_json import config_from_json, config_to_json
from tests.interop import small


@pytest.mark.parametrize(
    "config",
    [llama3.llama31_8b(), blt.paper_8b(), blt.released_1b(), blt.entropy_model_paper_512()],
    ids=lambda config: type(config).__name__,
)
def test_configs_survive_json(config):
    text = json.dumps(config_to_json(config))
    assert config_from_json(json.loads(text), ModelConfig, "file") == config


def test_patcher_of_a_run_is_read(tmp_path):
    patcher = PatcherConfig(kind=PatcherKind.MONOTONIC, relative_threshold=0.5)
    fields = {**dataclasses.asdict(patcher), "kind": "MONOTONIC"}
    (tmp_path / "patcher.json").write_text(json.dumps(fields))
    assert model_files.load_patcher(tmp_path) == patcher


def test_round_trip(tmp_path):
    (model, params), entropy_model = small.byte_latent()
    patcher = PatcherConfig(threshold=1.5)
    params["head"]["kernel"] = params["head"]["kernel"].astype(jnp.bfloat16)
    model_files.save_model(tmp_path, model, params, entropy_model=entropy_model, patcher=patcher)
    loaded, again = model_files.load_model(tmp_path)
    assert loaded == model
    small.assert_equal(again, params)
    loaded, again = model_files.load_model(tmp_path, part="entropy_model")
    assert loaded == entropy_model[0]
    small.assert_equal(again, entropy_model[1])
    assert model_files.load_patcher(tmp_path) == patcher
    with pytest.raises(FileExistsError, match="already holds a model"):
        model_files.save_model(tmp_path, model, params)
    with pytest.raises(ValueError, match="part='patcher': allowed are None and 'entropy_model'"):
        model_files.load_model(tmp_path, part="patcher")
    with pytest.raises(ValueError, match="averaged=True"):
        model_files.load_model(tmp_path, averaged=True)


def test_onto_a_mesh(tmp_path):
    model, params = llama3.byte_level(num_layers=1, d_model=16, num_heads=2).build(), None
    params = small.random_params(model)
    model_files.save_model(tmp_path, model, params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, sharded = model_files.load_model(tmp_path, mesh=mesh)
    small.assert_equal(sharded, params)
    assert sharded["head"]["kernel"].addressable_shards[0].data.shape == (8, 130)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json: no such file"):
        model_files.load_model(tmp_path / "nowhere")
    model, params = small.llama()
    model_files.save_model(tmp_path, model, params)
    good = json.loads((tmp_path / "model.json").read_text())

    def with_config(**changes):
        (tmp_path / "model.json").write_text(json.dumps(good | changes))
        return model_files.load_model(tmp_path)

    with pytest.raises(ValueError, match=r"has no fields \['depth'\]"):
        with_config(depth=3)
    with pytest.raises(ValueError, match=r"class 'os\.system' is not one of blt_jax"):
        with_config(**{"class": "os.system"})
    with pytest.raises(ValueError, match="there is no class"):
        with_config(**{"class": "blt_jax.models.llama3.Llama9"})
    with pytest.raises(ValueError, match="is no config class"):
        with_config(**{"class": "blt_jax.models.llama3.small"})
    with pytest.raises(ValueError, match=r"'SOME': allowed are \['AUTO', 'FLOAT32', 'BFLOAT16'\]"):
        with_config(precision="SOME")
    (tmp_path / "model.json").write_text(json.dumps(good["transformer"]))
    with pytest.raises(ValueError, match="is no ModelConfig"):
        model_files.load_model(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        with_config(vocab_size=38)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        model_files.load_model(tmp_path)


def test_damaged_arrays(tmp_path):
    model_files.save_model(tmp_path, *small.llama())
    for file in (tmp_path / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="is damaged"):
        model_files.load_model(tmp_path)


# ----------------------------------------------------------------------------------- convert


def run(*arguments):
    return convert.main(["convert", *map(str, arguments)])


def test_blt_from_and_to_hugging_face(tmp_path, capsys):
    blt_model, entropy_model = small.byte_latent()
    source, ours, target = (tmp_path / name for name in ("source", "ours", "target"))
    patcher = PatcherConfig(threshold=1.25)
    hugging_face.save_pretrained(*blt_model, source, entropy_model=entropy_model, patcher=patcher)
    (source / "tokenizer.json").write_text("{}")
    assert run("--from=hf", f"--input={source}", f"--output={ours}") == 0
    assert (ours / "tokenizer.json").exists()
    assert model_files.load_patcher(ours) == patcher
    loaded = model_files.load_model(ours, part="entropy_model")[1]
    small.assert_equal(loaded, hugging_face.load_pretrained(source, part="entropy_model")[1])
    assert run("--to=hf", f"--input={ours}", f"--output={target}") == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (source / file).read_bytes() == (target / file).read_bytes(), file
    assert f"written: {target}" in capsys.readouterr().out


def test_trained_run_to_hugging_face(tmp_path):
    from blt_jax.train.checkpoint import Checkpoints
    from blt_jax.train.config_json import write_model_config
    from blt_jax.train.optimizer import OptimizerConfig, make_optimizer
    from blt_jax.train.state import AveragingConfig, initial_state

    model, params = small.llama()
    source, target = tmp_path / "run", tmp_path / "hf"
    write_model_config(source, model.config)
    optimizer = make_optimizer(OptimizerConfig(), params, lambda step: jnp.float32(0.1))
    state = initial_state(params, optimizer, jax.random.key(0), AveragingConfig())
    checkpoints = Checkpoints(source / "checkpoints")
    checkpoints.save(3, state, {}, {})
    checkpoints.wait()
    checkpoints.close()
    small.assert_equal(model_files.load_model(source)[1], params)
    assert run("--to=hf", "--dtype=float32", f"--input={source}", f"--output={target}") == 0
    expected = tmp_path / "expected"
    hugging_face.save_pretrained(model, params, expected, dtype=jnp.float32)
    assert (target / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--input=a", "--output=b"], 2, "give one of --from=hf|meta|megalodon and"),
        (["--from=hf", "--to=hf", "--input=a", "--output=b"], 2, "give one of --from="),
        (["--from=gguf", "--input=a", "--output=b"], 2, "should be one of <hf|meta|megalodon>"),
        (["--from=hf", "--output=b"], 2, "--input=<folder> is missing"),
        (["--from=hf", "--input=a"], 2, "--output=<folder> is missing"),
        (["--from=meta", "--input=a", "--output=b", "--window=3"], 2, "--window: only"),
        (["--from=meta", "--input=a", "--output=b", "--averaged"], 2, "--averaged: only"),
        (["--from=hf", "--input=a", "--output=b", "c"], 2, "unexpected argument 'c'"),
        (["--from=hf", "--input=nowhere", "--output=b"], 1, "nowhere: no such folder"),
        (["--from=meta", "--input=nowhere", "--output=b"], 1, "nowhere: no such folder"),
        (["--to=hf", "--input=nowhere", "--output=b"], 1, "nowhere/model.json: no such file"),
    ],
)
def test_bad_command_lines(arguments, status, message, capsys):
    assert run(*arguments) == status
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert run("--help") == 0
    assert "--max_shard_bytes" in capsys.readouterr().out
