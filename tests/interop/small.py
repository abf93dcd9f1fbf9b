"""Small models for the tests of files; made without compiling, values do not matter."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from blt_jax.dist.sharding import param_shapes
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt, llama3, megalodon_config
from blt_jax.models.blt_ngrams import NgramConfig


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    flat = flatten_dict(param_shapes(model))
    return unflatten_dict(
        {k: jnp.asarray(rng.normal(0, 0.2, v.shape), jnp.float32) for k, v in flat.items()}
    )


def llama(**changes):
    config = llama3.small(
        vocab_size=37, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=24
    )
    model = dataclasses.replace(config, **changes).build()
    return model, random_params(model)


def megalodon(**changes):
    sizes = dict(num_heads=2, qk_dim=8, value_dim=12, mlp_dim=20, norm_groups=4, state_size=3)
    config = megalodon_config.small(vocab_size=37, num_layers=2, d_model=16, chunk_size=8, **sizes)
    model = dataclasses.replace(config, **changes).build()
    return model, random_params(model)


def byte_latent():
    """(BLT, params), (entropy model, params): a variant that transformers can express."""
    local = TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=24, window=8)
    config = dataclasses.replace(
        blt.released_1b(),
        local_encoder=local,
        latent=TransformerConfig(num_layers=2, d_model=24, num_heads=2, mlp_dim=32),
        local_decoder=dataclasses.replace(local, num_layers=2),
        ngrams=NgramConfig.released(sizes=(3, 4), vocab_size=41),
        max_patches=0,
    )
    model, entropy_model = config.build(), blt.EntropyModelConfig(transformer=local).build()
    return (model, random_params(model)), (entropy_model, random_params(entropy_model, seed=1))


def assert_equal(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert leaf.dtype == b[path].dtype, path
        np.testing.assert_array_equal(leaf, b[path], err_msg=str(path))
