"""Who may import whom, what an import may cost, and what it may not pull in."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORBIDDEN = ("torch", "transformers", "tensorflow", "wandb")

# Layers from the bottom up; each may import itself and what stands before the arrow.
ALLOWED = {
    "pallas_kernels": set(),
    "dist": {"layers.model"},
    "layers": {"pallas_kernels", "dist"},
    "data": {"dist"},
    "retrieval": {"dist", "data"},
    "train": {"layers", "dist", "data"},
    "models": {"pallas_kernels", "layers", "dist", "train"},
    "decoding": {"pallas_kernels", "layers", "dist", "data", "models"},
    "interop": {"layers", "dist", "data", "train", "models", "decoding"},
    "recipes": {
        *("pallas_kernels", "layers", "dist", "data", "retrieval", "train", "models"),
        *("decoding", "interop"),
    },
    "evaluation": {
        *("pallas_kernels", "layers", "dist", "data", "retrieval", "train", "models"),
        *("decoding", "interop"),
    },
}


def _package(name: str) -> str:
    """Package of a module name: `blt_jax.models.blt` -> `models`."""
    parts = name.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[1:2])


def _imports(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, module) of every import of our own packages in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] in _OWN]


_OWN = ("blt_jax", "pallas_kernels", "experiments", "benchmarks", "tests")


def _files():
    for package in ("blt_jax", "pallas_kernels"):
        yield from sorted((ROOT / package).rglob("*.py"))


def _violations(path: pathlib.Path, module: str) -> list[str]:
    package = _package(module)
    found = []
    for line, name in _imports(path):
        target = _package(name)
        if name.split(".")[0] not in ("blt_jax", "pallas_kernels"):
            found.append(f"{path}:{line}: {module} imports {name}")
        elif target == package or package not in ALLOWED or not target or target.startswith("__"):
            continue
        elif not any(
            target == allowed or name.startswith(f"blt_jax.{allowed}")
            for allowed in ALLOWED[package]
        ):
            found.append(f"{path}:{line}: {module} imports {name}")
    return found


def _module(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _is_test(path: pathlib.Path) -> bool:
    return path.name.startswith(("test_", "conftest")) or "tests" in path.parts[-3:-1]


def test_import_direction():
    files = [path for path in _files() if not _is_test(path)]
    assert len(files) > 20
    violations = [line for path in files for line in _violations(path, _module(path))]
    assert not violations, "\n".join(violations)


def test_every_package_has_a_rule():
    packages = {path.parent.name for path in (ROOT / "blt_jax").glob("*/__init__.py")}
    assert packages <= ALLOWED.keys()


def test_the_rule_finds_a_wrong_import(tmp_path):
    path = tmp_path / "masks.py"
    path.write_text("def f():\n    from blt_jax.models import blt\n    return blt\n")
    assert len(_violations(path, "blt_jax.layers.masks")) == 1
    assert not _violations(path, "blt_jax.recipes.sft")
    path.write_text("import tests.conftest\n")
    assert len(_violations(path, "blt_jax.layers.masks")) == 1
    path.write_text("from blt_jax.layers import masks\n")
    assert len(_violations(path, "blt_jax.dist.mesh")) == 1
    assert len(_violations(path, "pallas_kernels.dispatch")) == 1


def _python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_blt_jax_is_light():
    code = (
        "import time; start = time.perf_counter(); import blt_jax, sys; "
        "print(time.perf_counter() - start); "
        f"print([name for name in {(*FORBIDDEN, 'orbax', 'grain', 'matplotlib')!r} "
        "if name in sys.modules])"
    )
    # The best of three: other processes may hold the machine.
    outputs = [_python(code).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) <= 1.5
    assert all(modules == "[]" for _, modules in outputs)


def test_no_module_imports_what_is_forbidden():
    names = [
        _module(path).removesuffix(".__init__")
        for path in _files()
        if not _is_test(path) and path.name != "__main__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    assert _python(code) == "[]"


@pytest.mark.parametrize("folder", ["blt_jax", "pallas_kernels", "tests", "experiments"])
def test_files_are_short_and_well_named(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 800, path
        assert path.stem not in ("utils", "common", "misc", "lib"), path
