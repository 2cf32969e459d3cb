"""The notebooks, run as by Jupyter."""

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

TILE = 48 + 2
"""Pixels of an 8x8 image in a grid, with its padding."""


def cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: tuple[str, str] = ("", "")
) -> tuple[str, list[np.ndarray]]:
    """Execute a notebook in `folder`; returns what it prints, and its PNGs in grey.

    Args:
        replaced: what is replaced in its code, and by what.
    """
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(folder / variable))
    notebook = nbformat.read(REPO / name, 4)
    for cell in cells(notebook):
        cell.source = cell.source.replace(*replaced)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, startup_timeout=600, resources=where).execute()
    outputs = [output for cell in cells(notebook) for output in cell.outputs]
    stderr = [output.text for output in outputs if output.get("name") == "stderr"]
    # tqdm and Ray say that they miss ipywidgets, and a run on a busy machine that it waits for MLflow.
    expected = re.compile(r"ipywidgets|^waiting for MLflow at |^$")
    assert [text for text in stderr if not expected.search(text.strip())] == []
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    data = [output.get("data", {}) for output in outputs]
    pngs = [base64.b64decode(formats["image/png"]) for formats in data if "image/png" in formats]
    return text, [np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pngs]


def tiles(grid: np.ndarray) -> np.ndarray:
    """A grid's images, without the padding."""
    is_image = np.arange(len(grid)) % TILE >= 2, np.arange(grid.shape[1]) % TILE >= 2
    return grid[np.ix_(*is_image)].astype(float)


@pytest.mark.slow
@pytest.mark.long
def test_the_tour_runs_and_shows_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, (real, _, _, *drawn) = run("docs/tour.ipynb", tmp_path, monkeypatch)
    losses = re.findall(r"loss of the first 50 steps ([\d.]+), of the last 50 ([\d.]+)", text)
    assert len(losses) == 3 and all(float(last) < 0.8 * float(first) for first, last in losses)
    ranks = re.findall(
        r"(linear|cosine): training loss [\d.]+, ([\d.]+) ± [\d.]+ bits/dim, rank ([\d-]+)", text
    )
    assert [name for name, *_ in ranks] == ["linear", "cosine"]
    assert all(float(bits) < 8 for _, bits, _ in ranks)  # bits/dim of a uniform code of 256 grey levels
    assert len(drawn) == 3  # by Algorithm 2, by the course's baseline, by both schedules
    for grid in drawn:
        assert grid.shape == real.shape == (2 * TILE + 2, 8 * TILE + 2)
        assert abs(tiles(grid).mean() - tiles(real).mean()) < 20


@pytest.mark.slow
def test_training_in_a_notebook_shows_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    fewer = ("12_800, model=small)", "1_280, model=small)")
    text, (_, small, stripes) = run("docs/train.ipynb", tmp_path, monkeypatch, fewer)
    assert re.findall(r"^trained     ([\d,]+) images", text, re.MULTILINE) == ["1,280", "12,800", "1,280"]
    assert small.shape == (4 * TILE + 2, 4 * TILE + 2)
    level = tiles(stripes)[:96].reshape(2, 48, 3, 48)  # six images: their rows differ more than their columns
    assert level.std(axis=1).mean() > 1.3 * level.std(axis=3).mean()
