"""Compiles one training for many meshes, remat policies and batch sizes, and compares them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from blt_jax.dist.mesh import MeshConfig
from blt_jax.layers.transformer import Remat
from blt_jax.train.compilation import (
    DoesNotFitError,
    replace_stacks,
    report,
    stacks_of,
    train_job,
)
from blt_jax.train.pretraining import Phase, Pretraining


@dataclasses.dataclass(frozen=True)
class Axes:
    """What is tried: sizes of the mesh axes data and tensor (fsdp takes the rest), remat policies
    of the largest transformers, rows per step; an empty tuple leaves the run's own."""

    data: tuple[int, ...] = (1,)
    tensor: tuple[int, ...] = (1, 2, 4)
    remat: tuple[Remat, ...] = (Remat.SAVE_NAMES, Remat.FULL)
    rows: tuple[int, ...] = ()


def with_remat(config: Any, remat: Remat) -> Any:
    """A copy of a model config with this policy in every stack of layers that has one."""
    policies = {
        name: {"remat": remat} for name, part in stacks_of(config) if part.remat is not Remat.NONE
    }
    return replace_stacks(config, policies)


def with_rows(config: Pretraining, phase: Phase, rows: int) -> Phase:
    """The phase with so many rows per step."""
    data = dataclasses.replace(config.phase_data(phase), batch_size=rows)
    return dataclasses.replace(phase, data=data)


def sweep(
    config: Pretraining,
    phase: Phase,
    topology: str,
    make_mesh: Callable[[MeshConfig], Mesh],
    axes: Axes,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row of numbers per combination; `problem` instead of them where there is one."""
    found = []
    rows = axes.rows or (config.phase_data(phase).batch_size,)
    for data, tensor, remat, count in itertools.product(axes.data, axes.tensor, axes.remat, rows):
        row = {"data": data, "tensor": tensor, "remat": remat.name, "rows": count}
        model = with_remat(phase.model or config.model, remat)
        changed = dataclasses.replace(with_rows(config, phase, count), model=model)
        try:
            mesh = make_mesh(MeshConfig(data=data, fsdp=-1, tensor=tensor))
            numbers = report(train_job(config, changed, mesh), topology)
        except (DoesNotFitError, ValueError) as error:
            row["problem"] = str(error).split(". ")[0]
        else:
            row["fsdp"] = mesh.shape["fsdp"]
            row["peak_bytes"] = numbers["bytes_per_device"]["peak"]
            row |= {f"mfu_{name}": value for name, value in numbers["estimate"]["mfu"].items()}
            row["compile_seconds"] = numbers["compile_seconds"]
        say(", ".join(f"{name} {value}" for name, value in row.items()))
        found.append(row)
    mark_pareto(found)
    return found


def mark_pareto(rows: Sequence[dict[str, Any]]) -> None:
    """Sets `pareto` in every row: no other has less memory and a higher MFU."""
    for row in rows:
        row["pareto"] = "problem" not in row and not any(
            _dominates(other, row) for other in rows if "problem" not in other
        )


def _dominates(a: dict[str, Any], b: dict[str, Any]) -> bool:
    better = (a["peak_bytes"], -a["mfu_collectives_exposed"])
    worse = (b["peak_bytes"], -b["mfu_collectives_exposed"])
    return better != worse and all(x <= y for x, y in zip(better, worse, strict=True))


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table, least memory first; * marks the Pareto front."""
    lines = [
        "| data | fsdp | tensor | remat | rows | peak GB | MFU, collectives hidden / exposed | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.get("peak_bytes", float("inf"))):
        name = f"| {row['data']} | {row.get('fsdp', '')} | {row['tensor']} | {row['remat']} | "
        if "problem" in row:
            lines.append(f"{name}{row['rows']} | {row['problem']} | | |")
            continue
        hidden, exposed = row["mfu_collectives_hidden"], row["mfu_collectives_exposed"]
        lines.append(
            f"{name}{row['rows']} | {row['peak_bytes'] / 1e9:.1f} | {100 * hidden:.0f} % / "
            f"{100 * exposed:.0f} % | {'*' if row['pareto'] else ''} |"
        )
    return "\n".join(lines)
