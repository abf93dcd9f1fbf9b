"""Dated tables of the benchmarks: one markdown and one json file per benchmark and day."""

import datetime
import json
import os
import pathlib
import platform
import sys
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores, devices of JAX where it is loaded, versions and allocator setting."""
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
        "devices": _devices(),
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        **versions,
    }


def _devices() -> str:
    """Number and kind of the devices that JAX uses beside the CPU, "" before it is loaded."""
    jax = sys.modules.get("jax")
    if jax is None or jax.default_backend() == "cpu":
        return ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def save(
    name: str, description: str, rows: list[dict[str, Any]], show: bool = True
) -> pathlib.Path:
    """Writes results/<date>_<name>.{md,json} and prints the former unless told not to; lists and
    dicts inside rows go to the json only."""
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
    if show:
        print(path.read_text())
    return path
