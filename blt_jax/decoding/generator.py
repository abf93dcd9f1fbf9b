"""Continuing text prompts, with programs compiled once per prompt length."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.sampling import Generation, SamplingConfig, compile_generation

SHORTEST = 32


class Generator:
    """Continues prompts; prompts are padded to powers of two, one program for each.

    make_decoder: the decoder of a given capacity. tokenizer: encode, decode, stop_ids.
    conversation: every prompt comes after the last one and what it was continued with; the decoder
    must be one whose rows never run full.
    """

    def __init__(
        self,
        make_decoder: Callable[[int], Decoder],
        tokenizer: Any,
        sampling: SamplingConfig,
        max_new_tokens: int,
        num_samples: int = 1,
        conversation: bool = False,
    ):
        self._make_decoder, self._tokenizer, self._sampling = make_decoder, tokenizer, sampling
        self._max_new_tokens, self._num_samples = max_new_tokens, num_samples
        self._conversation, self._previous = conversation, None
        self._programs: dict[tuple[int, bool], Callable[..., Any]] = {}

    def __call__(self, prompt: str, key: jax.Array) -> tuple[list[bytes], dict[str, int | float]]:
        """The continuations of a prompt, and what `statistics` counts. BOS is added, but not inside
        a conversation."""
        previous: Generation | None = self._previous
        ids = np.asarray(self._tokenizer.encode(prompt, bos=previous is None), np.int32)
        padded = max(SHORTEST, 1 << (len(ids) - 1).bit_length())
        tokens = np.zeros((self._num_samples, padded), np.int32)
        tokens[:, : len(ids)] = ids
        lengths = np.full(self._num_samples, len(ids), np.int32)
        program = padded, previous is None
        if program not in self._programs:
            self._programs[program] = self._compile(tokens, lengths, key, previous)
        started = time.perf_counter()
        result = self._programs[program](tokens, lengths, key, previous)
        result = jax.block_until_ready(result)
        seconds = time.perf_counter() - started
        if self._conversation:
            self._previous = result
        rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
        texts = [self._tokenizer.decode(row[:length]) for row, length in rows]
        return texts, statistics(sum(map(len, texts)), seconds, result.stats)

    def _compile(self, tokens, lengths, key, previous):
        started = time.perf_counter()
        program = compile_generation(
            self._make_decoder(tokens.shape[1] + self._max_new_tokens),
            tokens,
            lengths,
            self._sampling,
            self._max_new_tokens,
            tuple(self._tokenizer.stop_ids),
            key,
            previous=previous,
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
