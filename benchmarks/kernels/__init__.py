"""Benchmarks of pallas_kernels: one module per operation, each with `rows()`, an iterable of dicts.

A module's docstring describes its table; `python -m benchmarks.kernels` writes the tables, row by
row where `rows` is a generator. Where `rows` has a parameter `only`, rows are made only for what
has that text in its operation and shape.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.timing import times_in_turn


def medians(
    runs: Mapping[str, Callable[[], Any]], alternations: int = 5, limit: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of functions run in alternation, see `times_in_turn`."""
    times = times_in_turn(runs, alternations, limit)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled call (floats, *others) of function(*floats, *others): its result, and its
    gradients by the floats at that result."""

    @jax.jit
    def run(floats, *others):
        out, vjp = jax.vjp(lambda *x: function(*x, *others), *floats)
        return out, vjp(out)

    return run
