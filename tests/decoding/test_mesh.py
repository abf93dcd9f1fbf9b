"""Decoders on a mesh of 8 devices give what they give on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blt_jax.decoding.contrastive_decoding import ContrastiveDecoder
from blt_jax.dist.mesh import MeshConfig, make_mesh
from blt_jax.dist.sharding import param_shardings
from tests.decoding import decoders

PROMPTS = np.asarray([[1, 7, 9, 3], [1, 4, 5, 0], [6, 0, 0, 0], [8, 2, 30, 0]], np.int32)
LENGTHS = np.asarray([4, 3, 1, 3], np.int32)
NEW = 6


@jax.jit
def greedy(decoder, tokens, lengths):
    """Tokens [B, M], and logits [B, M + 1, V] before each of them and after the last."""
    decoder = decoder.prepare()

    def body(state, _):
        token = jnp.argmax(state[0], axis=-1).astype(jnp.int32)
        return decoder.step(token, state[1]), (token, state[0])

    (last, _), (tokens, logits) = jax.lax.scan(
        body, decoder.prefill(tokens, lengths), None, length=NEW
    )
    logits = jnp.concatenate([logits, last[None]])
    return tokens.T, jnp.swapaxes(logits, 0, 1)


def make(name, mesh=None):
    """The decoder, or the pair, with parameters on the mesh if there is one."""

    def one(name, seed):
        params = decoders.params_of(name, seed)
        if mesh is not None:
            params = jax.device_put(params, param_shardings(decoders.model_of(name), mesh))
        return decoders.make(name, params)

    if name == "pair":
        return ContrastiveDecoder.create(one("megalodon", 1), one("llama", 2), alpha=0.01)
    return one(name, 1)


@pytest.fixture
def compiled_here():
    """Nothing comes from the persistent cache, which keeps no warnings."""
    former = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", former)


@pytest.mark.usefixtures("compiled_here")
@pytest.mark.parametrize("name", ["llama", "sinks", "megalodon", "pair"])
def test_a_mesh_changes_nothing(name, capfd):
    tokens, logits = greedy(make(name), jnp.asarray(PROMPTS), jnp.asarray(LENGTHS))
    assert len(np.unique(tokens)) > 4
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((PROMPTS, LENGTHS), rows)
        found_tokens, found = greedy(make(name, mesh), *arguments)
    np.testing.assert_array_equal(found_tokens, tokens)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    # What XLA says where it has no better way than to replicate an array, such as a whole table.
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "full rematerialization" in line] == []
