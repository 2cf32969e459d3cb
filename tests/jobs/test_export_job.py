"""python jobs/export.py, as a person types it: out of the house and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.config import Config, override
from ddpm.training import checkpoint
from ddpm.training.state import SAMPLE, State, seed_for

diffusers = pytest.importorskip("diffusers")

TINY = override(
    Config(),
    {
        "schedule.num_timesteps": 20,
        "schedule.kind": "cosine",
        "model.image_size": 8,
        "model.channels": 1,
        "model.base_width": 8,
        "model.width_multipliers": [1, 2],
        "model.attention_resolutions": [4],
        "model.blocks_per_resolution": 1,
        "model.norm_groups": 4,
        "model.zero_init": False,
    },
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose averaged weights are not its last ones."""
    state = State.create(TINY, torch.device("cpu"))
    with torch.no_grad():
        for weight in state.ema.net.parameters():
            weight.add_(0.05)
    checkpoint.save(tmp_path / "c", state, TINY, {"run_key": "k"})
    return tmp_path / "c"


def pixels(folder: Path) -> list[np.ndarray]:
    found = []
    for path in sorted((folder / "images").iterdir()):
        with Image.open(path) as image:
            found.append(np.asarray(image).astype(int))
    return found


@pytest.mark.slow
def test_what_the_jobs_draw_is_what_diffusers_draws(
    run_job: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    """There, and from there back: three programs draw image i of seed 1."""

    def sample(where: Path, out: str) -> list[np.ndarray]:
        flags = ("--num-images", 3, "--sampler", "ancestral", "--seed", 1, "--out", tmp_path / out)
        done = run_job("sample", where, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return pixels(tmp_path / out)

    done = run_job("export", "c", "pipeline", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"pipeline    {tmp_path}/pipeline"
    assert lines[1].startswith("draw        DDPMPipeline.from_pretrained(")
    done = run_job("export", "pipeline", "back", "--format", "checkpoint", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"checkpoint  {tmp_path}/back\n"), done.stderr

    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed_for(1, SAMPLE, i)) for i in range(3)]
    theirs = [np.asarray(image).astype(int) for image in pipeline(3, generators, 20).images]
    ours, back = sample(folder, "ours"), sample(tmp_path / "back", "back")
    assert len(ours) == 3
    assert np.abs(ours[0] - ours[1]).max() > 10
    for mine, returned, their in zip(ours, back, theirs, strict=True):
        assert (mine == returned).all()
        assert np.abs(mine - their).max() <= 1


def test_mistakes_are_a_line_and_exit_code_2(
    run_job: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    mistakes = {
        ("c", "there"): "there exists, and nothing is overwritten",
        ("c", "out", "--label", "1"): "label is 1; this net was trained without labels",
        ("c", "out", "--alias", "champion"): "--alias is of a registered model",
    }
    for words, message in mistakes.items():
        done = run_job("export", *words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "there"]


def test_a_program_and_its_config(run_job: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    done = run_job("export", folder, "out", "--format", "pt2", "--no-ema", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"program     {tmp_path}/out/net.pt2\n"), done.stderr
    net, _ = checkpoint.load_net(folder, torch.device("cpu"), ema=False)
    x_t, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 19])
    program = torch.export.load(tmp_path / "out/net.pt2").module()
    assert (program(x_t, t) - net(x_t, t)).abs().max() < 1e-5
