"""Logits, gradients, streaming and packed rows against megalodon-jax, an implementation by others,
and logits and gradients of every option against the equations in float64, token by token."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.megalodon_peer import carried_over, fresh_peer, its_settings, make_peer
from blt_jax.dist.sharding import ShardingRules, init_params
from blt_jax.interop.megalodon import load_megalodon, save_megalodon, write_megalodon
from blt_jax.models import megalodon, megalodon_memory
from blt_jax.models.megalodon_decode import MegalodonDecoder
from tests.models import megalodon_numpy

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
    "prior": dataclasses.replace(BASE, prior_count=3),
    "input_phase": dataclasses.replace(BASE, input_phase=True),
    "mega": dataclasses.replace(BASE, ema=megalodon.EmaKind.REAL, gate=megalodon.GateKind.MEGA),
    "no_average": dataclasses.replace(BASE, ema=megalodon.EmaKind.NONE),
    "attention_only": dataclasses.replace(
        BASE,
        ema=megalodon.EmaKind.NONE,
        norm=megalodon.NormKind.LAYER,
        residual=megalodon.ResidualKind.PRE_NORM,
    ),
}
LOGITS = dict(rtol=2e-5, atol=2e-6)
GRADIENTS = dict(rtol=1e-3, atol=5e-5)


def random_params(config):
    """Every parameter away from its initial value, norms and gains too."""
    params = init_params(config.build(), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


@functools.cache
def model_of(name):
    return CONFIGS[name].build(), random_params(CONFIGS[name])


@functools.cache
def peer_of(name):
    with its_settings():
        return make_peer(CONFIGS[name], model_of(name)[1])


def tokens_of(length, rows=2, seed=3):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 48, jnp.int32)


SEGMENTS = jnp.array([[1] * 5 + [2] * 11 + [3] * 1 + [0] * 3, [4] * 20], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, tokens, segment_ids, weights):
    def objective(params):
        logits = model.apply({"params": params}, tokens, segment_ids).logits
        return (jnp.tanh(logits) * weights).sum(), logits

    return jax.grad(objective, has_aux=True)(params)


@functools.cache
def their_program():
    import equinox as eqx

    @eqx.filter_jit
    def run(peer, tokens, segment_ids, weights):
        def objective(peer):
            logits, _ = peer(tokens, segment_ids=segment_ids)
            return (jnp.tanh(logits) * weights).sum(), logits

        return eqx.filter_grad(objective, has_aux=True)(peer)

    return run


def theirs(*arguments):
    with its_settings():
        return their_program()(*arguments)


def weights_of(segment_ids):
    """Of the logits in the objective: none where there is padding."""
    weights = jax.random.normal(jax.random.key(5), (2, 20, 48))
    return weights if segment_ids is None else jnp.where((SEGMENTS > 0)[..., None], weights, 0.0)


@pytest.mark.parametrize(
    ("name", "packed"),
    [("base", False), ("base", True), ("release_options", False), ("window", True)],
)
def test_logits_and_gradients(name, packed):
    (model, params), peer = model_of(name), peer_of(name)
    tokens, segment_ids = tokens_of(20), SEGMENTS if packed else None
    weights = weights_of(segment_ids)
    gradient, logits = ours(model, params, tokens, segment_ids, weights)
    peer_gradient, peer_logits = theirs(peer, tokens, segment_ids, weights)
    real = slice(None) if segment_ids is None else np.asarray(segment_ids > 0)
    np.testing.assert_allclose(logits[real], peer_logits[real], **LOGITS)
    with its_settings():
        expected = carried_over(peer_gradient, gradient, model.config)
    for ours_, theirs_ in zip(
        jax.tree.leaves(expected), jax.tree.leaves(peer_gradient), strict=True
    ):
        if hasattr(ours_, "shape"):
            np.testing.assert_allclose(ours_, theirs_, **GRADIENTS)


def test_the_last_timestep_norm_is_group_norm():
    """Statistics of all tokens, as of torch's norm over the groups of a whole row."""
    generator = np.random.default_rng(7)
    x = generator.normal(2.0, 3.0, size=(2, 150, 16)).astype(np.float32)
    weight, bias = generator.normal(size=(2, 16)).astype(np.float32)
    config = dataclasses.replace(model_of("base")[0].config, d_model=16, norm_groups=4)
    parameters = {"n_weight": jnp.asarray(weight - 1.0), "n_bias": jnp.asarray(bias)}
    y, _ = megalodon_memory.timestep_norm(
        jnp.asarray(x), parameters, "n", None, None, config=config, sharding=ShardingRules()
    )
    rows = torch.tensor(x).transpose(1, 2)
    affine = torch.tensor(weight), torch.tensor(bias)
    expected = torch.nn.functional.group_norm(rows, 4, *affine, eps=config.norm_eps)
    np.testing.assert_allclose(y[:, -1], expected[:, :, -1].numpy(), atol=2e-5)


