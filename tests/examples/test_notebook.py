"""examples/demo.ipynb: it runs from the first cell to the last, and what it shows is of one such run."""

import json

import pytest

from tests.runs import ROOT

PATH = ROOT / "examples" / "demo.ipynb"
MAX_BYTES = 300_000


def outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", [])]


def printed(cells):
    return "".join("".join(output.get("text", "")) for output in outputs(cells))


@pytest.mark.slow
def test_every_cell_runs_in_a_kernel(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("LONGRL_NOTEBOOK_STEPS", "1")
    monkeypatch.setenv("LONGRL_NOTEBOOK_OUT", str(tmp_path))
    notebook = nbformat.read(PATH, as_version=4)
    place = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    assert "RL: " in printed(notebook.cells)
    num_pictures = sum("image/png" in output.get("data", {}) for output in outputs(notebook.cells))
    assert num_pictures == 5
    assert (tmp_path / "evaluation" / "RL" / "test" / "report.html").is_file()


def test_outputs_that_it_ships_are_small_and_of_one_run():
    text = PATH.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < MAX_BYTES
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        output for output in outputs(cells) if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
    assert "RL: " in printed(cells)
    assert str(ROOT) not in text
