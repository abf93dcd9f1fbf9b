import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding.contrastive_decoding import ContrastiveDecoder
from blt_jax.decoding.decoder import token_decoder
from blt_jax.decoding.streaming_decoder import streaming_decoder
from blt_jax.decoding.streaming_llm import Positions, Rotation, sinks
from blt_jax.interop.cache_files import load_cache, save_cache
from blt_jax.layers.model import Precision
from blt_jax.models.megalodon_truncated import TruncatedDecoder
from tests.interop import small


def decoder_and_cache(model, params, capacity=12, rows=3, make=token_decoder):
    """A decoder, and a cache of its shapes with random values."""
    decoder = make(model, params, capacity)
    prompts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))
    shapes = jax.eval_shape(decoder.prefill, *prompts)[1]
    rng = np.random.default_rng(0)
    return decoder, jax.tree.map(
        lambda x: jnp.asarray(rng.integers(9, size=x.shape), x.dtype), shapes
    )


@pytest.mark.parametrize(
    ("model", "make"),
    [
        (small.megalodon, token_decoder),
        (small.megalodon, TruncatedDecoder.create),
        (small.llama, token_decoder),
    ],
)
def test_a_cache_survives(tmp_path, model, make):
    decoder, cache = decoder_and_cache(*model(precision=Precision.BFLOAT16), make=make)
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))
    save_cache(tmp_path / "cache", decoder, cache)
    again = load_cache(tmp_path / "cache", decoder)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    with pytest.raises(FileExistsError, match="is already there"):
        save_cache(tmp_path / "cache", decoder, cache)


def test_caches_of_other_decoders(tmp_path):
    model, params = small.megalodon()
    decoder, cache = decoder_and_cache(model, params)
    save_cache(tmp_path / "cache", decoder, cache)
    other = dataclasses.replace(model.config, chunk_size=4, rescale_mlp=True).build()
    with pytest.raises(ValueError, match=r"'chunk_size': 8, 'rescale_mlp': False.*'chunk_size': 4"):
        load_cache(tmp_path / "cache", token_decoder(other, params, 12))
    with pytest.raises(ValueError, match=r"arrays do not fit this decoder: .*attention.* is None"):
        load_cache(tmp_path / "cache", TruncatedDecoder.create(model, params, 12))
    decoder, cache = decoder_and_cache(*small.llama())
    save_cache(tmp_path / "llama", decoder, cache)
    with pytest.raises(ValueError, match=r"arrays do not fit this decoder: .*needed is"):
        load_cache(tmp_path / "llama", decoder.replace(capacity=600))
    (tmp_path / "broken").write_bytes(b"x")
    with pytest.raises(ValueError, match="broken: no saved cache"):
        load_cache(tmp_path / "broken", decoder)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_cache(tmp_path / "nowhere", decoder)


def test_caches_of_other_policies(tmp_path):
    """Of the same shapes: only what is kept of a row differs."""
    model, params = small.llama()
    options = ({}, {"rotation": Rotation.TWO_PHASE}, {"positions": Positions.ORIGINAL})
    decoder, *others = (streaming_decoder(model, params, sinks(2, 4, **kw)) for kw in options)
    cache = decoder.new_cache(3)
    save_cache(tmp_path / "cache", decoder, cache)
    again = load_cache(tmp_path / "cache", decoder)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    for other in others:
        with pytest.raises(ValueError, match=r"cache of another decoder, .*num_sinks=2"):
            load_cache(tmp_path / "cache", other)
    pair = ContrastiveDecoder.create(decoder, decoder)
    with pytest.raises(TypeError, match="ContrastiveDecoder: must be a decoder of one model"):
        save_cache(tmp_path / "pair", pair, cache)
