import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import ShardingRules, param_shardings
from blt_jax.interop import hugging_face
from blt_jax.interop.hugging_face_llama import read_llama
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import PositionEncoding, Softmax
from tests.interop import small


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "sharded"
    hugging_face.save_pretrained(*small.llama(), path, max_shard_bytes=4000, dtype=np.float32)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "single"
    hugging_face.save_pretrained(*small.llama(), path, dtype=np.float32)
    return path


@pytest.fixture
def copy(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "copy")


@pytest.fixture
def one(single, tmp_path):
    return shutil.copytree(single, tmp_path / "copy")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change, file="model.safetensors"):
    tensors = dict(load_file(path / file))
    change(tensors)
    save_file(tensors, path / file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_round_trip_is_exact(tmp_path, dtype, shard_bytes):
    model, params = small.llama()
    params = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    hugging_face.save_pretrained(model, params, tmp_path, max_shard_bytes=shard_bytes, dtype=dtype)
    loaded, again = hugging_face.load_pretrained(tmp_path)
    hugging_face.save_pretrained(loaded, again, tmp_path / "again", dtype=dtype)
    first = hugging_face.load_pretrained(tmp_path / "again")[1]
    small.assert_equal(again, first)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 2000)
    if len(files) > 1:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        size = sum(leaf.size for leaf in jax.tree.leaves(params)) * np.dtype(dtype).itemsize
        assert index["metadata"]["total_size"] == size
        sizes = [sum(t.nbytes for t in load_file(tmp_path / f).values()) for f in files]
        assert max(sizes) <= 2000 or max(sizes) == 37 * 16 * np.dtype(dtype).itemsize


def test_values_land_where_their_names_say(single):
    tensors = load_file(single / "model.safetensors")
    (_, params), layers = small.llama(), 3
    stack = params["transformer"]["layers"]
    for i in range(layers):
        name = f"model.layers.{i}."
        gate = tensors[name + "mlp.gate_proj.weight"]
        np.testing.assert_array_equal(gate, stack["mlp"]["gate"][i].T)
        value = tensors[name + "self_attn.v_proj.weight"]
        np.testing.assert_array_equal(value.T.reshape(16, 2, 4), stack["attention"]["value"][i])
        # Our query pairs (2i, 2i + 1) became (i, i + 2) inside each head of width 4.
        query = tensors[name + "self_attn.q_proj.weight"].T.reshape(16, 4, 4)
        np.testing.assert_array_equal(query, stack["attention"]["query"][i][..., [0, 2, 1, 3]])
        norm = tensors[name + "input_layernorm.weight"]
        np.testing.assert_array_equal(norm, stack["attention_norm"]["weight"][i])


def test_types(single):
    assert hugging_face.load_pretrained(single)[1]["norm"]["weight"].dtype == jnp.float32
    params = hugging_face.load_pretrained(single, dtype=jnp.bfloat16)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_params_compute(tmp_path):
    hugging_face.save_pretrained(*small.llama(), tmp_path)
    model, params = hugging_face.load_pretrained(tmp_path, dtype=None)
    assert params["norm"]["weight"].dtype == jnp.bfloat16
    logits = model.apply({"params": params}, jnp.zeros((1, 4), jnp.int32)).logits
    wide = hugging_face.load_pretrained(tmp_path)[1]
    np.testing.assert_allclose(
        logits, model.apply({"params": wide}, jnp.zeros((1, 4), jnp.int32)).logits, atol=1e-6
    )


