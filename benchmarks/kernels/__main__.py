"""Runs the benchmarks of pallas_kernels and keeps their tables.

    python -m benchmarks.kernels [name ...] [--only TEXT]

Names are the modules of this folder; all of them when none is given. JAX picks the device: a GPU
or TPU when one is there (JAX_PLATFORMS=cpu keeps to the CPU). Every row is printed and kept as soon
as it is there. `--only "gmm"` or `--only "patch_pool max"` limits `roofline` and `values` to the
operations and shapes with that text in "<operation> <shape>". The exit status is 1 when `values`
finds a wrong result.
"""

import argparse
import importlib
import inspect
import json
import pkgutil

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
        rows = []
        for row in module.rows(**options):
            rows.append(row)
            print(json.dumps(row), flush=True)
            reporting.save(f"kernels_{name}", module.__doc__, rows, show=False)
        if not rows:
            parser.error(f"--only={arguments.only!r}: no row of {name!r} has this text")
        reporting.save(f"kernels_{name}", module.__doc__, rows)
        wrong += sum(not row.get("ok", True) for row in rows)
    if wrong:
        parser.exit(1, f"{wrong} results are wrong: rows with ok = False\n")


if __name__ == "__main__":
    main()
