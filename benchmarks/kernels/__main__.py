"""Runs the benchmarks of pallas_kernels and keeps their tables.

    python -m benchmarks.kernels [name ...]

Names are the modules of this folder; all of them when none is given. JAX picks the device: a GPU
or TPU when one is there (JAX_PLATFORMS=cpu keeps to the CPU). The exit status is 1 when `values`
finds a wrong result.
"""

import argparse
import importlib
import pkgutil

from benchmarks import kernels, reporting

NAMES = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name != "__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names
    for name in names:
        if name not in NAMES:
            parser.error(f"name {name!r} is unknown; allowed are {', '.join(NAMES)}")
    wrong = 0
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.kernels.{name}")
        rows = module.rows()
        reporting.save(f"kernels_{name}", module.__doc__, rows)
        wrong += sum(not row.get("ok", True) for row in rows)
    if wrong:
        parser.exit(1, f"{wrong} results are wrong: rows with ok = False\n")


if __name__ == "__main__":
    main()
