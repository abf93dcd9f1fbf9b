"""Several experiments beside each other: one table, one figure, repeated over seeds if asked."""

import dataclasses
import json
import math
import time
from typing import Any

import jax
import numpy as np

from blt_jax.dist.multihost import text_of_first
from blt_jax.train import configs
from blt_jax.train.pretraining import Context, Experiment
from blt_jax.train.workdir import claim_workdir
from blt_jax.train.writers import read_metrics, read_results


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Comparison(Experiment):
    """Runs each (name, experiment) in its own subfolder and compares `metric` of their numbers.

    further: other numbers of the runs to report beside it, where a run has them. seeds: repeats
    every experiment with each of them (all fields named `seed`, except in model configs); empty:
    once, as it is. Differences are taken against the first run, seed by seed. Finished runs are
    not run again.
    """

    runs: tuple[tuple[str, Experiment], ...] = ()
    metric: str = "bits_per_byte"
    further: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def __post_init__(self):
        names = [name for name, _ in self.runs]
        if not names:
            raise ValueError("Comparison.runs is empty: give (name, experiment) pairs")
        if len(set(names)) != len(names):
            raise ValueError(f"Comparison.runs={names}: the names must differ")
        for name in names:
            if not name or not all(c.isalnum() or c in "_.-" for c in name):
                raise ValueError(
                    f"Comparison.runs: name {name!r} must consist of letters, digits, '_', '.', '-'"
                )
        if not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"Comparison.seeds={self.seeds}: must be whole numbers")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"Comparison.seeds={self.seeds}: must differ")

    def run(self, context: Context) -> dict[str, float]:
        """All runs, then their `report`."""
        found: dict[str, list[dict[str, float]]] = {}
        for name, experiment in self.runs:
            found[name] = []
            for part, seed in self._parts(name):
                repeated = experiment if seed is None else configs.replace_seeds(experiment, seed)
                numbers = _run_child(context, part, repeated)
                if self.metric not in numbers:
                    raise ValueError(
                        f"Comparison.metric={self.metric!r}: run {name!r} gives {sorted(numbers)}"
                    )
                found[name].append(numbers)
        return self.report(context, found)

    def report(
        self, context: Context, found: dict[str, list[dict[str, float]]]
    ) -> dict[str, float]:
        """`comparison.txt`, `comparison.json`, `figures/comparison.png` and the numbers.

        found: the numbers of every repetition of each run.
        """
        rows = compare(
            {name: [float(n[self.metric]) for n in repeated] for name, repeated in found.items()}
        )
        further = {
            name: {key: own[key][0] for key in self.further if key in own}
            for name, own in means(found).items()
        }
        if jax.process_index() == 0:
            table = format_table(rows, self.metric)
            if self.further:
                table += "\n\n" + format_further(further, self.further)
            print(table, flush=True)
            (context.workdir / "comparison.txt").write_text(table + "\n")
            kept = {"metric": self.metric, "seeds": self.seeds, "runs": rows, "further": further}
            (context.workdir / "comparison.json").write_text(json.dumps(kept, indent=2))
            context.writer.text("comparison", table)
            context.writer.figure("comparison", self._figure(context, rows))
        numbers = {}
        for name, row in rows.items():
            numbers[f"{name}/{self.metric}"] = row["mean"]
            for key in ("interval", "difference", "difference_interval"):
                if row[key] is not None:
                    numbers[f"{name}/{key}"] = row[key]
            numbers |= {f"{name}/{key}": value for key, value in further[name].items()}
        return numbers

    def _parts(self, name: str) -> list[tuple[str, int | None]]:
        """(subfolder, seed) of every repetition of a run; seed None: as it is."""
        return [(f"{name}/seed_{seed}", seed) for seed in self.seeds] or [(name, None)]

    def _figure(self, context: Context, rows: dict[str, dict[str, Any]]) -> Any:
        import matplotlib.figure

        curves = {name: self._curves_of(context, name) for name in rows}
        panels = 1 + any(curves.values())  # a metric of the end alone has no curve
        figure = matplotlib.figure.Figure(figsize=(5.5 * panels, 4), layout="constrained")
        left, *others = figure.subplots(1, panels, squeeze=False)[0]
        for index, (name, row) in enumerate(rows.items()):
            color = f"C{index}"
            left.plot([index] * len(row["values"]), row["values"], "o", color=color, alpha=0.5)
            left.errorbar(index, row["mean"], row["interval"], fmt="_", color=color, capsize=4)
            for number, curve in enumerate(curves[name]):
                label = None if number else name
                others[0].plot(*zip(*curve, strict=True), color=color, linewidth=1, label=label)
        left.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right")
        left.set_xlim(-0.5, len(rows) - 0.5)
        left.set_ylabel(self.metric)
        left.grid(alpha=0.3)
        for right in others:
            right.set_xlabel("step")
            right.set_title(f"{self.metric} in training", fontsize=10)
            right.grid(alpha=0.3)
            right.legend(fontsize=8)
        return figure

    def _curves_of(self, context: Context, name: str) -> list[list[tuple[int, float]]]:
        """(step, metric) of every repetition of a run that recorded the metric in training."""
        lines = [read_metrics(context.workdir / part) for part, _ in self._parts(name)]
        curves = [[(n["step"], n[self.metric]) for n in run if self.metric in n] for run in lines]
        return [curve for curve in curves if curve]


