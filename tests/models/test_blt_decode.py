"""Incremental generation equals the full forward pass, for every patcher and option."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.dist.sharding import init_params
from blt_jax.layers.rope import RopeConfig, RopeLayout
from blt_jax.layers.transformer import PositionEncoding, Softmax, TransformerConfig
from blt_jax.models import blt, blt_patching
from blt_jax.models.blt_decode import BLTDecoder
from blt_jax.models.blt_ngrams import HashOrder, NgramConfig, NgramKind, NgramStart
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

TEXT = b"def step(x):\n  return x + 1  # next\n\nprint(step(41))"


def stack(layers=1, width=16, heads=2, **fields):
    return TransformerConfig(
        num_layers=layers, d_model=width, num_heads=heads, mlp_dim=2 * width, **fields
    )


def config(encoder_layers=2, window=7, **fields):
    defaults = {
        "local_encoder": stack(encoder_layers, window=window),
        "latent": stack(2, 24, 2, num_kv_heads=1),
        "local_decoder": stack(2, window=window),
        "ngrams": NgramConfig(sizes=(2, 3, 5), vocab_size=53),
    }
    return blt.BLTConfig(**(defaults | fields))


def small(**fields):
    layers = {"latent": stack(1, 24, 2), "local_decoder": stack(1, window=fields.get("window", 7))}
    return config(encoder_layers=1, **(layers | fields))


ENTROPY = blt.EntropyModelConfig(transformer=stack(1, 16, 2, window=9))


@functools.cache
def build(config):
    """Model and parameters with uneven values everywhere, norms included."""
    model = config.build()
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(1)))
    rng = np.random.default_rng(2)

    def leaf(path, x):
        norm = any("norm" in key.key for key in path)
        value = rng.normal(size=x.shape) * (0.5 if norm else 0.3)
        return jnp.asarray(value + norm, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def documents(lengths, seed=0):
    """Rows of bytes with BOS, right-padded to the longest."""
    rng = np.random.default_rng(seed)
    text = np.frombuffer(TEXT, np.uint8).astype(np.int32) + 4
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in enumerate(lengths):
        start = rng.integers(0, 8)
        tokens[row, :length] = np.concatenate([[1], text[start:]])[:length]
    return jnp.asarray(tokens)


def make(config, patcher, capacity=64):
    model, params = build(config)
    entropy = build(ENTROPY) if needs_entropy(patcher) else (None, None)
    return BLTDecoder.create(model, params, patcher, capacity, *entropy)


def needs_entropy(patcher):
    return patcher.needs_entropies or patcher.kind is PatcherKind.BPE_PATCHER


@jax.jit
def teacher_forced(decoder, tokens):
    """Logits [B, N, V] of the full pass over whole rows, and the starts."""
    entropies = predictions = None
    if decoder.entropy_model is not None:
        pieces, positions = jnp.ones_like(tokens), None
        if decoder.patcher.reset_at_newline:
            pieces, positions = blt_patching.reset_segments(tokens, pieces)
        out = decoder.entropy_model.apply(
            {"params": decoder.entropy_params}, tokens, pieces, positions
        )
        entropies, predictions = out.aux, jnp.argmax(out.logits, -1).astype(jnp.int32)
    starts = decoder.patcher.starts(tokens, entropies=entropies, predictions=predictions)
    return decoder.model.apply({"params": decoder.params}, tokens, starts).logits, starts


@jax.jit
def incremental(decoder, tokens, lengths):
    """Logits after every token from the prompt's last on, of rows that all have N tokens."""
    decoder = decoder.prepare()
    B, N = tokens.shape
    logits, cache = decoder.prefill(tokens, lengths)

    def body(carry, _):
        cache, result = carry
        position = cache.lengths
        token = jnp.take_along_axis(tokens, jnp.minimum(position, N - 1)[:, None], axis=1)[:, 0]
        logits, cache = decoder.step(token, cache, position < N)
        index = jnp.where(position < N, position, N)
        return (cache, result.at[jnp.arange(B), index].set(logits, mode="drop")), None

    result = jnp.zeros((B, N, logits.shape[-1]))
    result = result.at[jnp.arange(B), lengths - 1].set(logits)
    return jax.lax.scan(body, (cache, result), None, length=N - 1)[0]


def check(decoder, tokens, prompts, tolerance=1e-4):
    """Prompts of different lengths, then byte by byte: as the full pass at every byte."""
    expected, starts = teacher_forced(decoder, tokens)
    lengths = jnp.asarray(prompts, jnp.int32)
    cache, result = incremental(decoder, tokens, lengths)
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(
            result[row, length - 1 :], expected[row, length - 1 :], atol=tolerance, rtol=0
        )
    counters = cache.counters()
    np.testing.assert_array_equal(counters["patches"], np.asarray(starts).sum(1) - 1)
    return result, starts


