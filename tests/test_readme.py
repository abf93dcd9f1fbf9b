"""The README: its table is the one of the kept results, its commands and files exist."""

import importlib.util
import pathlib
import re

from blt_jax.train.launch import load_experiment_file

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_results_table_is_made_from_the_kept_results():
    path = ROOT / "docs" / "results" / "make_table.py"
    spec = importlib.util.spec_from_file_location("make_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README


def test_linked_files_exist():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_name_existing_programs_and_runs():
    programs = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"blt_jax.run", "blt_jax.generate", "blt_jax.convert"} <= programs
    for program in programs:
        assert (ROOT / (program.replace(".", "/") + ".py")).exists(), program
    for path, run in re.findall(r"--config=([\w/]+\.py):(\w+)", README):
        names = {function.__name__ for function in load_experiment_file(ROOT / path).RUNS}
        assert run in names


def test_ci_calls_the_test_command_of_the_readme():
    command = "pip install -e '.[test]' && pytest"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()
