"""Arguments of the programs that are compiled for devices which are not here."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from blt_jax.dist import topology
from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.cache import LayerCache
from blt_jax.models import llama3
from blt_jax.recipes.language_model import LanguageModel
from blt_jax.recipes.programs import make_job
from blt_jax.train.launch import load_experiment_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


def decode_job(config, devices=4, batch=8, length=64):
    """The decode step of a run on GPUs."""
    options = types.SimpleNamespace(
        config=config, part="", phase=-1, program="decode", batch=batch, length=length
    )
    return make_job(options, lambda mesh: topology.mesh(f"cuda:{devices}", mesh))


def test_the_cache_of_llama_3_8b_fits():
    """8 rows of 4,096 tokens in bfloat16, rows on every device, one of four parts of the heads."""
    config = LanguageModel(
        model=llama3.llama3_8b(), steps=1, prompts=(), mesh=MeshConfig(data=1, tensor=4)
    )
    job = decode_job(config, length=4096)
    cache = 32 * 2 * 8 * 4096 * 8 * 128 * 2  # layers, keys and values, rows, slots, heads, width
    assert cache / 4 < job.sizes["inputs"] < cache / 4 + 1000


@pytest.mark.parametrize(
    ("model", "tensor"), [("llama3", 2), ("blt", 2), ("megalodon", 1)]
)  # the last has one head
def test_the_cache_of_a_decode_step_is_that_of_the_devices(model, tensor):
    config = load_experiment_file(ROOT / "experiments" / f"{model}.py").get_config("smoke")
    config.mesh = MeshConfig(data=2 // tensor, fsdp=2, tensor=tensor)
    job = decode_job(config)
    *_, tokens, cache = job.arguments
    assert job.donated == (len(job.arguments) - 1,)
    logits, kept = job.out_shardings
    assert logits is None and kept == jax.tree.map(lambda x: x.sharding, cache)
    own = 2 * tensor  # of 8 rows
    assert tokens.sharding.shard_shape(tokens.shape) == (own,)
    assert all(x.sharding.shard_shape(x.shape)[0] == own for x in jax.tree.leaves(cache))
    layers = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, LayerCache))
    layers = [x for x in layers if isinstance(x, LayerCache)]
    assert layers
    for x in jax.tree.leaves(layers):
        assert x.dtype == jnp.bfloat16
        assert tensor * x.sharding.shard_shape(x.shape)[1] == x.shape[1]


def test_what_cannot_be_divided_is_whole_everywhere():
    config = load_experiment_file(ROOT / "experiments" / "llama3.py").get_config("smoke")
    config.mesh = MeshConfig(data=4)
    job = decode_job(config, batch=3)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(job.arguments[1:]))