def test_onto_a_mesh(single):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = ShardingRules(vocab=(), vocab_act=())
    model, params = hugging_face.load_pretrained(single, mesh=mesh, sharding=rules)
    small.assert_equal(params, hugging_face.load_pretrained(single)[1])
    shardings = param_shardings(model, mesh)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, shardings)
    assert jax.tree.all(same)
    gate = params["transformer"]["layers"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (3, 8, 12)


def test_saves_sharded_params(single, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    rules = ShardingRules(vocab=(), vocab_act=())
    model, params = hugging_face.load_pretrained(single, mesh=mesh, sharding=rules)
    hugging_face.save_pretrained(model, params, tmp_path, dtype=np.float32)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        single / "model.safetensors"
    ).read_bytes()


def test_tied_model_has_no_head(tmp_path):
    hugging_face.save_pretrained(*small.llama(tied_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert hugging_face.load_pretrained(tmp_path)[0].config.tied_embeddings


# -------------------------------------------------------------------------------- bad files


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        hugging_face.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        hugging_face.load_pretrained(tmp_path)


def test_missing_weights(one):
    (one / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        hugging_face.load_pretrained(one)
    (one / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pickled weights \['pytorch_model.bin'\].*refused"):
        hugging_face.load_pretrained(one)


def test_missing_shard(copy):
    (copy / "model-00002-of-00016.safetensors").unlink(missing_ok=True)
    shards = sorted(copy.glob("*.safetensors"))
    name = next(iter(load_file(shards[2])))
    shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=f"missing shards.*{shards[2].name}.*{name}"):
        hugging_face.load_pretrained(copy)


def test_missing_index(copy):
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"but no model\.safetensors\.index\.json"):
        hugging_face.load_pretrained(copy)


def test_tensor_in_two_shards(copy):
    a, b = sorted(copy.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(a).items()))
    edit_tensors(copy, lambda tensors: tensors.update({name: value}), b.name)
    with pytest.raises(ValueError, match=f"{b.name}.*disagree.*only in the file.*{name}"):
        hugging_face.load_pretrained(copy)
    index = copy / "model.safetensors.index.json"
    text = index.read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{b.name}",')
    index.write_text(text)
    with pytest.raises(ValueError, match=f"keys given twice.*{name}"):
        hugging_face.load_pretrained(copy)


def test_index_names_more_than_the_files_hold(copy):
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"disagree: only in the index \['model.extra.weight'\]"):
        hugging_face.load_pretrained(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_corrupt_index(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: no index of safetensors files"):
        hugging_face.load_pretrained(copy)


def test_index_outside_the_folder(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ValueError, match="files outside the folder"):
        hugging_face.load_pretrained(copy)


def _header(length, text):
    return length.to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "header length": lambda data: (200_000_000).to_bytes(8, "little") + data[8:],
        "header text": lambda data: data[:8] + b"!" + data[9:],
        "overlap": lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_corrupt_file(one, damage):
    file = one / "model.safetensors"
    file.write_bytes(damage[1](file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: corrupt safetensors file"):
        hugging_face.load_pretrained(one)


def test_missing_and_unexpected_names(one):
    def rename(tensors):
        tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    edit_tensors(one, rename)
    with pytest.raises(
        ValueError,
        match=r"missing tensors \['model.layers.0.mlp.up_proj.weight'\], "
        r"unexpected tensors \['model.layers.0.mlp.gate.weight'\]",
    ):
        hugging_face.load_pretrained(one)


def test_misshapen_tensor(one):
    edit_config(one, intermediate_size=25)
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight: \(24, 16\), the config says \(25"):
        hugging_face.load_pretrained(one)


def test_integer_tensor(one):
    edit_tensors(one, lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)}))
    with pytest.raises(ValueError, match=r"'model.norm.weight': 'I32'.*allowed are"):
        hugging_face.load_pretrained(one)


def test_tied_flag_with_head(one):
    edit_config(one, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ties the embeddings, yet the files hold lm_head.weight"):
        hugging_face.load_pretrained(one)


def test_untied_flag_without_head(one):
    edit_tensors(one, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"missing tensors \['lm_head.weight'\]"):
        hugging_face.load_pretrained(one)


# ------------------------------------------------------------------------------ bad configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sparse_layers=[1]), r"unknown attributes \{'sparse_layers': \[1\]\}"),
        (dict(quantization_config={"bits": 4}), "unknown attributes.*quantization_config"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
        (dict(attention_bias=True), "attention_bias=True is not supported"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(hidden_size="16"), "hidden_size='16' must be of type"),
        (dict(hidden_size=True), "hidden_size=True must be of type"),
        (dict(vocab_size=None), "attribute vocab_size is missing"),
        (dict(model_type="mistral"), r"model_type='mistral': allowed are \['llama', 'blt'\]"),
        (dict(num_key_value_heads=3), "num_kv_heads=3: must divide"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type='yarn'"),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_type='linear'"),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            "attribute low_freq_factor is missing",
        ),
        (
            dict(rope_parameters={"rope_theta": 7.0, "rope_type": "default"}),
            "contradicts rope_theta=10000.0",
        ),
        (
            dict(rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mscale": 1}),
            "unknown attributes.*mscale",
        ),
    ],
)
def test_bad_config(one, changes, message):
    edit_config(one, **changes)
    with pytest.raises(ValueError, match=message):
        hugging_face.load_pretrained(one)


def test_config_that_is_no_json(one):
    (one / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        hugging_face.load_pretrained(one)


BASE = dict(
    model_type="llama",
    vocab_size=10,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=20,
)
SCALING = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
SCALED = RopeConfig(theta=5e5, layout=RopeLayout.HALF_SPLIT, scaling_factor=8.0)


@pytest.mark.parametrize(
    ("attributes", "rope"),
    [
        ({}, RopeConfig(theta=1e4, layout=RopeLayout.HALF_SPLIT)),
        ({"rope_theta": 5e5}, RopeConfig(layout=RopeLayout.HALF_SPLIT)),
        ({"rope_theta": 500000}, RopeConfig(layout=RopeLayout.HALF_SPLIT)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, SCALED),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}, SCALED),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
            SCALED,
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING},
            },
            SCALED,
        ),
    ],
)
def test_both_forms_of_rope(attributes, rope):
    config = read_llama(BASE | attributes)
    assert config.transformer.rope == rope
    assert config.transformer.norm_eps == 1e-6 and not config.tied_embeddings


