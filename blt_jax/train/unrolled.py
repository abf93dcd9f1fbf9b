"""The work of a deep train step from programs of one and two layers without a loop over layers.

A second way beside the deep program itself, whose loop bodies `train.hlo` multiplies by their trip
counts: fixed part + layers x (two layers - one layer), for every stack of the model.
"""

import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from blt_jax.train.compilation import (
    Work,
    compile_job,
    estimate,
    program_flops,
    replace_stacks,
    stacks_of,
    train_job,
    work_of,
)
from blt_jax.train.hlo import Program
from blt_jax.train.pretraining import Phase, Pretraining


def unrolled_estimate(config: Pretraining, phase: Phase, mesh: Mesh) -> dict[str, Any]:
    """The estimate of a phase's step: one compile with a layer in each stack, and one more for
    every deeper stack; `compile_seconds` of all of them."""
    model, started = phase.model or config.model, time.perf_counter()
    depths = {name: part.num_layers for name, part in stacks_of(model)}

    def work(layers: dict[tuple[str, ...], int]) -> Work:
        changes = {
            name: {"num_layers": count, "scan_layers": False} for name, count in layers.items()
        }
        few = dataclasses.replace(phase, model=replace_stacks(model, changes))
        job = train_job(config, few, mesh)
        _, text, _ = compile_job(job)
        return work_of(job, Program(text), program_flops(job)[0])

    one = dict.fromkeys(depths, 1)
    first = total = work(one)
    for name, depth in depths.items():
        if depth > 1:
            layer = work(one | {name: 2}).plus(first.scaled(-1))
            total = total.plus(layer.scaled(depth - 1))
    numbers = estimate(train_job(config, phase, mesh), total)
    return numbers | {
        "program_flops": total.flops,
        "compile_seconds": round(time.perf_counter() - started, 1),
    }
