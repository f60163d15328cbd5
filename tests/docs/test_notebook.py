"""The notebook runs from top to bottom, and shows a run as it goes."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lora.ipynb"
SOURCES = Path(__file__).parents[2] / "src"


@pytest.mark.slow
def test_the_notebook_runs_and_draws_its_runs(tmp_path, monkeypatch, minigpt_home):
    home = tmp_path / "dist" / "notebook" / "minigpt"  # which the notebook makes where it is not
    shutil.copytree(minigpt_home, home)
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(SOURCES), inherited))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": tmp_path}})
    client.execute()
    pictures = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert len(pictures) == 1
    assert "step 60 of 60" in pictures[0]
    assert "<polyline" in pictures[0]


def test_the_notebook_is_stored_without_what_it_printed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
