"""The code cells of every notebook run from top to bottom."""

import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    names = {}
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), "notebooks are kept without outputs"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["figure"].ndim == 3
    assert "bits_per_byte" in capsys.readouterr().out
