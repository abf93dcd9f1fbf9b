"""Runs the benchmarks of pallas_kernels and keeps their tables.

    python -m benchmarks.kernels [name ...] [--only TEXT]

Names are the modules of this folder; all of them when none is given. JAX picks the device: a GPU
or TPU when one is there (JAX_PLATFORMS=cpu keeps to the CPU). Every row is printed and kept as soon
as it is there, in a table of its own until the last. `--only "gmm"` or `--only "patch_pool max"`
limits `roofline` and `values` to the operations and shapes with that text in "<operation> <shape>",
and its table has the text in its name. The exit status is 1 when `values` finds a wrong result.
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import re

from benchmarks import kernels, reporting

NAMES = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name != "__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--only", metavar="TEXT", help="of roofline and values, rows with TEXT")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    for name in names:
        if name not in NAMES:
            parser.error(f"name {name!r} is unknown; allowed are {', '.join(NAMES)}")
    modules = {name: importlib.import_module(f"benchmarks.kernels.{name}") for name in names}
    options = {} if arguments.only is None else {"only": arguments.only}
    for name, module in modules.items():
        if options and "only" not in inspect.signature(module.rows).parameters:
            parser.error(f"--only={arguments.only!r} is not possible with {name!r}")
    wrong = 0
    for name, module in modules.items():
        rows, table = [], f"kernels_{name}"
        if options:
            table += "_" + re.sub(r"\W+", "_", arguments.only)
        for row in module.rows(**options):
            rows.append(row)
            print(json.dumps(row), flush=True)
            unfinished = reporting.save(f"{table}_unfinished", module.__doc__, rows, show=False)
        if not any("shape" in row for row in rows) and options:
            parser.error(f"--only={arguments.only!r}: no row of {name!r} has this text")
        reporting.save(table, module.__doc__, rows)
        for suffix in (".md", ".json"):
            unfinished.with_suffix(suffix).unlink()
        wrong += sum(not row.get("ok", True) for row in rows)
    if wrong:
        parser.exit(1, f"{wrong} results are wrong: rows with ok = False\n")


if __name__ == "__main__":
    main()
