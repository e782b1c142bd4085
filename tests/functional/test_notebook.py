"""examples/notebook.ipynb runs from top to bottom, and its training lowers the loss."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def test_the_notebook_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    results = [
        cell.outputs[-1]["data"]["text/plain"]
        for cell in notebook.cells
        if cell.get("outputs") and "data" in cell.outputs[-1]
    ]
    kinds, tokens, losses, models, texts = (eval(result) for result in results)
    assert [kind for _, kind, _ in kinds].count("memory") == 2 and len(tokens) == 1
    (_, first), (last_iteration, last), validation = losses
    assert last_iteration == 10 and last < first and validation
    assert models["midus_hf"] < models["tiny_base"] and texts[0]
