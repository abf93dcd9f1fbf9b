"""BLT through files: what transformers saves loads here with equal logits, and the reverse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from blt_jax.interop import hugging_face
from blt_jax.models import blt
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

CASES = {
    "projection": dict(k=2, functions=2, encoder_all=False, decoder_all=True, kv=2),
    "equal_width": dict(k=3, functions=1, encoder_all=True, decoder_all=False, kv=4),
}


TOKENS = np.random.default_rng(0).integers(4, 260, (2, 40)).astype(np.int32)
TOKENS[:, 0] = 1


def peer(k, functions, encoder_all, decoder_all, kv):
    local = dict(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv,
        cross_attn_k=k,
        hidden_size_global=96,
        intermediate_size=48,
    )
    config = transformers.BltConfig(
        cross_attn_k=k,
        encoder_hash_byte_group_size=[3, 5],
        encoder_hash_byte_group_vocab=101,
        encoder_hash_byte_group_nb_functions=functions,
        local_attention_window_len=12,
        patcher_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            sliding_window=10,
        ),
        encoder_config=local | dict(num_hidden_layers=2, cross_attn_all_layers=encoder_all),
        decoder_config=local | dict(num_hidden_layers=3, cross_attn_all_layers=decoder_all),
        global_config=dict(
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=80,
        ),
    )
    torch.manual_seed(0)
    model = transformers.BltForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "patcher.lm_head" in name:  # entropies far enough apart
                weight.mul_(2.0)
    model = model.float().eval()
    # A threshold between two entropies, so that rounding cannot move a patch.
    with torch.no_grad():
        ids = torch.tensor(TOKENS, dtype=torch.long)
        entropies, _, _ = model.model.patcher(ids, patch_size=None, threshold=1.0)
        middle = entropies.flatten().sort().values[entropies.numel() // 2 :][:2]
    model.config.patching_threshold = float(middle.mean())
    return model


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = peer(**CASES[request.param])
    model.save_pretrained(path, max_shard_size="60KB")
    return model, path


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def our_logits(path):
    model, params = hugging_face.load_pretrained(path)
    entropy_model, entropy_params = hugging_face.load_pretrained(path, part="entropy_model")
    patcher = hugging_face.load_patcher(path)
    tokens = jnp.asarray(TOKENS)
    entropies = entropy_model.apply({"params": entropy_params}, tokens).aux
    starts = patcher.starts(tokens, entropies=entropies)
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens, starts).logits)
    return np.asarray(apply(params)), starts


def test_logits_with_its_own_patches(pair):
    theirs, path = pair
    logits, starts = our_logits(path)
    assert 5 < int(starts[0].sum()) < 38
    np.testing.assert_allclose(logits, their_logits(theirs), atol=2e-5)


def test_imports_the_released_variant(pair):
    config = hugging_face.load_pretrained(pair[1])[0].config
    assert config.residual is blt.Residual.DOUBLED
    assert config.ngrams == blt.NgramConfig.released(
        sizes=(3, 5), vocab_size=101, num_functions=config.ngrams.num_functions
    )
    assert config.local_encoder.window == config.local_decoder.window == 12
    entropy_model, _ = hugging_face.load_pretrained(pair[1], part="entropy_model")
    assert entropy_model.config.transformer.window == 10
    assert entropy_model.config.transformer.rope.theta == 10_000
    assert config.latent.rope.theta == 500_000


def test_round_trip_is_exact_and_loads_in_transformers(pair, tmp_path):
    theirs, path = pair
    hugging_face.save_pretrained(
        *hugging_face.load_pretrained(path),
        tmp_path,
        entropy_model=hugging_face.load_pretrained(path, part="entropy_model"),
        patcher=hugging_face.load_patcher(path),
        max_shard_bytes=50_000,
        dtype=np.float32,
    )
    again = transformers.BltForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours, expected = again.state_dict(), theirs.state_dict()
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    np.testing.assert_array_equal(their_logits(again), their_logits(theirs))


def test_bfloat16_round_trip(pair, tmp_path):
    model, params = hugging_face.load_pretrained(pair[1])
    for name in ("a", "b"):
        hugging_face.save_pretrained(model, params, tmp_path / name)
        model, params = hugging_face.load_pretrained(tmp_path / name, dtype=None)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_without_entropy_model(pair, tmp_path):
    hugging_face.save_pretrained(*hugging_face.load_pretrained(pair[1]), tmp_path)
    assert not hugging_face.has_entropy_model(tmp_path) and hugging_face.has_entropy_model(pair[1])
    with pytest.raises(ValueError, match=r"part='entropy_model'.*parts \[\]"):
        hugging_face.load_pretrained(tmp_path, part="entropy_model")


@pytest.mark.parametrize("missing", ["patcher", "local"])
def test_window_must_be_known(pair, tmp_path, missing):
    path = pair[1]
    config = json.loads((path / "config.json").read_text())
    if missing == "local":
        config["local_attention_window_len"] = config["encoder_config"]["sliding_window"] = None
    else:
        del config["patcher_config"]["sliding_window"]
    for file in path.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no attention window.*window=512"):
        hugging_face.load_pretrained(tmp_path)
    other = 10 if missing == "local" else 12
    model, _ = hugging_face.load_pretrained(tmp_path, window=other)
    assert model.config.local_encoder.window == other
    entropy_model, _ = hugging_face.load_pretrained(tmp_path, part="entropy_model", window=other)
    assert entropy_model.config.transformer.window == other


def test_patching_modes():
    read = hugging_face.read_patcher
    assert read({"patching_mode": "byte"}).kind is PatcherKind.BYTE
    assert read({"patching_threshold": 1.5, "max_patch_length": 8}) == PatcherConfig(
        threshold=1.5, max_patch_length=8
    )
    with pytest.raises(ValueError, match="patching_mode='entropy' with patching_threshold=None"):
        read({"patching_threshold": None})


def test_what_transformers_cannot_express(pair, tmp_path):
    model, params = hugging_face.load_pretrained(pair[1])
    config = dataclasses.replace(
        model.config, residual=blt.Residual.SINGLE, ngrams=blt.NgramConfig(sizes=(3, 5))
    )
    with pytest.raises(ValueError, match=r"cannot express.*\['residual', 'ngrams'\]"):
        hugging_face.save_pretrained(config.build(), params, tmp_path)
    strided = PatcherConfig(kind=PatcherKind.STRIDED)
    with pytest.raises(ValueError, match=r"cannot express.*\['patcher'\]"):
        hugging_face.save_pretrained(model, params, tmp_path, patcher=strided)
