"""Figures, tables and texts of the contrastive runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from blt_jax.decoding.contrastive_decoding import majority_vote
from blt_jax.train.comparison import aligned

Mean = tuple[float, float | None]
"""A mean over seeds and half the width of its 95 % interval, None for one seed."""

BOOTSTRAP_DRAWS = 2000


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean, by resampling; the same for the same values."""
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("values is empty: at least one is needed")
    drawn = np.random.default_rng(0).integers(values.size, size=(BOOTSTRAP_DRAWS, values.size))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def vote_shares(
    rounds: Sequence[Sequence[Any]], truth: Sequence[Any], votes: Sequence[int]
) -> dict[int, float]:
    """Share of questions whose majority of the first k answers is right, for every k of `votes`;
    rounds: one answer, or None, to every question each."""
    shares = {}
    for k in votes:
        voted = [majority_vote(column) for column in zip(*rounds[:k], strict=True)]
        shares[k] = float(np.mean([a == b for a, b in zip(voted, truth, strict=True)]))
    return shares


def strength_figure(exact_match: dict[tuple[float, float], np.ndarray], greedy: np.ndarray) -> Any:
    """Exact match by beta, a line per alpha, with 95 % bootstrap intervals over problems.

    exact_match: whether each answer is right, by (alpha, beta); greedy: of the expert alone.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    alphas = sorted({alpha for alpha, _ in exact_match})
    for number, alpha in enumerate(alphas):
        strengths = sorted(beta for a, beta in exact_match if a == alpha)
        points = [(0.0, greedy), *((beta, exact_match[alpha, beta]) for beta in strengths)]
        means = np.array([right.mean() for _, right in points])
        bounds = np.array([bootstrap_interval(right) for _, right in points]).T
        places = np.array([beta for beta, _ in points]) + 0.01 * (number - (len(alphas) - 1) / 2)
        axes.errorbar(places, means, abs(bounds - means), marker="o", capsize=3, label=f"{alpha:g}")
    axes.set_xlabel("beta (0: the expert alone)")
    axes.set_ylabel("exact match")
    axes.grid(alpha=0.3)
    if alphas:
        axes.legend(title="alpha")
    return figure


def outcome_text(
    stories: Sequence[str],
    expected: Sequence[str],
    greedy: tuple[Sequence[str], np.ndarray],
    contrast: tuple[Sequence[str], np.ndarray],
    examples: int,
) -> str:
    """Problems that only the contrast solves, then those that only greedy decoding solves.

    greedy, contrast: what was written to each story, and whether its answer is right.
    """
    parts = []
    for title, better, worse in (
        ("solved by the contrast alone", contrast[1], greedy[1]),
        ("solved by greedy decoding alone", greedy[1], contrast[1]),
    ):
        found = np.flatnonzero((better > 0) & (worse == 0))
        parts.append(f"{title}: {len(found)} of {len(stories)}\n")
        parts += [
            f"{stories[i]}\n  right     {expected[i]}\n  greedy    {greedy[0][i]}\n"
            f"  contrast  {contrast[0][i]}\n"
            for i in found[:examples]
        ]
    return "\n".join(parts)


COLUMNS = ("exact_match", "shortcut_rate", "copy_rate", "vote_1", "vote_5", "vote_20")
RANKING = ("ranking_accuracy", "ranking_above_shortcut")


def amateur_table(found: dict[str, dict[str, Mean]]) -> str:
    """A line per run, a column per number that one of the runs has."""
    columns = [c for c in (*COLUMNS, *RANKING) if any(c in values for values in found.values())]
    lines = [("amateur", *columns)]
    for name, values in found.items():
        cells = []
        for column in columns:
            mean, interval = values.get(column, (None, None))
            cell = "" if mean is None else f"{mean:.3f}"
            cells.append(cell + (f" ± {interval:.3f}" if interval is not None else ""))
        lines.append((name, *cells))
    return aligned(lines)


def amateur_figure(curves: dict[str, dict[float, Mean]], found: dict[str, dict[str, Mean]]) -> Any:
    """Exact match by beta, a line per amateur; ranking accuracy by run.

    curves: by amateur, exact match by beta, 0 the expert alone; found: the numbers by run.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, curve) in enumerate(curves.items()):
        means = [mean for mean, _ in curve.values()]
        bars = [interval or 0.0 for _, interval in curve.values()]
        places = np.array(list(curve)) + 0.008 * (number - (len(curves) - 1) / 2)
        left.errorbar(places, means, bars, marker="o", capsize=3, label=name)
    left.set_xlabel("beta (0: the expert alone)")
    left.set_ylabel("exact match")
    if curves:
        left.legend(fontsize=8)
    for number, column in enumerate(RANKING):
        values = [found[name].get(column, (np.nan, None)) for name in found]
        places = np.arange(len(found)) + 0.4 * (number - 0.5)
        bars = [interval or 0.0 for _, interval in values]
        right.bar(places, [mean for mean, _ in values], 0.38, yerr=bars, capsize=3, label=column)
    right.set_xticks(range(len(found)), list(found), rotation=20, ha="right")
    right.set_ylabel("share of problems")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def text_figure(
    numbers: dict[str, float], names: Sequence[str], curves: dict[str, dict[float, Mean]]
) -> Any:
    """Diversity of the continuations by name; shares of pieces by beta, a line per measure."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(names)), [numbers[f"diversity_{name}"] for name in names], color="C0")
    left.set_xticks(range(len(names)), names, rotation=20, ha="right")
    left.set_ylabel("diversity of words")
    for key, curve in curves.items():
        means, bars = zip(*curve.values(), strict=True)
        right.errorbar(list(curve), means, bars, marker="o", capsize=3, label=key)
    right.set_xlabel("beta (0: the expert alone)")
    right.set_ylabel("share of pieces")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
