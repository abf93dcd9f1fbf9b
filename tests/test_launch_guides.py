"""Commands and fields in the README and the launch guides are accepted by the programs."""

import os
import pathlib
import re
from unittest import mock

import pytest

from blt_jax import compile as compile_program
from blt_jax import run as run_program
from blt_jax.train import configs
from blt_jax.train.launch import load_experiment_file

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "launch").iterdir())]
BATCH = "sbatch docs/launch/blt.sbatch"
COMMAND = re.compile(
    rf"(python -m blt_jax\.(?:run|compile)|{re.escape(BATCH)})((?: +--[\w.]+(?:=[^\s`\"]+)?)+)"
)


def text_of(guide):
    """The text with commands of several lines, also in comments, on one; without the script's own
    command, whose arguments are the user's."""
    text = guide.read_text().replace('blt_jax.run --workdir="$WORKDIR" "$@"', "")
    return re.sub(r" *\\\n#? *", " ", text)


COMMANDS = [
    pytest.param(program, arguments.split(), id=f"{guide.relative_to(ROOT)}-{number}")
    for guide in GUIDES
    for number, (program, arguments) in enumerate(COMMAND.findall(text_of(guide)))
]


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_command_is_accepted(program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [argument.replace("$i", "0") for argument in arguments]
    if program.endswith("compile"):
        with mock.patch.dict(os.environ):  # it sets variables of libtpu
            values = compile_program.parse(["compile", *arguments])
    elif "--list" in arguments:
        assert run_program.parse(["run", *arguments]).list
        return
    else:
        script = ["--workdir=runs/script"] if program == BATCH else []
        values = run_program.parse(["run", *script, *arguments])
        assert values.workdir
    configs.validate(values.config)


def test_every_guide_with_commands_is_read():
    assert {param.id.rpartition("-")[0] for param in COMMANDS} == {
        str(guide.relative_to(ROOT)) for guide in GUIDES
    }


def test_fields_named_in_the_guides_exist():
    examples = [
        load_experiment_file(ROOT / "experiments" / f"{name}.py").get_config("tiny")
        for name in ("blt", "llama3")
    ]
    names = {name for guide in GUIDES for name in re.findall(r"--config\.([\w.]+)", text_of(guide))}
    assert len(names) > 8
    for name in names:
        problems = []
        for config in examples:
            try:
                configs.check_path(config, name)
            except ValueError as error:
                problems.append(str(error))
        assert len(problems) < len(examples), problems


@pytest.mark.parametrize("run", ["blt.py:tiny", "llama3.py:tiny"])
def test_the_flags_advised_for_a_bucket_are_accepted(run, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = f"--config=experiments/{run}"
    assert run_program.main(["run", config, "--workdir=gs://bucket/run"]) == 2
    advised = re.findall(r"--config\.\S+", capsys.readouterr().err)
    assert len(advised) == len(set(advised)) == (2 if run == "blt.py:tiny" else 1)
    run_program.parse(["run", config, "--workdir=run", *advised])
