"""A BLT whose latent transformer has the rolling cache of StreamingLLM."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.streaming_blt import StreamingBLTDecoder
from blt_jax.decoding.streaming_llm import Rotation, dense, sinks, window
from blt_jax.models.blt_patching import PatcherConfig, PatcherKind
from tests.decoding import streams
from tests.models.test_blt_decode import documents, incremental, make, small, stack

STRIDED = PatcherConfig(kind=PatcherKind.STRIDED, stride=3)
TOKENS, LENGTHS = documents([40, 40]), jnp.asarray([5, 2])


def plain(window=0):
    """A decoder whose latent transformer has this window."""
    return make(small(latent=stack(1, 24, 2, window=window)), STRIDED)


@functools.cache
def logits(window=0):
    """Logits [2, 40, V] of a plain decoder."""
    return incremental(plain(window), TOKENS, LENGTHS)[1]


@pytest.mark.parametrize("rotation", list(Rotation))
def test_a_window_of_patches_equals_a_latent_transformer_with_a_window(rotation):
    decoder = StreamingBLTDecoder.create(plain(), window(4, rotation=rotation))
    assert isinstance(decoder, Decoder)
    cache, found = incremental(decoder, TOKENS, LENGTHS)
    np.testing.assert_allclose(found, logits(window=4), atol=1e-4)
    assert cache.latent.lengths.tolist() == [14, 14]


@functools.cache
def streamed():
    """A decoder with sinks, and its logits [2, 40, V] byte by byte."""
    decoder = StreamingBLTDecoder.create(plain(), sinks(1, 3))
    return decoder, incremental(decoder, TOKENS, LENGTHS)[1]


def test_sinks_change_nothing_before_a_patch_is_evicted():
    found = streamed()[1]
    # The first patch is one byte long: after 13 bytes there are five, one more than the cache has.
    np.testing.assert_allclose(found[:, :12], logits()[:, :12], atol=1e-4)
    # From then on it is neither the dense model nor the one with that window.
    for other in (logits(), logits(window=4)):
        assert np.abs(found[:, 20:] - other[:, 20:]).max() > 0.1


def recorded(decoder, seen):
    """The decoder, which notes (row, patches read before, input, output) of its latent steps."""

    def note(active, *arrays):
        chosen = np.asarray(active)
        seen.extend(zip(*(np.asarray(x)[chosen] for x in arrays), strict=True))

    def latent_step(stack, layers, x, cache, active, rows):
        out, after = decoder.blt.latent_step(stack, layers, x, cache, active, rows)
        every = jnp.arange(x.shape[0], dtype=jnp.int32) if rows is None else rows
        read = jnp.take(cache.read, every, mode="clip")
        jax.debug.callback(note, active, every, read, x, out)
        return out, after

    return decoder.replace(blt=decoder.blt.replace(latent_step=latent_step))


def test_the_latent_transformer_of_a_stream_equals_the_loop():
    """With weights so large that every patch in the cache matters; rows close patches at different
    times. The first patch is read by the full pass, so the loop starts with its key and value."""
    blt = plain()
    layers = blt.params["latent_transformer"]["layers"]
    layers = layers | {"attention": jax.tree.map(lambda x: 3 * x, layers["attention"])}
    blt = blt.replace(params=blt.params | {"latent_transformer": {"layers": layers}})
    decoder, seen = StreamingBLTDecoder.create(blt, sinks(2, 3)), []
    cache = jax.jit(StreamingBLTDecoder._first_byte)(decoder.prepare(), TOKENS[:, :1])[1].latent
    assert cache.lengths.tolist() == [1, 1]
    jax.block_until_ready(incremental(recorded(decoder, seen), TOKENS, LENGTHS))
    jax.effects_barrier()
    for row in (0, 1):
        patches = sorted((note for note in seen if note[0] == row), key=lambda note: note[1])
        assert [int(note[1]) for note in patches] == list(range(1, 14))
        inputs, found = (np.stack([note[part] for note in patches]) for part in (2, 3))

        def loop(num_sinks, window, row=row, inputs=inputs):
            first = [
                [(0, *(np.asarray(x[0][row, :, 0], np.float64) for x in (layer.key, layer.value)))]
                for layer in cache.layers
            ]
            stack = blt.config.latent
            return streams.stream_blocks(stack, layers, inputs, num_sinks, window, caches=first)

        expected = loop(2, 3)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        # Without one of the sinks, without the oldest recent patch, or with one more it is not so.
        for other in (loop(1, 4), loop(2, 2), loop(2, 4)):
            assert np.abs(expected[5:] - other[5:]).max() > 0.3


def test_a_prompt_after_a_prompt():
    decoder, expected = streamed()
    first, second = LENGTHS, jnp.asarray([20, 35])
    rest = jnp.stack([TOKENS[row, n : n + 35] for row, n in enumerate(LENGTHS.tolist())])

    @jax.jit
    def read(decoder):
        _, cache = decoder.prefill(TOKENS[:, :5], first)
        return decoder.extend(rest, second, cache)

    logits, cache = read(decoder)
    end = first + second
    np.testing.assert_allclose(logits, expected[jnp.arange(2), end - 1], atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, end)
    other = StreamingBLTDecoder.create(plain(), sinks(2, 2))
    with pytest.raises(ValueError, match=r"num_sinks=1.*must be one of .*num_sinks=2"):
        other.extend(rest, second, cache)
    with pytest.raises(ValueError, match=r"num_sinks=1.*must be one of .*num_sinks=2"):
        other.step(rest[:, 0], cache)
    _, unbounded = plain().prefill(TOKENS[:, :5], first)
    with pytest.raises(TypeError, match="SinkCache"):
        other.step(rest[:, 0], unbounded)


def test_bad_arguments():
    blt, create = make(small(), STRIDED), StreamingBLTDecoder.create
    with pytest.raises(ValueError, match="policy DENSE"):
        create(blt, dense())
    with pytest.raises(ValueError, match=r"local_encoder.window=0"):
        create(make(small(local_encoder=stack(1)), STRIDED), window(4))
    with pytest.raises(ValueError, match="window=3 tokens at most"):
        create(make(small(latent=stack(1, 24, 2, window=3)), STRIDED), window(4))
    with pytest.raises(ValueError, match="max_patch_length=0"):
        space = PatcherConfig(kind=PatcherKind.SPACE)
        create(make(small(), space), window(4))
    limited = dataclasses.replace(space, max_patch_length=6)
    assert create(make(small(), limited), window(4)).blt.longest_patch == 6
