"""Llama 3 against LlamaForCausalLM of transformers: tiny random weights, float32, eager."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from blt_jax.decoding.decoder import TransformerDecoder
from blt_jax.interop import hugging_face, hugging_face_llama
from blt_jax.interop.weights import foreign_reader
from blt_jax.layers.rope import RopeLayout

ROPE_31 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CASES = {
    "grouped": dict(num_key_value_heads=2),
    "all_heads": dict(num_key_value_heads=8, rms_norm_eps=1e-5),
    "tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "scaled": dict(num_key_value_heads=4, rope_parameters=ROPE_31),
    "wide_heads": dict(num_key_value_heads=2, head_dim=20, hidden_size=48, intermediate_size=100),
}


def peer(case, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=8,
        initializer_range=0.08,
    )
    config = transformers.LlamaConfig(**(sizes | CASES[case]))
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():  # norms that do something
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.float().eval()


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = peer(request.param)
    model.save_pretrained(path, max_shard_size="100KB")
    return model, *hugging_face.load_pretrained(path), path


def random_ids(vocab_size=257, shape=(2, 40), seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, ids):
    return model.apply({"params": params}, ids).logits


def test_logits(pair):
    theirs, model, params, _ = pair
    ids = random_ids()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    logits = apply(model, params, jnp.asarray(ids))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_gradients(pair):
    theirs, model, params, _ = pair
    ids = random_ids()
    inputs = torch.tensor(ids, dtype=torch.long)
    theirs.zero_grad()
    theirs(inputs, labels=inputs).loss.backward()
    batch = dict(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        target_mask=jnp.ones((2, 39), bool),
        target_bytes=jnp.ones((2, 39), jnp.int32),
    )

    def mean_loss(params):
        sums = model.loss(params, batch)
        return sums.objective / sums.weight

    grads = jax.jit(jax.grad(mean_loss))(params)
    read = foreign_reader(hugging_face_llama.llama_table(model.config), grads)
    expected = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    for name, value in expected.items():
        np.testing.assert_allclose(read(name), value, rtol=1e-3, atol=5e-5, err_msg=name)


def test_cached_decoding(pair):
    theirs, model, params, _ = pair
    ids = random_ids(shape=(2, 24), seed=1)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    tokens = jnp.asarray(ids)
    decoder = TransformerDecoder.create(model, params, 24).prepare()
    prefill, step = jax.jit(TransformerDecoder.prefill), jax.jit(TransformerDecoder.step)
    logits, cache = prefill(decoder, tokens[:, :16], jnp.array([16, 16]))
    got = [logits]
    for t in range(16, 23):
        logits, cache = step(decoder, tokens[:, t], cache)
        got.append(logits)
    np.testing.assert_allclose(np.stack(got, 1), expected[:, 15:23], atol=2e-5)


def test_rope_table_of_release_3_1(pair):
    from blt_jax.layers.rope import rope_frequencies

    theirs, model, _, _ = pair
    stack = model.config.transformer
    np.testing.assert_allclose(
        rope_frequencies(stack.rope, stack.head_width),
        theirs.model.rotary_emb.inv_freq.numpy(),
        rtol=1e-6,
    )


def test_interleaved_layout_gives_the_same_logits(pair):
    _, model, params, _ = pair
    rope = dataclasses.replace(model.config.transformer.rope, layout=RopeLayout.INTERLEAVED)
    stack = dataclasses.replace(model.config.transformer, rope=rope)
    other = dataclasses.replace(model.config, transformer=stack).build()
    swapped = hugging_face_llama.with_rope_layout(model, params, RopeLayout.INTERLEAVED)
    assert swapped[0] == other
    ids = jnp.asarray(random_ids())
    np.testing.assert_allclose(
        apply(other, swapped[1], ids),
        apply(model, params, ids),
        atol=1e-5,
    )


def test_a_model_saved_here_loads_there(pair, tmp_path):
    theirs, model, params, _ = pair
    ids = random_ids(seed=2)
    swapped = hugging_face_llama.with_rope_layout(model, params, RopeLayout.INTERLEAVED)
    for name, saved in {"same": (model, params), "swapped": swapped}.items():
        path = tmp_path / name
        hugging_face.save_pretrained(*saved, path, max_shard_bytes=100_000, dtype=np.float32)
        assert (path / "model.safetensors.index.json").exists()
        again = transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
        for key, value in theirs.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
        with torch.no_grad():
            inputs = torch.tensor(ids, dtype=torch.long)
            assert torch.equal(theirs(inputs).logits, again(inputs).logits)


def test_bfloat16_file_round_trip_is_exact(pair, tmp_path):
    theirs = pair[0]
    theirs = type(theirs)(theirs.config).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    model, params = hugging_face.load_pretrained(tmp_path / "theirs")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    hugging_face.save_pretrained(model, params, tmp_path / "ours", max_shard_bytes=60_000)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
