"""Dated tables of the benchmarks: one markdown and one json file per benchmark and day."""

import datetime
import json
import os
import pathlib
import platform
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, versions and allocator setting of this process."""
    import importlib.metadata

    cpu = platform.processor()
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        **versions,
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def save(name: str, description: str, rows: list[dict[str, Any]]) -> pathlib.Path:
    """Writes results/<date>_<name>.{md,json}; lists and dicts inside rows go to the json only."""
    info = machine()
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{info['date']}_{name}"
    stem.with_suffix(".json").write_text(json.dumps({"machine": info, "rows": rows}, indent=1))
    columns = list(
        dict.fromkeys(
            key
            for row in rows
            for key, value in row.items()
            if not isinstance(value, list | tuple | dict)
        )
    )
    lines = [f"# {name}, {info['date']}", "", description.strip(), ""]
    lines += [", ".join(f"{key} {value}" for key, value in info.items() if value), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_text(row.get(c, "")) for c in columns) + " |" for row in rows]
    path = stem.with_suffix(".md")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())
    return path
