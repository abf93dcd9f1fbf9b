"""Time and state per token of every cache policy, and of whole streams at once.

    python -m benchmarks.streaming_llm

The byte-level Llama of the run `tiny` (3 layers of width 96, 4 heads) with random weights, one row.
Steps: the median over blocks of tokens in one compiled loop, with full caches; dense has read as
many tokens as its cache holds, which is what the others hold after any number of them. Streams:
16,384 tokens one by one and at once, scores included, in alternation; at two widths, with the
default rotation of keys in every step, and with keys rotated once.
"""

import itertools
import json
import statistics
import time

import numpy as np

from benchmarks import reporting

CACHES, STREAM, ALTERNATIONS = (64, 256, 1024), 16_384, 3
WIDTHS = (96, 256)
STREAM_CACHES = (64, 1024)
STEPS = {"recompute": 4}
"""Tokens per block, 64 for those not named."""


def make_model(width: int):
    """The model and its parameters."""
    import dataclasses

    import jax

    from blt_jax.dist.sharding import init_params
    from blt_jax.models import llama3

    config = llama3.byte_level(num_layers=3, d_model=width, num_heads=4)
    stack = dataclasses.replace(config.transformer, scan_layers=False)
    model = dataclasses.replace(config, transformer=stack).build()
    return model, init_params(model, jax.random.key(0))


def policies(cache: int):
    """(name, config, capacity) of the policies with `cache` keys."""
    from blt_jax.decoding import streaming_llm as sl

    two_phase = sl.Rotation.TWO_PHASE
    return (
        ("sinks", sl.sinks(4, cache - 4), 0),
        ("sinks, keys rotated once", sl.sinks(4, cache - 4, rotation=two_phase), 0),
        ("window", sl.window(cache), 0),
        ("recompute", sl.recompute(cache), 0),
        ("dense", sl.dense(), cache + 65),
    )


def step_run(model, params, config, capacity: int, cache_size: int, steps: int):
    """A function that reads `steps` tokens with a full cache and returns ms per token, and the
    bytes of the cache."""
    import functools

    import jax
    import jax.numpy as jnp

    from blt_jax.decoding.streaming_decoder import streaming_decoder

    decoder = streaming_decoder(model, params, config, capacity).prepare()
    tokens = np.random.default_rng(0).integers(0, 256, (1, cache_size)).astype(np.int32)
    _, cache = jax.jit(type(decoder).prefill)(decoder, tokens, jnp.asarray([cache_size]))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(decoder, cache):
        def body(_, state):
            token, cache = state
            logits, cache = decoder.step(token, cache)
            return logits.argmax(-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, body, (jnp.zeros((1,), jnp.int32), cache))

    state = [cache]

    def run() -> float:
        if capacity:  # a dense cache would run full
            state[0] = state[0].replace(
                key_values=state[0].key_values.replace(lengths=jnp.asarray([cache_size]))
            )
        started = time.perf_counter()
        _, state[0] = jax.block_until_ready(loop(decoder, state[0]))
        return 1e3 * (time.perf_counter() - started) / steps

    run()
    return run, size


def step_rows(model, params) -> list[dict]:
    """ms and bytes per token of each policy and cache size."""
    rows = []
    for cache in CACHES:
        runs = {}
        for name, config, capacity in policies(cache):
            steps = STEPS.get(name, 64)
            runs[name] = step_run(model, params, config, capacity, cache, steps)
        figures = {name: [] for name in runs}
        for _ in range(ALTERNATIONS):
            for name, (run, _) in runs.items():
                figures[name].append(run())
        recompute = statistics.median(figures["recompute"])
        for name, (_, size) in runs.items():
            median = statistics.median(figures[name])
            rows.append(
                {
                    "case": name,
                    "keys": cache,
                    "width": model.config.transformer.d_model,
                    "ms_per_token": median,
                    "times_recompute": recompute / median,
                    "state_bytes": size,
                    "runs": figures[name],
                }
            )
    return rows


def stream_rows(width: int, cache: int, rotation) -> list[dict]:
    """A stream one token at a time, and at once."""
    import jax
    import jax.numpy as jnp

    from blt_jax.decoding import streaming_llm as sl
    from blt_jax.decoding.streaming_decoder import streaming_decoder
    from blt_jax.decoding.streaming_scores import streaming_nats

    model, params = make_model(width)
    config = sl.sinks(4, cache - 4, rotation=rotation)
    tokens = np.random.default_rng(1).integers(0, 256, (1, STREAM)).astype(np.int32)

    @jax.jit
    def one_by_one(decoder, tokens):
        decoder = decoder.prepare()

        def body(cache, pair):
            logits, cache = decoder.step(pair[0], cache)
            log_p = jax.nn.log_softmax(logits, axis=-1)
            return cache, -jnp.take_along_axis(log_p, pair[1][:, None], axis=1)[:, 0]

        return jax.lax.scan(body, decoder.new_cache(1), (tokens[:, :-1].T, tokens[:, 1:].T))[1]

    decoder = streaming_decoder(model, params, config)
    runs = {
        "one by one": lambda: one_by_one(decoder, tokens)[:, 0],
        "at once": lambda: streaming_nats(model, params, config, tokens)[0],
    }
    results = [np.asarray(run()) for run in runs.values()]
    difference = float(np.abs(results[0] - results[1]).max())
    assert difference < 1e-4, difference
    figures = {name: [] for name in runs}
    for _ in range(ALTERNATIONS):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            figures[name].append(time.perf_counter() - started)
    slow = statistics.median(figures["one by one"])
    once = ", keys rotated once" if rotation is sl.Rotation.TWO_PHASE else ""
    return [
        {
            "case": f"stream {name}{once}",
            "keys": config.size,
            "width": width,
            "ms_per_token": 1e3 * statistics.median(values) / STREAM,
            "times_one_by_one": slow / statistics.median(values),
            "largest_difference_nats": difference,
            "runs": values,
        }
        for name, values in figures.items()
    ]


def main() -> None:
    from blt_jax.decoding.streaming_llm import Rotation

    rows = step_rows(*make_model(WIDTHS[0]))
    for width, cache, rotation in itertools.product(WIDTHS, STREAM_CACHES, Rotation):
        rows += stream_rows(width, cache, rotation)
        print(json.dumps(rows[-1]), flush=True)
    reporting.save("streaming_llm", __doc__, rows)


if __name__ == "__main__":
    main()
