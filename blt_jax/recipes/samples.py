"""Text generated at the end of a run, with the speed and counts of its generation."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blt_jax.data.tokenizers import Tokenizer
from blt_jax.decoding.decoder import Decoder
from blt_jax.decoding.sampling import SamplingConfig, generate
from blt_jax.train.pretraining import Context


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] right-padded with 0, and lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return tokens, lengths


def encode_prompts(tokenizer: Tokenizer, prompts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, T] of the prompts after BOS, right-padded with 0, and their lengths [B]."""
    return pad_rows([tokenizer.encode(prompt, bos=True) for prompt in prompts])


def samples_wanted(prompts: tuple[str, ...], max_new_tokens: int) -> bool:
    """Whether texts are to be generated at the end of a run: not on several processes."""
    if not (prompts and max_new_tokens):
        return False
    if jax.process_count() > 1:
        if jax.process_index() == 0:
            print("no samples on several processes: use python -m blt_jax.generate", flush=True)
        return False
    return True


def generate_texts(
    context: Context,
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: tuple[str, ...],
    sampling: SamplingConfig,
    max_new_tokens: int,
) -> dict[str, float]:
    """Writes a continuation of every prompt to `texts/samples.txt` and prints it.

    Returns bytes per second (compiled program, second call) and the decoder's counters per byte.
    """
    tokens, lengths = (jnp.asarray(x) for x in encode_prompts(tokenizer, prompts))
    key = jax.random.fold_in(context.key, 1)
    arguments = (sampling, max_new_tokens, tuple(tokenizer.stop_ids), key)
    jax.block_until_ready(generate(decoder, tokens, lengths, *arguments))
    started = time.perf_counter()
    result = jax.block_until_ready(generate(decoder, tokens, lengths, *arguments))
    seconds = time.perf_counter() - started
    texts, num_bytes = [], 0
    for prompt, row, length in zip(prompts, result.tokens, result.lengths, strict=True):
        continuation = tokenizer.decode(np.asarray(row)[: int(length)])
        num_bytes += len(continuation)
        texts.append(f"[{prompt!r}]\n{prompt}{continuation.decode(errors='replace')}\n")
    text = "\n".join(texts)
    context.writer.text("samples", text)
    if jax.process_index() == 0:
        print(text, flush=True)
    numbers = {"generated_bytes_per_second": num_bytes / seconds}
    for name, counts in result.stats.items():
        if name != "bytes":
            numbers[f"generated_{name}_per_byte"] = float(np.sum(counts)) / max(num_bytes, 1)
    return numbers
