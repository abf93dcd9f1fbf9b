"""Rewrites docs/results/pods.md from the json reports in docs/results/pods.

python docs/results/make_pods.py

Each is written by python -m blt_jax.compile --config=experiments/<file>.py:<run>
--topology=<topology> --output=docs/results/pods/<run>.json
"""

import json
import pathlib

HERE = pathlib.Path(__file__).parent

HEAD = """# Layouts for TPU pods

Train steps compiled by libtpu for slices that were not there; nothing ran on a device. Peak is the
compiler's memory of one device, parameters, optimizer, gradients, activations and the program
included. MFU is an estimate: model FLOPs over the time of a roofline of data-sheet peaks (matrix
products and attention kernels at the chip's peak or memory bandwidth, the rest at memory
bandwidth), with collectives hidden behind it / after it. The first is optimistic by nature: real
programs do not reach these peaks. Program FLOPs count recomputation. A BLT run trains its entropy
model first; both have to fit. `python docs/results/make_pods.py` writes this table from
`docs/results/pods/*.json`.

"""

COLUMNS = (
    *("run", "topology", "mesh", "tokens per step", "peak / memory, GB"),
    *("model / program FLOPs", "time of products, other memory, collectives, s"),
    *("estimated MFU, hidden / exposed", "compiled in, s", "on"),
)


def row(name: str, numbers: dict) -> str:
    """One line of the table: the figures, or why the program does not fit."""
    cells = problem_cells(numbers) if "problem" in numbers else figure_cells(numbers)
    cells = [name, numbers["topology"], *cells, made(numbers)]
    return f"| {' | '.join(cells)} |"


def made(numbers: dict) -> str:
    """Date of the compile, and the compilers where the report has them."""
    versions = (f"{package} {version}" for package, version in numbers.get("versions", {}).items())
    return ", ".join((numbers["date"], *versions))


def problem_cells(numbers: dict) -> list[str]:
    """The message in place of the mesh, nothing in the other columns."""
    return [numbers["problem"], *[""] * (len(COLUMNS) - 4)]


def figure_cells(numbers: dict) -> list[str]:
    """From the mesh to the time of the compile."""
    sizes, flops, estimate = (numbers[key] for key in ("bytes_per_device", "flops", "estimate"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in numbers["mesh"].items() if size > 1)
    seconds = ", ".join(
        f"{estimate[key]:.2f}"
        for key in ("products_seconds", "other_memory_seconds", "collective_seconds")
    )
    hidden, exposed = (estimate["mfu"][f"collectives_{key}"] for key in ("hidden", "exposed"))
    return [
        mesh,
        f"{numbers['tokens']:,}",
        f"{sizes['peak'] / 1e9:.1f} / {sizes['memory'] / 1e9:.0f}",
        f"{flops['model']:.2e} / {flops['program']:.2e}",
        seconds,
        f"{100 * hidden:.0f} % / {100 * exposed:.0f} %",
        f"{numbers['compile_seconds']:.0f}",
    ]


def reports() -> list[tuple[str, str, dict]]:
    """(run, training, report) of every kept report; training "" where the run is one."""
    found = []
    for path in sorted((HERE / "pods").glob("*.json")):
        kept = json.loads(path.read_text())
        parts = {"": kept} if "topology" in kept else kept
        found += [(path.stem, part, numbers) for part, numbers in parts.items()]
    return found


def page() -> str:
    """The whole page."""
    lines = [row(f"`{run}` {part}".strip(), numbers) for run, part, numbers in reports()]
    notes = HERE / "pods" / "notes.md"
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *lines]
    return HEAD + "\n".join(lines) + "\n\n" + notes.read_text()


if __name__ == "__main__":
    (HERE / "pods.md").write_text(page())