def test_packed_documents_equal_the_peers_alone():
    """Each of its rows begins with one of our documents; what follows there cannot matter."""
    (model, params), tokens = model_of("base"), tokens_of(20)
    logits = ours(model, params, tokens, SEGMENTS, weights_of(SEGMENTS))[1]
    alone = jnp.stack([jnp.roll(tokens[0], -5), jnp.roll(tokens[0], -16)])
    expected = theirs(peer_of("base"), alone, None, weights_of(None))[1]
    np.testing.assert_allclose(logits[0, 5:16], expected[0, :11], **LOGITS)
    np.testing.assert_allclose(logits[0, 16:17], expected[1, :1], **LOGITS)


extend_logits = jax.jit(MegalodonDecoder.extend_logits)


@functools.cache
def their_extension():
    import equinox as eqx

    return eqx.filter_jit(lambda peer, *inputs: peer(inputs[0], cache=inputs[1], return_cache=True))


@pytest.mark.parametrize("cut", [6, 14])
def test_streams_cut_anywhere(cut):
    """Two pieces with what is kept between them, over chunks of 8."""
    (model, params), tokens = model_of("base"), tokens_of(20)
    decoder = MegalodonDecoder.create(model, params)
    cache, peer_cache = decoder.new_cache(2), None
    for piece in (tokens[:, :cut], tokens[:, cut:]):
        logits, cache = extend_logits(decoder, piece, cache)
        with its_settings():
            expected, peer_cache = their_extension()(peer_of("base"), piece, peer_cache)
        np.testing.assert_allclose(logits, expected, **LOGITS)


# -------------------------------------------------------------- the equations, in float64


def documents(segment_ids):
    """Row and tokens of every document of [B, T]."""
    for row, ids in enumerate(np.asarray(segment_ids)):
        for document in np.unique(ids[ids > 0]):
            yield row, np.flatnonzero(ids == document)


def equations(config, params, tokens, segment_ids):
    logits = np.zeros((*tokens.shape, config.vocab_size))
    for row, at in documents(segment_ids):
        logits[row, at] = megalodon_numpy.logits(config, params, tokens[row, at])
    return logits


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("base", True),
        ("release_options", False),
        ("window", True),
        ("prior", True),
        ("input_phase", False),
        ("mega", False),
        ("no_average", False),
        ("attention_only", True),
    ],
)
def test_equations(name, packed):
    """Logits, and the gradient of every parameter along one random direction."""
    config, (model, params), tokens = CONFIGS[name], model_of(name), tokens_of(20)
    segment_ids = SEGMENTS if packed else None
    weights = weights_of(segment_ids)
    gradient, logits = ours(model, params, tokens, segment_ids, weights)
    document_ids = np.ones(tokens.shape, int) if segment_ids is None else np.asarray(segment_ids)
    exact, exact_weights = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, weights))
    tokens = np.asarray(tokens)
    expected = equations(config, exact, tokens, document_ids)
    real = document_ids > 0
    np.testing.assert_allclose(logits[real], expected[real], **LOGITS)

    leaves, tree = jax.tree.flatten(exact)

    def objective(index, moved):
        moved = jax.tree.unflatten(tree, [*leaves[:index], moved, *leaves[index + 1 :]])
        return (np.tanh(equations(config, moved, tokens, document_ids)) * exact_weights).sum()

    rng, slopes, found = np.random.default_rng(6), [], []
    for index, (leaf, own) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        step = 1e-5 * rng.normal(size=leaf.shape)
        slopes.append((objective(index, leaf + step) - objective(index, leaf - step)) / 2e-5)
        found.append((np.asarray(own, np.float64) * step).sum() / 1e-5)
    np.testing.assert_allclose(found, slopes, **GRADIENTS)


# ------------------------------------------------------------------------------- files


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

    (model, params), peer = model_of(name), peer_of(name)
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
