"""python jobs/export.py from the command line: export to diffusers and import again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import TINY_NET

from ddpm.build import TrainedNet, build_sampler
from ddpm.config.json import override
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.runs import checkpoint
from ddpm.training.state import State
from ddpm.utils import images
from ddpm.utils.generators import TorchGenerator
from ddpm.utils.seeding import torch_seed

diffusers = pytest.importorskip("diffusers")

TINY = override(TINY_NET, {"schedule.num_timesteps": 20, "schedule.kind": "cosine", "model.zero_init": False})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose averaged weights differ from its last ones."""
    state = State.create(TINY, torch.device("cpu"))
    with torch.no_grad():
        for weight in state.ema.net.parameters():
            weight.add_(0.05)
    checkpoint.write(state.snapshot(TINY, {"run_key": "k", "data_fingerprint": ""}), tmp_path / "c")
    return tmp_path / "c"


def pixels(trained: TrainedNet) -> np.ndarray:
    """Three images by Algorithm 2, from noise that a diffusers pipeline can use too."""
    config = override(trained.config, {"sample.sampler": "ddpm"})
    net = trained.net
    objective = trained.objective
    shape = (config.model.channels, 8, 8)
    noise = PerImageNoise([TorchGenerator(i, device=torch.device("cpu")) for i in range(3)], shape)
    drawn = build_sampler(config)(lambda x_t, t: objective.denoise(net, x_t, t, None), noise)
    return images.to_uint8(drawn)[..., 0].numpy().astype(int)


@pytest.mark.slow
def test_exported_and_imported_nets_sample_the_same_images(
    run_job: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    done = run_job("export", "c", "pipeline", "--no-ema", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"pipeline    {tmp_path}/pipeline"
    assert lines[1].startswith("draw        DDPMPipeline.from_pretrained(")
    done = run_job("export", "pipeline", "back", "--format", "checkpoint", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"checkpoint  {tmp_path}/back\n"), done.stderr

    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(torch_seed(i)) for i in range(3)]
    theirs = np.stack([np.asarray(image) for image in pipeline(3, generators, 20).images]).astype(int)
    ours = pixels(checkpoint.load_net(folder, ema=False))
    assert np.abs(ours[0] - ours[1]).max() > 10
    assert np.abs(ours - theirs).max() <= 1
    assert (ours == pixels(checkpoint.load_net(tmp_path / "back"))).all()
