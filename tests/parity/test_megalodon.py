"""Logits, gradients, streaming and packed rows against megalodon-jax, an implementation by others,
and the recurrences against a float64 transcription of the sheet's equations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.megalodon_peer import carried_over, fresh_peer, its_settings, make_peer
from blt_jax.dist.sharding import init_params
from blt_jax.interop.megalodon import load_megalodon, save_megalodon, write_megalodon
from blt_jax.models import megalodon

BASE = megalodon.small(
    vocab_size=48,
    d_model=32,
    chunk_size=8,
    norm_groups=4,
    num_heads=2,
    qk_dim=16,
    value_dim=40,
    mlp_dim=24,
    state_size=4,
)
CONFIGS = {
    "base": BASE,
    "release_options": dataclasses.replace(
        BASE,
        swiglu=False,
        num_heads=1,
        rescale_mlp=True,
        scale_embeddings=True,
        tied_embeddings=True,
    ),
    "window": dataclasses.replace(BASE, attention_window=6),
}


def random_params(config):
    """Every parameter away from its initial value, norms and gains too."""
    params = init_params(config.build(), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def pair(name):
    config = CONFIGS[name]
    params = random_params(config)
    with its_settings():
        return config.build(), params, make_peer(config, params)


def tokens_of(length, rows=2, seed=3):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 48, jnp.int32)


SEGMENTS = jnp.array([[1] * 5 + [2] * 11 + [3] * 1 + [0] * 3, [4] * 20], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, tokens, segment_ids, weights):
    def objective(params):
        logits = model.apply({"params": params}, tokens, segment_ids).logits
        return (jnp.tanh(logits) * weights).sum(), logits

    return jax.grad(objective, has_aux=True)(params)


def theirs(peer, tokens, segment_ids, weights):
    import equinox as eqx

    @eqx.filter_jit
    def run(peer):
        def objective(peer):
            logits, _ = peer(tokens, segment_ids=segment_ids)
            return (jnp.tanh(logits) * weights).sum(), logits

        return eqx.filter_grad(objective, has_aux=True)(peer)

    with its_settings():
        return run(peer)


@pytest.mark.parametrize(
    ("name", "packed"),
    [("base", False), ("base", True), ("release_options", False), ("window", True)],
)
def test_logits_and_gradients(name, packed):
    model, params, peer = pair(name)
    tokens, segment_ids = tokens_of(20), SEGMENTS if packed else None
    weights = jax.random.normal(jax.random.key(5), (2, 20, 48))
    if packed:
        weights = jnp.where((SEGMENTS > 0)[..., None], weights, 0.0)
    gradient, logits = ours(model, params, tokens, segment_ids, weights)
    peer_gradient, peer_logits = theirs(peer, tokens, segment_ids, weights)
    real = slice(None) if segment_ids is None else np.asarray(segment_ids > 0)
    np.testing.assert_allclose(logits[real], peer_logits[real], rtol=2e-5, atol=1e-5)
    with its_settings():
        expected = carried_over(peer_gradient, gradient, model.config)
    for ours_, theirs_ in zip(
        jax.tree.leaves(expected), jax.tree.leaves(peer_gradient), strict=True
    ):
        if hasattr(ours_, "shape"):
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-3, atol=5e-5)


def assert_equal(a, b):
    a, b = ([x for x in jax.tree.leaves(tree) if hasattr(x, "shape")] for tree in (a, b))
    assert len(a) > 10
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["base", "release_options"])
def test_files(tmp_path, name):
    """Its reader makes of our file the model whose logits were compared above; ours reads what it
    writes, whole and as two model-parallel ranks cut where its reader would join them."""
    import torch
    from megalodon_jax import convert
    from safetensors.torch import load_file, save_file

    model, params, peer = pair(name)
    save_megalodon(model, params, tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    with its_settings():
        read = convert.load_upstream_state_dict(fresh_peer(model.config), state)
        written = convert.export_upstream_state_dict(peer)
    assert_equal(read, peer)
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(write_megalodon(model.config)))
        ranks = {"model_parallel_size": number}
        (folder / "consolidate_config.json").write_text(json.dumps(ranks))
        for rank in range(number):
            part = {}
            for key, tensor in written.items():
                axis = convert._merge_axis(key)
                cut = tensor if axis is None else torch.chunk(tensor, number, axis)[rank]
                part[key] = cut.contiguous().clone()
            file = f"consolidated.{rank:02d}.safetensors"
            save_file(part, folder / (file if number > 1 else "model.safetensors"))
        loaded, again = load_megalodon(folder)
        assert loaded == model
        jax.tree.map(np.testing.assert_array_equal, again, params)
