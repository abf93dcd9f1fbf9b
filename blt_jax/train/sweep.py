"""Compiles one training for many meshes, remat policies and batch sizes, and compares them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from blt_jax.dist.mesh import AXES, MeshConfig
from blt_jax.layers.transformer import Remat
from blt_jax.train.compilation import (
    DoesNotFitError,
    replace_stacks,
    report,
    stacks_of,
    train_job,
)
from blt_jax.train.pretraining import Phase, Pretraining

MESH_AXES = ("data", "tensor", "expert", "context")


@dataclasses.dataclass(frozen=True)
class Axes:
    """What is tried: sizes of mesh axes (fsdp takes the rest), remat policies (see `with_remat`),
    rows per step; an empty tuple leaves the run's own."""

    data: tuple[int, ...] = (1,)
    tensor: tuple[int, ...] = (1, 2, 4)
    expert: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    remat: tuple[Remat, ...] = (Remat.SAVE_NAMES, Remat.FULL)
    rows: tuple[int, ...] = ()


def parse_axes(flags: Any) -> Axes:
    """What the flags --sweep_<axis> say, lists of texts; ValueError for what is not a size >= 1 or
    a policy."""

    def texts(name: str) -> list[str]:
        return getattr(flags, f"sweep_{name}")

    for name in (*MESH_AXES, "rows"):
        if not all(text.isdigit() and int(text) for text in texts(name)):
            raise ValueError(
                f"--sweep_{name}={','.join(texts(name))}: must be numbers >= 1, as 1,2,4"
            )
    allowed = Remat.__members__
    if unknown := set(texts("remat")) - set(allowed):
        raise ValueError(f"--sweep_remat={unknown.pop()}: allowed are {', '.join(allowed)}")
    numbers = {name: tuple(map(int, texts(name))) for name in (*MESH_AXES, "rows")}
    return Axes(remat=tuple(allowed[text] for text in texts("remat")), **numbers)


def with_remat(config: Any, remat: Remat) -> Any:
    """A copy of a model config with this policy in every stack of layers that has one; in all of
    them, if none has."""
    stacks = stacks_of(config)
    chosen = [name for name, part in stacks if part.remat is not Remat.NONE]
    chosen = chosen or [name for name, _ in stacks]
    return replace_stacks(config, {name: {"remat": remat} for name in chosen})


def with_rows(config: Pretraining, phase: Phase, rows: int) -> Phase:
    """The phase with so many rows per step."""
    data = dataclasses.replace(config.phase_data(phase), batch_size=rows)
    return dataclasses.replace(phase, data=data)


def sweep(
    config: Pretraining,
    phase: Phase,
    topology: str,
    base: MeshConfig,
    make_mesh: Callable[[MeshConfig], Mesh],
    axes: Axes,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row of numbers per combination; `problem` instead of them where there is one.

    base: the run's mesh, for the axes that are not tried.
    """
    found = []
    tried = {name: getattr(axes, name) or (getattr(base, name),) for name in MESH_AXES}
    rows = axes.rows or (config.phase_data(phase).batch_size,)
    for *sizes, remat, count in itertools.product(*tried.values(), axes.remat, rows):
        sizes = dict(zip(tried, sizes, strict=True))
        row = sizes | {"remat": remat.name, "rows": count}
        try:
            model = with_remat(phase.model or config.model, remat)
            changed = dataclasses.replace(with_rows(config, phase, count), model=model)
            mesh = make_mesh(dataclasses.replace(base, fsdp=-1, **sizes))
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
        "| data | fsdp | tensor | expert | context | remat | rows | peak GB | "
        "MFU, collectives hidden / exposed | |",
        "|---" * 10 + "|",
    ]
    for row in sorted(rows, key=lambda row: row.get("peak_bytes", float("inf"))):
        sizes = (row.get(axis, "") for axis in AXES)
        name = f"| {' | '.join(map(str, sizes))} | {row['remat']} | "
        if "problem" in row:
            lines.append(f"{name}{row['rows']} | {row['problem']} | | |")
            continue
        hidden, exposed = row["mfu_collectives_hidden"], row["mfu_collectives_exposed"]
        lines.append(
            f"{name}{row['rows']} | {row['peak_bytes'] / 1e9:.1f} | {100 * hidden:.0f} % / "
            f"{100 * exposed:.0f} % | {'*' if row['pareto'] else ''} |"
        )
    return "\n".join(lines)
