"""Benchmarks of pallas_kernels: one module per operation, each with `rows() -> list[dict]`.

A module's docstring describes its table; `python -m benchmarks.kernels` writes the tables.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians(
    runs: Mapping[str, Callable[[], Any]], alternations: int = 5, limit: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of functions run in alternation.

    Each is called once more before its clock starts, so that it finds its own memory and not the
    pages that another has given back. Stops early after `limit` seconds, never before every
    function ran twice.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for repeat in range(alternations):
        if repeat >= 2 and time.perf_counter() - begin > limit:
            break
        for name, run in runs.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of_name) for name, of_name in times.items()}


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled call (floats, *others) of function(*floats, *others): its result, and its
    gradients by the floats at that result."""

    @jax.jit
    def run(floats, *others):
        out, vjp = jax.vjp(lambda *x: function(*x, *others), *floats)
        return out, vjp(out)

    return run
