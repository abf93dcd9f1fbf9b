"""A small decoder of every model of the suite, for what they all must do alike."""

import functools
from typing import Any

import jax

from blt_jax.decoding.decoder import token_decoder
from blt_jax.decoding.streaming_decoder import streaming_decoder
from blt_jax.decoding.streaming_llm import recompute, sinks
from blt_jax.dist.sharding import init_params
from blt_jax.layers.transformer import TransformerConfig
from blt_jax.models import blt, llama3, megalodon
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.models.blt_ngrams import NgramConfig
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

LLAMAS = ("llama", "sinks", "recompute")
NAMES = (*LLAMAS, "megalodon", "blt")
CAPACITY = 12


@functools.cache
def model_of(name: str):
    """The linen module of a decoder."""
    if name in LLAMAS:
        sizes = dict(vocab_size=32, num_layers=1, d_model=16, num_heads=4, num_kv_heads=2)
        return llama3.small(**sizes).build()
    if name == "megalodon":
        sizes = dict(num_layers=1, d_model=16, num_heads=2, qk_dim=8, chunk_size=4)
        return megalodon.small(vocab_size=32, **sizes).build()
    stack = TransformerConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=32, window=8)
    config = blt.BLTConfig(local_encoder=stack, latent=stack, local_decoder=stack)
    config.ngrams = NgramConfig(sizes=(3,), vocab_size=31)
    return config.build()


@functools.cache
def params_of(name: str, seed: int = 1) -> dict[str, Any]:
    """Random parameters."""
    params = init_params(model_of(name), jax.random.key(seed))
    return jax.tree.map(lambda x: x * 2 if x.ndim > 2 else x, params)  # attention far from even


def make(name: str, params: dict[str, Any]):
    """The decoder of these parameters."""
    model = model_of(name)
    if name == "sinks":
        return streaming_decoder(model, params, sinks(1, 3))
    if name == "recompute":
        return streaming_decoder(model, params, recompute(4))
    if name == "blt":
        patcher = PatcherConfig(kind=PatcherKind.STRIDED, stride=3)
        return BLTDecoder.create(model, params, patcher, CAPACITY)
    return token_decoder(model, params, CAPACITY)