def _run_child(context: Context, part: str, experiment: Experiment) -> dict[str, float]:
    child = context.child(part, key=jax.random.key(experiment.seed))
    claim_workdir(child.workdir, experiment)
    child.claimed, child.shared = True, context.shared or context.workdir / "shared"
    finished = json.loads(text_of_first(json.dumps(read_results(child.workdir))))
    if finished is not None:
        return finished["numbers"]
    if jax.process_index() == 0:
        print(f"--- {part}", flush=True)
    started = time.perf_counter()
    try:
        numbers = experiment.run(child)
        child.writer.results(numbers, experiment, time.perf_counter() - started)
    finally:
        child.writer.close()
    return numbers


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% Student-t interval (None for a single value)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    import scipy.stats

    quantile = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def means(
    found: dict[str, list[dict[str, float]]],
) -> dict[str, dict[str, tuple[float, float | None]]]:
    """`mean_and_interval` over the repetitions, of every number that all of a run's have."""
    return {
        name: {
            key: mean_and_interval([float(numbers[key]) for numbers in repeated])
            for key in repeated[0]
            if all(key in numbers for numbers in repeated)
        }
        for name, repeated in found.items()
    }


def compare(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Per run: values, mean, interval, and the paired difference to the first run."""
    first = next(iter(values.values()))
    rows = {}
    for index, (name, own) in enumerate(values.items()):
        mean, interval = mean_and_interval(own)
        difference = difference_interval = None
        if index:
            pairs = [a - b for a, b in zip(own, first, strict=True)]
            difference, difference_interval = mean_and_interval(pairs)
        rows[name] = {
            "values": own,
            "mean": mean,
            "interval": interval,
            "difference": difference,
            "difference_interval": difference_interval,
        }
    return rows


def format_table(rows: dict[str, dict[str, Any]], metric: str) -> str:
    """The table of `comparison.txt`; intervals are 95% Student-t over the seeds."""

    def cell(value, interval, sign=""):
        if value is None:
            return ""
        return f"{value:{sign}.4f}" + (f" ± {interval:.4f}" if interval is not None else "")

    first = next(iter(rows))
    table = [("run", metric, f"difference to {first}", "runs")]
    for name, row in rows.items():
        difference = cell(row["difference"], row["difference_interval"], "+")
        table.append(
            (name, cell(row["mean"], row["interval"]), difference, str(len(row["values"])))
        )
    return aligned(table)


def format_further(numbers: dict[str, dict[str, float]], keys: tuple[str, ...]) -> str:
    """Table of further numbers, means over the seeds: a line per number, a column per run."""
    lines = [("", *numbers)]
    for key in keys:
        cells = [f"{own[key]:.6g}" if key in own else "" for own in numbers.values()]
        lines.append((key, *cells))
    return aligned(lines)


def aligned(table: list[tuple[str, ...]]) -> str:
    """Lines of cells as text, in columns of even width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
