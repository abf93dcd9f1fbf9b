"""Continuing text prompts, with programs compiled once per prompt length."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.sampling import SamplingConfig, compile_generation

SHORTEST = 32


class Generator:
    """Continues prompts; prompts are padded to powers of two, one program for each.

    make_decoder: the decoder of a given capacity. tokenizer: encode, decode, stop_ids.
    """

    def __init__(
        self,
        make_decoder: Callable[[int], Decoder],
        tokenizer: Any,
        sampling: SamplingConfig,
        max_new_tokens: int,
        num_samples: int = 1,
    ):
        self._make_decoder, self._tokenizer, self._sampling = make_decoder, tokenizer, sampling
        self._max_new_tokens, self._num_samples = max_new_tokens, num_samples
        self._programs: dict[int, Callable[..., Any]] = {}

    def __call__(self, prompt: str, key: jax.Array) -> tuple[list[bytes], dict[str, int | float]]:
        """The continuations of a prompt (BOS is added), and what `statistics` counts."""
        ids = np.asarray(self._tokenizer.encode(prompt, bos=True), np.int32)
        padded = max(SHORTEST, 1 << (len(ids) - 1).bit_length())
        tokens = np.zeros((self._num_samples, padded), np.int32)
        tokens[:, : len(ids)] = ids
        lengths = np.full(self._num_samples, len(ids), np.int32)
        if padded not in self._programs:
            self._programs[padded] = self._compile(tokens, lengths, key)
        started = time.perf_counter()
        result = jax.block_until_ready(self._programs[padded](tokens, lengths, key))
        seconds = time.perf_counter() - started
        rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
        texts = [self._tokenizer.decode(row[:length]) for row, length in rows]
        return texts, statistics(sum(map(len, texts)), seconds, result.stats)

    def _compile(self, tokens, lengths, key):
        started = time.perf_counter()
        program = compile_generation(
            self._make_decoder(tokens.shape[1] + self._max_new_tokens),
            tokens,
            lengths,
            self._sampling,
            self._max_new_tokens,
            tuple(self._tokenizer.stop_ids),
            key,
        )
        print(f"(compiled in {time.perf_counter() - started:.1f} s)", file=sys.stderr)
        return program


def statistics(num_bytes: int, seconds: float, counters: dict[str, Any]) -> dict[str, int | float]:
    """Bytes, bytes per second and, for a BLT, patches and global steps per byte that was read."""
    stats = {"bytes": num_bytes, "bytes_per_second": num_bytes / seconds}
    if "patches" in counters:
        stats["patches"] = int(np.sum(counters["patches"]))
        read = max(int(np.sum(counters["bytes"])), 1)
        stats["global_steps_per_byte"] = int(np.sum(counters["latent_runs"])) / read
    return stats


def format_statistics(stats: dict[str, int | float]) -> str:
    """One line."""
    parts = (
        f"{value:,.3g} {name}" if isinstance(value, float) else f"{value:,} {name}"
        for name, value in stats.items()
    )
    return ", ".join(parts).replace("_", " ")
