"""What a run leaves in its workdir: metrics.jsonl, TensorBoard events, figures, texts, results."""

import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax

from blt_jax.train import configs, flops

PACKAGES = ("blt-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Writer:
    """Files of one run; only process 0 writes, the others do nothing.

    `metrics.jsonl` has one JSON object per line with the key `step`; `events.*` the same numbers
    for TensorBoard, unless `tensorboard` is set to False; `figures/<name>.png`;
    `texts/<name>.txt`.
    """

    def __init__(self, workdir: str | pathlib.Path):
        self.workdir = pathlib.Path(workdir)
        self.enabled = jax.process_index() == 0
        self.tensorboard = True
        self._events = None
        self._purge_step = None
        if self.enabled:
            self.workdir.mkdir(parents=True, exist_ok=True)

    @property
    def metrics_path(self) -> pathlib.Path:
        """Path of metrics.jsonl."""
        return self.workdir / "metrics.jsonl"

    def truncate(self, step: int) -> None:
        """Removes the lines of steps after `step`: they will be written again."""
        if not self.enabled:
            return
        self._purge_step = step + 1
        if self.metrics_path.exists():
            lines = [
                json.dumps(line) for line in read_metrics(self.workdir) if line["step"] <= step
            ]
            partial = self.metrics_path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.replace(self.metrics_path)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and one event per value."""
        if not self.enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.tensorboard:
            if self._events is None:
                import tensorboardX

                self._events = tensorboardX.SummaryWriter(
                    str(self.workdir), purge_step=self._purge_step
                )
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure as `figures/<name>.png`."""
        if self.enabled:
            path = self.workdir / "figures" / f"{_check_name(name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, bbox_inches="tight")

    def text(self, name: str, text: str) -> None:
        """A text (a generated sample, a table) as `texts/<name>.txt`; the report shows it."""
        if self.enabled:
            path = self.workdir / "texts" / f"{_check_name(name)}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="replace")

    def results(self, numbers: dict[str, Any], config: Any, wall_time: float) -> None:
        """`results.json`: numbers, config, commit, versions, device, wall time in seconds."""
        if self.enabled:
            values = {
                "numbers": {name: _plain(value) for name, value in numbers.items()},
                "config": configs.flatten(config),
                "wall_time_seconds": round(wall_time, 3),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **provenance(),
            }
            path = self.workdir / "results.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(values, indent=2) + "\n")
            partial.replace(path)

    def close(self) -> None:
        """Flushes and closes the events file."""
        if self._events is not None:
            self._events.close()
            self._events = None


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"name {name!r}: letters, digits, '_', '.', '-' are allowed")
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut off by a crash is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_results(workdir: str | pathlib.Path) -> dict[str, Any] | None:
    """The contents of results.json, None if there is none."""
    path = pathlib.Path(workdir) / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in, with `+changes` if it has some."""
    folder = pathlib.Path(__file__).resolve().parent
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status else "")


def provenance() -> dict[str, Any]:
    """Commit, versions and devices of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = jax.devices()
    kind = devices[0].device_kind
    return {
        "commit": git_commit(),
        "versions": versions,
        "device": kind,
        # Without it the numbers have no `mfu`.
        "peak_flops": flops.peak_flops(kind) or flops.unknown_device(kind),
        "platform": devices[0].platform,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "host": f"{platform.machine()} {platform.system()}",
    }
