"""The figure that shows where a patcher cuts: bytes coloured by patch, the entropies above them."""

from typing import Any

import numpy as np

_COLOURS = ("#bcd4ee", "#f6d9a8", "#cfe6c2", "#e6c9e0")
_NAMED = {10: "\\n", 9: "\\t", 13: "\\r", 32: "\u2423"}


def _label(byte: int) -> str:
    if byte in _NAMED:
        return _NAMED[byte]
    return chr(byte) if 33 <= byte < 127 else f"{byte:02x}"


def patch_figure(
    text: bytes,
    starts: np.ndarray,
    entropies: np.ndarray | None = None,
    threshold: float = 0.0,
    bytes_per_row: int = 64,
) -> Any:
    """Matplotlib figure of `text`, one cell per byte, one colour per patch.

    starts: bool [len(text)], true where a byte opens a patch. entropies: float [len(text)], the
    entropy in nats of each byte given the bytes before it, drawn as a step line above its cell
    with the threshold dashed; None draws the cells alone. Raises ValueError if lengths differ.
    """
    if len(starts) != len(text) or (entropies is not None and len(entropies) != len(text)):
        raise ValueError(
            f"patch_figure: {len(text)} bytes need as many starts ({len(starts)}) and entropies"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    patch = np.cumsum(starts)
    rows = -(-len(text) // bytes_per_row)
    top = max(1.0, float(np.max(entropies)) * 1.05) if entropies is not None else 1.0
    figure, axes = plt.subplots(rows, 1, figsize=(15, 1.5 * rows), squeeze=False)
    for row, axis in enumerate(axes[:, 0]):
        low, high = row * bytes_per_row, min((row + 1) * bytes_per_row, len(text))
        for column, index in enumerate(range(low, high)):
            colour = _COLOURS[patch[index] % len(_COLOURS)]
            axis.add_patch(plt.Rectangle((column, -0.45 * top), 1, 0.4 * top, color=colour, lw=0))
            axis.text(
                column + 0.5,
                -0.25 * top,
                _label(text[index]),
                ha="center",
                va="center",
                family="monospace",
                fontsize=8,
            )
            if starts[index]:
                axis.plot([column, column], [-0.45 * top, 0], color="#444444", lw=1)
        if entropies is not None:
            edges = np.arange(high - low + 1)
            axis.stairs(entropies[low:high], edges, color="#b03a2e", lw=1.2)
            axis.axhline(threshold, color="#555555", ls="--", lw=0.8)
            axis.set_yticks([0, round(threshold, 2)])
        else:
            axis.set_yticks([])
        axis.set_xlim(0, bytes_per_row)
        axis.set_ylim(-0.5 * top, top if entropies is not None else 0.05)
        axis.set_xticks([])
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    if entropies is not None:
        axes[0, 0].set_title("entropy of the next byte (nats), threshold dashed", fontsize=9)
    figure.tight_layout()
    plt.close(figure)
    return figure
