"""What the launcher adds to a run: compile cache, profiles, the SLURM script."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from blt_jax.train import launch as launch_lib
from blt_jax.train.loop import LoggingConfig
from blt_jax.train.writers import read_results
from tests.train.launched import PATIENCE, ROOT, RUNS, environment, launch, lines
from tests.train.tiny_model import tiny_experiment


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of two runs of `tiny` without a cache of their own, and their outputs."""
    folder = tmp_path_factory.mktemp("runs")
    variables = {"XDG_CACHE_HOME": str(folder / "user"), "JAX_COMPILATION_CACHE_DIR": None}
    first = launch(1, None, "tiny", folder / "first", variables=variables)
    second = launch(
        1, None, "tiny", folder / "second", "--profile_steps=10:13", variables=variables
    )
    return folder, first, second


def compile_seconds(workdir):
    return read_results(workdir)["numbers"]["compile_seconds"]


def test_compiled_programs_are_kept_by_default(runs):
    folder, first, second = runs
    cache = folder / "user" / "blt_jax" / "compiled"
    for output in (first, second):
        assert output.splitlines()[0] == f"compiled programs are kept in {cache}"
    assert any(path.name.startswith("jit_step") for path in cache.iterdir())
    assert compile_seconds(folder / "second") < 0.7 * compile_seconds(folder / "first")
    assert lines(folder / "first") == lines(folder / "second")


def test_the_users_own_cache_wins(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "of_the_user")  # jax has read it at import
    before = launch_lib.jax.config.jax_compilation_cache_dir
    assert launch_lib.use_compile_cache() == before


READER = """
import json, pathlib, sys
from xprof.convert import raw_to_tool_data
folder = pathlib.Path(sys.argv[1])
files = [str(path) for path in folder.rglob("*.xplane.pb")]
assert "trace_viewer@" in raw_to_tool_data.xspace_to_tool_names(files)  # unpacks the programs
events, _ = raw_to_tool_data.xspace_to_tool_data(files, "trace_viewer", {})
events = json.loads(events)["traceEvents"]
names = {e["args"].get("hlo_module") for e in events if isinstance(e.get("args"), dict)}
(module,) = [path.name.removesuffix(".hlo_proto.pb") for path in folder.rglob("jit_step*.pb")]
options = {"module_name": module, "type": "long_txt", "show_metadata": 1}
text, _ = raw_to_tool_data.xspace_to_tool_data(
    files, "graph_viewer", {"graph_viewer_options": options}
)
text = text if isinstance(text, str) else text.decode()
print(json.dumps({"files": len(files), "modules": sorted(filter(None, names)), "text": text}))
"""


def test_profile_is_read_by_xprof_with_the_names_of_the_parts(runs):
    folder, _, output = runs
    assert f"profile in {folder}/second/profile" in output
    assert not (folder / "first" / "profile").exists()
    command = [sys.executable, "-c", READER, str(folder / "second" / "profile")]
    read = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    assert found["files"] == 1
    assert "jit_step" in found["modules"]  # the step's own operations were traced
    assert re.search(r'op_name="jit\(step\)/[^"]*update/', found["text"])


def test_profile_steps_reach_every_training_and_are_checked():
    config = tiny_experiment(logging=LoggingConfig())
    launch_lib.set_profile((config, ("name", config)), "10:13")
    assert (config.logging.profile_start, config.logging.profile_steps) == (10, 3)
    for wrong in ("10", "13:10", "10:10", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match="must be first:last"):
            launch_lib.set_profile(config, wrong)


def test_slurm_script_is_preempted_requeued_and_continues(tmp_path):
    folders = [pathlib.Path(__file__).parent / "slurm", pathlib.Path(sys.executable).parent]
    variables = {
        "PATH": os.pathsep.join([*map(str, folders), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(os.getpid()),  # jax makes the port of process 0 from it
        "WORKDIR": str(tmp_path / "run"),
    }

    def submit(**more):
        return subprocess.run(
            ["docs/launch/blt.sbatch", f"--config={RUNS}:tiny", "--config.mesh.fsdp=2"],
            cwd=ROOT,
            env=environment(tmp_path / "compiled", **variables, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )

    first = submit(FAULT="terminate:3:1")
    assert first.returncode == 0, first.stdout
    assert "devices: 2 x cpu" in first.stdout
    assert "preempted after step" in first.stdout
    assert f"scontrol requeue {os.getpid()}" in first.stdout
    second = submit()
    assert second.returncode == 0, second.stdout
    assert "continuing from the checkpoint of step" in second.stdout
    assert "scontrol" not in second.stdout
    assert [line["step"] for line in lines(tmp_path / "run")] == [*range(1, 41), 40]