# ------------------------------------------------------------------------------ bad requests


def test_bad_requests(single, tmp_path):
    with pytest.raises(ValueError, match=r"part='entropy_model': this model has the parts \[\]"):
        hugging_face.load_pretrained(single, part="entropy_model")
    with pytest.raises(ValueError, match="window=512: only for BLT"):
        hugging_face.load_pretrained(single, window=512)
    with pytest.raises(FileExistsError, match=r"already holds \['model.safetensors'\]"):
        hugging_face.save_pretrained(*small.llama(), single)
    with pytest.raises(ValueError, match="dtype=int8: allowed are"):
        hugging_face.save_pretrained(*small.llama(), tmp_path, dtype=np.int8)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        hugging_face.save_pretrained(*small.llama(), tmp_path, max_shard_bytes=0)
    entropy_model, params = small.byte_latent()[1]
    with pytest.raises(ValueError, match="EntropyModelConfig: only Llama3Config and BLTConfig"):
        hugging_face.save_pretrained(entropy_model, params, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 8}, "window=8: a LlamaConfig has no window"),
        ({"position_encoding": PositionEncoding.ALIBI}, "position_encoding=ALIBI: .* has ROPE"),
        ({"softmax": Softmax.OFF_BY_ONE}, "softmax=OFF_BY_ONE: a LlamaConfig has STANDARD"),
        ({"softmax": Softmax.LEARNED_SINK}, "softmax=LEARNED_SINK: a LlamaConfig has STANDARD"),
    ],
    ids=str,
)
def test_what_a_llama_config_cannot_express(changes, message, tmp_path):
    stack = dataclasses.replace(small.llama()[0].config.transformer, **changes)
    with pytest.raises(ValueError, match=message):
        hugging_face.save_pretrained(*small.llama(transformer=stack), tmp_path)
    assert not list(tmp_path.iterdir())


def test_sink_tokens_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="sink_tokens=1: a LlamaConfig has no sink tokens"):
        hugging_face.save_pretrained(*small.llama(sink_tokens=1), tmp_path)


def test_what_a_blt_config_cannot_express(tmp_path):
    model, params = small.byte_latent()[0]
    softmax = {"softmax": Softmax.OFF_BY_ONE}
    alibi = {"position_encoding": PositionEncoding.ALIBI}
    config = dataclasses.replace(
        model.config,
        latent=dataclasses.replace(model.config.latent, **softmax),
        local_encoder=dataclasses.replace(model.config.local_encoder, **alibi),
    )
    names = r"cannot express .*\['local_encoder.position_encoding', 'latent.softmax'\]"
    with pytest.raises(ValueError, match=names):
        hugging_face.save_pretrained(config.build(), params, tmp_path)
