"""Generation of BLT beside the peer that recomputes the whole prefix for every byte.

    python -m benchmarks.blt_generation

Same configuration on both sides (see blt_peer), random weights, strided patches of 4, greedy. The
peer is timed on single bytes at spread prefix lengths, in alternation with our runs, and its time
for 512 bytes is their sum. Our figures are medians of runs of NEW_BYTES bytes in one compiled
program, prefill of the one-byte prompt included.
"""

import statistics
import time

import numpy as np

from benchmarks import blt_peer, reporting
from benchmarks.blt_training import make_config

NEW_BYTES, ALTERNATIONS = 511, 5
PREFIXES = (1, 65, 129, 193, 257, 321, 385, 449, 512)


def our_decoder(capacity: int, *, live: bool, stride: int = 4):
    """A decoder with random weights; live: patches by an entropy model of 2 layers, width 96."""
    import jax

    from blt_jax.dist.sharding import init_params
    from blt_jax.layers.transformer import TransformerConfig
    from blt_jax.models import blt
    from blt_jax.models.blt_decode import BLTDecoder
    from blt_jax.models.blt_patching import PatcherConfig, PatcherKind

    model = make_config(0).build()
    params = init_params(model, jax.random.key(0))
    if not live:
        patcher = PatcherConfig(kind=PatcherKind.STRIDED, stride=stride)
        return BLTDecoder.create(model, params, patcher, capacity)
    stack = TransformerConfig(num_layers=2, d_model=96, num_heads=4, window=512)
    entropy_model = blt.EntropyModelConfig(transformer=stack).build()
    entropy_params = init_params(entropy_model, jax.random.key(1))
    # Random weights hardly differ in entropy: bytes of at most four per patch keep it comparable.
    patcher = PatcherConfig(
        kind=PatcherKind.MONOTONIC, relative_threshold=1e3, max_patch_length=stride
    )
    return BLTDecoder.create(model, params, patcher, capacity, entropy_model, entropy_params)


def our_run(capacity: int, batch: int = 1, *, live: bool = False, spread: bool = False):
    """A function that generates NEW_BYTES bytes in each row and returns bytes per second.

    spread: prompts of 1, 2, 3, ... bytes, so that rows close their patches at different bytes.
    """
    import jax

    from blt_jax.decoding.sampling import SamplingConfig, compile_generation

    decoder = our_decoder(capacity, live=live)
    lengths = 1 + np.arange(batch, dtype=np.int32) % (4 if spread else 1)
    tokens = np.full((batch, int(lengths.max())), 40, np.int32)
    tokens[:, 0] = 1
    settings = (SamplingConfig(temperature=0.0), NEW_BYTES)
    program = compile_generation(decoder, tokens, lengths, *settings)

    def run() -> float:
        started = time.perf_counter()
        result = jax.block_until_ready(program(tokens, lengths))
        return float(np.sum(result.lengths)) / (time.perf_counter() - started)

    run()
    return run


def peer_run():
    """A function that returns the peer's bytes per second over 512 bytes, prefix by prefix."""
    import torch

    model = blt_peer.make_peer(1024).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 260, (1, max(PREFIXES))))

    @torch.no_grad()
    def next_byte(length: int) -> float:
        lengths = torch.from_numpy(blt_peer.strided_lengths(length)[None])
        started = time.perf_counter()
        logits = model(
            input_ids=ids[:, :length], patch_lengths=lengths, use_cache=False, logits_to_keep=1
        ).logits
        int(logits[0, -1].argmax())
        return time.perf_counter() - started

    def run() -> float:
        seconds = [next_byte(length) for length in PREFIXES]
        return 1.0 / float(np.interp(np.arange(1, 513), PREFIXES, seconds).mean())

    run()
    return run


def main() -> None:
    runs = {
        "peer, full recomputation, 512 bytes": peer_run(),
        "batch 1, capacity 1,024": our_run(1024),
        "batch 1, capacity 8,192": our_run(8192),
        "batch 8, capacity 1,024, rows apart": our_run(1024, 8, spread=True),
        "batch 1, capacity 1,024, live entropy model": our_run(1024, live=True),
        "batch 1, capacity 8,192, live entropy model": our_run(8192, live=True),
        "batch 8, capacity 1,024, rows apart, live entropy model": our_run(
            1024, 8, live=True, spread=True
        ),
    }
    figures = {name: [] for name in runs}
    for _ in range(ALTERNATIONS):
        for name, run in runs.items():
            figures[name].append(run())
    peer, *_ = (statistics.median(values) for values in figures.values())
    rows = [
        {
            "case": name,
            "bytes_per_second": statistics.median(values),
            "us_per_byte": 1e6 / statistics.median(values),
            "times_peer": statistics.median(values) / peer,
            "runs": values,
        }
        for name, values in figures.items()
    ]
    reporting.save("blt_generation", __doc__, rows)


if __name__ == "__main__":
    main()
