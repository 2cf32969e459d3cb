"""docs/tour.ipynb, run as by Jupyter."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image
from support.processes import REPO

TOUR = REPO / "docs/tour.ipynb"
TILE = 48 + 2
"""Pixels of an 8x8 image in a grid, with its padding."""


def cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_without_outputs() -> None:
    assert not any(cell.outputs or cell.execution_count for cell in cells(nbformat.read(TOUR, 4)))


def mean(grid: np.ndarray) -> float:
    """The mean of a grid's images, without the padding."""
    is_image = np.arange(len(grid)) % TILE >= 2, np.arange(grid.shape[1]) % TILE >= 2
    return float(grid[np.ix_(*is_image)].mean())


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(TOUR, 4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, startup_timeout=600, resources=where).execute()
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    losses = re.findall(r"loss of the first 50 steps ([\d.]+), of the last 50 ([\d.]+)", text)
    assert len(losses) == 3 and all(float(last) < 0.8 * float(first) for first, last in losses)
    ranks = re.findall(
        r"(linear|cosine): training loss [\d.]+, ([\d.]+) ± [\d.]+ bits/dim, rank ([\d-]+)", text
    )
    assert [name for name, *_ in ranks] == ["linear", "cosine"]
    assert all(float(bits) < 8 for _, bits, _ in ranks)  # bits/dim of a uniform code of 256 grey levels
    real, _, _, by_algorithm_2, by_mix, by_both = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("L"))
        for output in outputs
        if "data" in output
    )
    for drawn in (by_algorithm_2, by_mix, by_both):
        assert drawn.shape == real.shape == (2 * TILE + 2, 8 * TILE + 2)
        assert abs(mean(drawn) - mean(real)) < 20
