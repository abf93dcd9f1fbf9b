"""Training cost of the options of Llama 3: position bias, softmax with a sink, sink tokens.

    python -m benchmarks.llama_options [--length=1024]

Loss and gradient of the byte-level model of the run `tiny` (4 layers of width 128, 4 heads) with
random weights, float32, on 2,048 tokens: 16 rows of 128 or 2 of 1,024, one document each. Every
option beside the default in one process: the least of seven runs, all in turn, the order reversed
every other time; the seconds each program took to compile. An argument chooses a part, which is
printed and not kept.
"""

import dataclasses
import functools
import sys
import time

from benchmarks import reporting
from benchmarks.timing import times_in_turn
from blt_jax.dist.huge_pages import use_huge_pages

LENGTHS, TOKENS, RUNS = (128, 1024), 2048, 7


def options() -> dict:
    """The configs by the name of their option; the default first."""
    from blt_jax.layers.transformer import PositionEncoding, Softmax
    from blt_jax.models import llama3

    config = llama3.byte_level(num_layers=4, d_model=128, num_heads=4)
    config = dataclasses.replace(
        config, transformer=dataclasses.replace(config.transformer, scan_layers=False)
    )

    def stack(**changes):
        changed = dataclasses.replace(config.transformer, **changes)
        return dataclasses.replace(config, transformer=changed)

    return {
        "default": config,
        "ALiBi": stack(position_encoding=PositionEncoding.ALIBI),
        "softmax off by one": stack(softmax=Softmax.OFF_BY_ONE),
        "learned sink": stack(softmax=Softmax.LEARNED_SINK),
        "1 sink token": dataclasses.replace(config, sink_tokens=1),
        "4 sink tokens": dataclasses.replace(config, sink_tokens=4),
    }


def batch_of(length: int) -> dict:
    """A training batch of rows of that length with one document each."""
    import numpy as np

    shape = (TOKENS // length, length)
    ids = np.random.default_rng(0).integers(0, 256, (shape[0], length + 1)).astype(np.int32)
    ones = np.ones(shape, np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": ones,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "target_mask": ones > 0,
        "target_bytes": ones,
    }


def compiled(config, batch: dict):
    """Loss and gradient as a function without arguments, and the seconds it took to compile."""
    import jax

    from blt_jax.dist.sharding import init_params

    model = config.build()
    params = init_params(model, jax.random.key(0))

    def loss(params, batch):
        sums = model.loss(params, batch)
        return sums.objective / sums.weight

    started = time.perf_counter()
    program = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    seconds = time.perf_counter() - started
    return functools.partial(program, params, batch), seconds


def measure(length: int) -> list[dict]:
    """The rows of the table for one length."""
    batch = batch_of(length)
    compiled_options = {name: compiled(config, batch) for name, config in options().items()}
    programs = {name: program for name, (program, _) in compiled_options.items()}
    times = times_in_turn(programs, RUNS)
    default = min(times["default"])
    return [
        {
            "length": length,
            "option": name,
            "milliseconds": 1e3 * min(times[name]),
            "times_default": min(times[name]) / default,
            "compile_seconds": seconds,
            "runs": times[name],
        }
        for name, (_, seconds) in compiled_options.items()
    ]


def main(argv: list[str]) -> None:
    lengths = [int(argument.removeprefix("--length=")) for argument in argv] or LENGTHS
    rows = [row for length in lengths for row in measure(length)]
    if not argv:
        reporting.save("llama_options", __doc__, rows)
        return
    for row in rows:
        print({key: value for key, value in row.items() if key != "runs"})


if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
