"""The notebooks run, in order, and are kept as git wants them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_PICTURE_BYTES = 60_000


def test_notebooks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("FC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert [file.name[:2] for file in NOTEBOOKS] == ["01", "02", "03"]
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, as_version=4)
        folder = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    assert (tmp_path / "outputs" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_only_small_pictures_are_kept_of_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in cells)
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type == "display_data"
        assert output.data.keys() == {"image/png"}
        assert len(output.data["image/png"]) * 3 / 4 < MAX_PICTURE_BYTES