PATCHERS = {
    "strided": PatcherConfig(kind=PatcherKind.STRIDED, stride=4),
    "space": PatcherConfig(kind=PatcherKind.SPACE),
    "byte": PatcherConfig(kind=PatcherKind.BYTE),
    "bpe": PatcherConfig(kind=PatcherKind.BPE),
    "max_length": PatcherConfig(kind=PatcherKind.SPACE, max_patch_length=3),
    "global": PatcherConfig(kind=PatcherKind.GLOBAL, threshold=3.3),
    "global_max": PatcherConfig(kind=PatcherKind.GLOBAL, threshold=3.3, max_patch_length=5),
    "monotonic": PatcherConfig(kind=PatcherKind.MONOTONIC, relative_threshold=0.1),
    "monotonic_third": PatcherConfig(
        kind=PatcherKind.MONOTONIC, relative_threshold=0.3, force_third_start=True
    ),
    "both": PatcherConfig(
        kind=PatcherKind.BOTH,
        threshold=3.2,
        relative_threshold=0.05,
        force_third_start=True,
        forbid_fourth_start=True,
    ),
    "newline": PatcherConfig(kind=PatcherKind.GLOBAL, threshold=3.3, reset_at_newline=True),
    "bpe_patcher": PatcherConfig(kind=PatcherKind.BPE_PATCHER),
}


@pytest.mark.parametrize("name", PATCHERS)
def test_every_patcher(name):
    decoder = make(small(), PATCHERS[name])
    tokens = documents([40, 40, 40])
    if name == "bpe":
        tokens = tokens.at[:, 5::6].set(blt_patching.BPE_DELIMITER)
    check(decoder, tokens, [1, 6, 17])


@pytest.mark.parametrize("patch_window", [1, 2])
def test_few_rows_close(patch_window):
    """Of eight rows none, one, two (few) or more close a patch at a byte."""
    decoder = make(small(patch_window=patch_window), PATCHERS["space"])
    tokens = documents([40] * 8)
    _, starts = check(decoder, tokens, [1, 2, 3, 5, 8, 13, 21, 30])
    closing = set(np.asarray(starts)[:, 30:40].sum(0).tolist())
    assert {1, 2} <= closing and max(closing) > 2


ALIBI = {"position_encoding": PositionEncoding.ALIBI}
CROSS, CONTEXT = blt.EncoderCrossAttention, blt.DecoderCrossAttention
OPTIONS = {
    "one_layer_input_k1": small(
        kv_from=blt.KeyValueSource.INPUT, cross_attn_k=1, ngrams=NgramConfig(kind=NgramKind.NONE)
    ),
    "all_layers": config(),
    "all_input_per_layer": config(
        kv_from=blt.KeyValueSource.INPUT,
        pool_queries=blt.PoolQueries.PER_LAYER,
        pooling=blt.Pooling.FIRST_BYTES,
        pooled_bytes=3,
    ),
    "released": config(
        encoder_cross_attention=CROSS.LAST,
        residual=blt.Residual.DOUBLED,
        ngrams=NgramConfig.released(sizes=(3, 8), vocab_size=53, num_functions=2),
        cross_attn_k=4,
        encoder_cross_heads=4,
        encoder_cross_kv_heads=2,
    ),
    "last_input_first": config(
        encoder_cross_attention=CROSS.LAST,
        kv_from=blt.KeyValueSource.INPUT,
        decoder_cross_attention=CONTEXT.FIRST,
        pooling=blt.Pooling.MAX_MEAN_MIN,
    ),
    "no_cross": config(
        encoder_cross_attention=CROSS.NONE,
        decoder_cross_attention=CONTEXT.NONE,
        pooling=blt.Pooling.MEAN,
        latent=stack(1, 32, 4),
    ),
    "patch_window_2": config(patch_window=2, decoder_cross_heads=4, decoder_cross_kv_heads=2),
    "patch_window_3_first": small(patch_window=3, decoder_cross_attention=CONTEXT.FIRST),
    "no_window": small(
        window=0,
        latent=stack(2, 24, 2, window=4, rope=RopeConfig(layout=RopeLayout.HALF_SPLIT)),
    ),
    "linear_bias_and_sinks": small(
        local_encoder=stack(1, window=7, **ALIBI),
        latent=stack(2, 24, 2, window=4, softmax=Softmax.LEARNED_SINK, **ALIBI),
        local_decoder=stack(1, window=7, softmax=Softmax.OFF_BY_ONE, **ALIBI),
    ),
    "max_patches": small(
        max_patches=3,
        latent=stack(2, 24, 2, scan_layers=False),
        ngrams=NgramConfig(
            sizes=(2, 8), vocab_size=53, start=NgramStart.PAD_ZERO, order=HashOrder.OLDEST_FIRST
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    decoder = make(OPTIONS[name], PATCHERS["max_length"])
    expected = decoder
    if name == "max_patches":
        # The limit belongs to training rows: generation has no such limit.
        full = dataclasses.replace(OPTIONS[name], max_patches=0)
        expected = decoder.replace(model=full.build())
    tokens = documents([30, 30])
    logits, _ = teacher_forced(expected, tokens)
    _, result = incremental(decoder, tokens, jnp.asarray([1, 9], jnp.int32))
    np.testing.assert_allclose(result[0], logits[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(result[1, 8:], logits[1, 8:], atol=1e-4, rtol=0)
