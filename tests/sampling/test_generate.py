"""Sampling from a net: image i depends only on the seed and i."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.build import TrainedNet
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.sampling import generate
from ddpm.training.state import State
from ddpm.utils import images
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sample.sampler": "ddpm"},
        {"sample.sampler": "dpmpp_2m"},
        {"sample.sampler": "heun"},
        {"objective.process": "uniform_mix"},
    ],
    ids=str,
)
def test_image_i_does_not_depend_on_its_batch(tiny: Config, change: dict[str, Any]) -> None:
    config = override(tiny, {"model.zero_init": False, **change})
    trained = TrainedNet(State.create(config, CPU).ema.net, config)
    together = generate.draw(trained, range(6))
    alone = generate.draw(trained, [4])
    reordered = generate.draw(trained, [5, 4])
    # Another batch size may use other kernels: at most one grey level of difference.
    assert (together[4].int() - alone[0].int()).abs().max() <= 1
    assert (together[4].int() - reordered[1].int()).abs().max() <= 1
    assert (together[4] != together[5]).any()
    other = generate.draw(trained.sampled_with(replace(config.sample, seed=1)), [4])
    assert (other[0].int() - alone[0].int()).abs().max() > 1


def test_guidance_applies_only_in_its_interval(tiny: Config) -> None:
    config = override(tiny, {"model.zero_init": False, "model.num_classes": 10, "sample.sampler": "heun"})
    trained = TrainedNet(State.create(config, CPU).ema.net, config)

    def sampled(**changes: Any) -> torch.Tensor:
        return generate.draw(trained.sampled_with(replace(config.sample, **changes)), range(3))

    guided = sampled(guidance_scale=5.0)
    plain = sampled()
    assert not torch.equal(guided, plain)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(0.0, 1e9)), guided)
    assert torch.equal(sampled(guidance_scale=5.0, guidance_interval=(1e6, 1e9)), plain)
    partly = sampled(guidance_scale=5.0, guidance_interval=(0.5, 5.0))
    assert not torch.equal(partly, plain) and not torch.equal(partly, guided)


def test_denoising_yields_every_other_x_t_and_the_result(tiny: Config) -> None:
    trained = TrainedNet(State.create(tiny, CPU).ema.net, tiny)
    kept = list[torch.Tensor]()
    result = generate.draw(trained, range(3), on_step=lambda step, x_t, x_0_hat: kept.append(x_t))
    expected = [*(images.to_uint8(kept[step]) for step in (0, 2, 4)), result]
    frames = list(generate.denoising(trained, range(3), every=2))
    assert [frame.tolist() for frame in frames] == [frame.tolist() for frame in expected]


def test_closing_the_generator_ends_the_sampler(tiny: Config) -> None:
    trained = TrainedNet(State.create(tiny, CPU).ema.net, tiny)
    calls = list[int]()
    trained = trained.sampled_with(replace(tiny.sample, num_sample_steps=50))
    trained.net.register_forward_pre_hook(lambda *_: time.sleep(0.6 if calls else 0) or calls.append(0))
    frames = generate.denoising(trained, range(3))
    next(frames)
    frames.close()
    assert 1 <= len(calls) < 50


NAMES = ("bags", "boots", "T-shirts")


def labelled(tiny: Config, names: tuple[str, ...] = NAMES, num_classes: int = 3) -> TrainedNet:
    config = override(tiny, {"model.num_classes": num_classes})
    return TrainedNet(State.create(config, CPU).ema.net, config, class_names=names)


def test_a_class_is_given_by_its_name_or_its_number(tiny: Config) -> None:
    trained = labelled(tiny)
    given: tuple[int | str | None, ...] = ("boots", "1", 1, "T-shirts", None)
    assert [generate.class_of(trained, label) for label in given] == [1, 1, 1, 2, None]
    assert generate.class_of(labelled(tiny, ()), "2") == 2


def test_classes_that_are_named_by_numbers_are_given_by_name(tiny: Config) -> None:
    """Those of digits are their own numbers; a folder may have subfolders 3 and 7."""
    trained = labelled(tiny, ("3", "7", "other"))
    assert [generate.class_of(trained, label) for label in ("3", "7", 1, "other")] == [0, 1, 1, 2]
    with pytest.raises(UserError, match="label is 1"):
        generate.class_of(trained, "1")


@pytest.mark.parametrize(
    ("names", "label", "advice"),
    [
        (NAMES, "Boot", "bags, boots, T-shirts"),
        (NAMES, "3", "bags, boots, T-shirts"),
        (NAMES, -1, "bags, boots, T-shirts"),
        ((), "boots", "0..2"),
        ((), 3, "0..2"),
    ],
)
def test_a_class_that_is_not_there_is_a_user_error(
    tiny: Config, names: tuple[str, ...], label: int | str, advice: str
) -> None:
    with pytest.raises(UserError, match=f"label is {label}") as error:
        generate.class_of(labelled(tiny, names), label)
    assert advice in str(error.value)


def test_of_many_classes_an_error_names_some(tiny: Config) -> None:
    names = tuple(f"c{i}" for i in range(1000))
    with pytest.raises(UserError, match=r"c19, \.\.\. \(1000 classes\)") as error:
        generate.class_of(labelled(tiny, names, 1000), "dogs")
    assert len(str(error.value)) < 200


def test_a_grid_has_a_column_for_each_class(tiny: Config) -> None:
    drawn = np.arange(7, dtype=np.uint8).repeat(8 * 8).reshape(7, 8, 8, 1)
    plain = images.grid(drawn, 3)
    assert (generate.grid(labelled(tiny, ()), drawn) == plain).all()
    named = generate.grid(labelled(tiny), drawn)
    above = len(named) - len(plain)
    assert (named[above:] == plain).all() and (named[:above] < 255).any()
    for trained, label in (
        (labelled(tiny), 1),
        (labelled(tiny, (), 17), None),
        (labelled(tiny, (), 0), None),
    ):
        assert (generate.grid(trained, drawn, label) == images.grid(drawn)).all()
