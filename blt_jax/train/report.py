"""`report.html`: numbers, curves, figures, texts and config of a run in one file."""

import base64
import html
import io
import pathlib
from typing import Any

from blt_jax.train.writers import read_metrics, read_results

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem; border-bottom: 1px solid #ddd }
td + td { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: .7rem; overflow: auto; white-space: pre-wrap }
img, svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
"""
_MAX_POINTS = 1000


def _curve_groups(lines: list[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """Panels of curves: name -> {curve: [(step, value), ...]}; evaluation joins its training."""
    panels: dict[str, dict[str, list]] = {}
    for line in lines:
        for name, value in line.items():
            if name in ("step", "seconds"):
                continue
            panel = name.removeprefix("evaluation/").removeprefix("averaged_")
            curve = name if name.startswith("evaluation/") else "training"
            panels.setdefault(panel, {}).setdefault(curve, []).append((line["step"], value))
    return panels


def _thin(points: list) -> list:
    stride = -(-len(points) // _MAX_POINTS)
    return points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])


def curves_figure(lines: list[dict[str, Any]], names: tuple[str, ...]) -> Any:
    """A figure with a panel per metric of `names` that occurs in the lines, None without any."""
    import matplotlib.figure

    panels = _curve_groups(lines)
    shown = [name for name in names if name in panels]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    figure = matplotlib.figure.Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for index, name in enumerate(shown):
        axes = figure.add_subplot(rows, 2, index + 1)
        for curve, points in panels[name].items():
            steps, values = zip(*_thin(points), strict=True)
            style = {"marker": "o", "markersize": 3} if len(points) < 50 else {}
            axes.plot(steps, values, label=curve, linewidth=1.2, **style)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(panels[name]) > 1:
            axes.legend(fontsize=8)
    return figure


def _inline_svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: outlines of glyphs would be most of the file.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _table(values: dict[str, Any]) -> str:
    def cell(value):
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(cell(value))}</td></tr>\n"
        for name, value in values.items()
    )
    return f"<table>\n{rows}</table>"


def _section(folder: pathlib.Path, title: str, level: int) -> list[str]:
    parts = [f"<h{level}>{html.escape(title)}</h{level}>"]
    results = read_results(folder)
    if results:
        parts.append(_table(results["numbers"]))
    for path in sorted((folder / "figures").glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}">'
            f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        )
    lines = read_metrics(folder)
    if lines:
        names = ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "bytes_per_second")
        others = [name for name in _curve_groups(lines) if name not in names]
        skipped = (
            "objective",
            "weight",
            "tokens_per_second",
            "seconds_per_step",
            "bytes",
            "targets",
        )
        names += tuple(name for name in others if name not in skipped)
        figure = curves_figure(lines, names)
        if figure is not None:
            parts.append(_inline_svg(figure))
    for path in sorted((folder / "texts").glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        parts.append(f"<h{level + 1}>{html.escape(path.stem)}</h{level + 1}>")
        parts.append(f"<pre>{html.escape(text)}</pre>")
    return parts


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `workdir/report.html`, self-contained; subfolders with metrics are sections of it."""
    workdir = pathlib.Path(workdir)
    parts = _section(workdir, workdir.name or "run", 1)
    folders = {
        path.parent for name in ("metrics.jsonl", "results.json") for path in workdir.rglob(name)
    }
    for folder in sorted(folders - {workdir}):
        parts += _section(folder, str(folder.relative_to(workdir)), 2)
    results = read_results(workdir)
    if results:
        about = {name: results[name] for name in ("device", "device_count", "commit", "date")}
        about["wall time (s)"] = results["wall_time_seconds"]
        about |= results["versions"]
        parts += ["<h2>Environment</h2>", _table(about)]
    config = workdir / "config.txt"
    if config.exists():
        parts += [
            "<h2>Configuration</h2>",
            f"<details><summary>config.txt</summary><pre>{html.escape(config.read_text())}</pre></details>",
        ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(workdir.name)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
