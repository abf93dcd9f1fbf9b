"""Times of programs that take turns in one process."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any


def times_in_turn(
    programs: Mapping[str, Callable[[], Any]], runs: int, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every run of each program, the order reversed every other time.

    Each is called once more before its clock starts, so that it finds its own memory and not the
    pages that another has given back. Stops early after `limit` seconds, never before every
    program ran twice.
    """
    import jax  # here: callers may restart the process before jax is imported

    times: dict[str, list[float]] = {name: [] for name in programs}
    names, begin = list(programs), time.perf_counter()
    for run in range(runs):
        if run >= 2 and time.perf_counter() - begin > limit:
            break
        for name in names if run % 2 else reversed(names):
            jax.block_until_ready(programs[name]())
            started = time.perf_counter()
            jax.block_until_ready(programs[name]())
            times[name].append(time.perf_counter() - started)
    return times
