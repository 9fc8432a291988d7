"""`examples/quickstart.ipynb` runs from top to bottom, and is stored without outputs."""

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_and_the_draft_changes_no_answer(notebook, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):  # not the user's own folders
        monkeypatch.setenv(name, str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=NOTEBOOK.parent)
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )
    assert printed.count("the same") == 6 and "the same: False" not in printed and "tokens: False" not in printed
    assert "identical: True" in printed and "speedup" in printed


def test_it_is_stored_without_outputs():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in stored.cells)
