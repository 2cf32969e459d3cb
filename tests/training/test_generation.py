"""From a net to images: image i is a function of seed and i, and what cannot be drawn is refused in a line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import generation
from ddpm.config import Config, UserError, override
from ddpm.training import checkpoint
from ddpm.training.state import State

CPU = torch.device("cpu")


@pytest.fixture
def trained(tiny: Config) -> State:
    """A net that draws something: its output convolution is not zero."""
    return State.create(override(tiny, {"model.zero_init": False}), CPU)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sample.sampler": "ancestral"},
        {"sample.sampler": "dpmpp_2m", "sample.dynamic_threshold": 0.9},
        {"sample.sampler": "heun"},
        {"objective.process": "uniform_mix"},
    ],
    ids=str,
)
def test_image_i_is_the_same_in_any_company(tiny: Config, change: dict[str, Any]) -> None:
    config = override(tiny, {"model.zero_init": False, **change})
    net, objective = State.create(config, CPU).ema.net, generation.build_objective(config)
    together = generation.draw(net, config, objective, range(6), device=CPU)
    alone = generation.draw(net, config, objective, [4], device=CPU)
    turned = generation.draw(net, config, objective, [5, 4], device=CPU)
    # A batch of another size may take other kernels: a grey level at most.
    assert (together[4].int() - alone[0].int()).abs().max() <= 1
    assert (together[4].int() - turned[1].int()).abs().max() <= 1
    assert (together[4] != together[5]).any()
    other = generation.draw(
        net, config, objective, [4], device=CPU, sample=dataclasses.replace(config.sample, seed=1)
    )
    assert (other[0].int() - alone[0].int()).abs().max() > 1


def test_guidance_is_confined_to_its_interval(tiny: Config) -> None:
    config = override(tiny, {"model.zero_init": False, "model.num_classes": 10, "sample.sampler": "heun"})
    net, objective = State.create(config, CPU).ema.net, generation.build_objective(config)

    def drawn(**changes: Any) -> torch.Tensor:
        sample = dataclasses.replace(config.sample, **changes)
        return generation.draw(net, config, objective, range(3), device=CPU, sample=sample)

    guided, plain = drawn(guidance_scale=5.0), drawn()
    assert not torch.equal(guided, plain)
    assert torch.equal(drawn(guidance_scale=5.0, guidance_interval=(0.0, 1e9)), guided)
    assert torch.equal(drawn(guidance_scale=5.0, guidance_interval=(1e6, 1e9)), plain)
    partly = drawn(guidance_scale=5.0, guidance_interval=(0.5, 5.0))
    assert not torch.equal(partly, plain) and not torch.equal(partly, guided)


def test_inpainting_keeps_the_picture_where_the_mask_is_white(
    trained: State, tiny: Config, tmp_path: Path
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    config = override(tiny, {"sample.num_sample_steps": 12})
    known = generation.read_known(tmp_path / "picture.png", tmp_path / "mask.png", config, num_resamples=2)
    generation.write_images(trained.ema.net, config, 3, tmp_path / "out", CPU, known=known)
    drawn = [np.asarray(Image.open(tmp_path / f"out/images/{i:06d}.png")) for i in range(3)]
    for image in drawn:
        assert (image[:, :4] == picture[:, :4]).all()
    assert (drawn[0][:, 4:] != drawn[1][:, 4:]).any()
    with pytest.raises(UserError, match=r"jump_length is 10; .* 5 steps"):
        generation.write_images(trained.ema.net, tiny, 3, tmp_path / "out", CPU, known=known)
    mixed = override(config, {"objective.process": "uniform_mix"})
    with pytest.raises(UserError, match="ancestral cannot undo the process uniform_mix"):
        generation.write_images(trained.ema.net, mixed, 3, tmp_path / "out", CPU, known=known)


def test_images_and_grid_are_written(trained: State, tiny: Config, tmp_path: Path) -> None:
    told: list[int] = []
    grid = generation.write_images(
        trained.ema.net, tiny, 5, tmp_path / "out", CPU, batch_size=2, on_progress=told.append
    )
    assert told == [2, 4, 5]
    files = sorted((tmp_path / "out/images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    with Image.open(files[0]) as image, Image.open(grid) as picture:
        assert image.size == (8, 8) and picture.size[0] > 100
    assert grid == tmp_path / "out/grid.png"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_images": 0}, "at least 1"), ({"label": 3}, "this net was trained without labels")],
)
def test_what_cannot_be_drawn_is_refused(
    trained: State, tiny: Config, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    arguments = {"num_images": 1, "out": tmp_path / "out", "device": CPU, **settings}
    with pytest.raises(UserError, match=message):
        generation.write_images(trained.ema.net, tiny, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_job_draws_from_a_checkpoint(
    run_job: Callable[..., Any], trained: State, tiny: Config, tmp_path: Path
) -> None:
    config = override(tiny, {"model.zero_init": False})
    checkpoint.save(tmp_path / "run/checkpoint-000000000000", trained, config, {})
    done = run_job(
        *("sample", "run", "--num-images", "3", "--out", "drawn", "--trajectory"),
        *("--sampler", "dpmpp_2m", "--num-sample-steps", "2", "--guidance-interval", "0.5", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "drawn/grid.png") in done.stdout
    with Image.open(tmp_path / "drawn/trajectory.gif") as gif, Image.open(tmp_path / "drawn/trajectory.png"):
        assert gif.is_animated
    assert len(list((tmp_path / "drawn/images").iterdir())) == 3
    for flags, message in (
        (["nothing-here"], "does not exist"),
        (["run", "--sampler", "mix"], "mix cannot undo the process gaussian"),
        (["run", "--num-sample-steps", "51"], "num_sample_steps is 51"),
        (["run", "--inpaint", "picture.png"], "--inpaint and --mask belong together"),
        (["run", "--inpaint", "a.png", "--mask", "b.png", "--sampler", "ddim"], "not of ddim"),
    ):
        done = run_job("sample", *flags, "--out", "refused", cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "refused").exists()
