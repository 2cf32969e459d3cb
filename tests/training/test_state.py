"""The training state: initial weights, learning rate."""

import torch

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.training.state import lr_at


def test_initial_weights_depend_only_on_the_seed_and_not_on_global_state(tiny: Config) -> None:
    torch.manual_seed(1)
    first = build_net(tiny).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    again = build_net(tiny).state_dict()
    other = build_net(override(tiny, {"train.seed": 1})).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_learning_rate_warms_up_and_falls() -> None:
    changes = {"optim.lr": 1.0, "optim.lr_warmup_images": 900, "optim.lr_schedule": "cosine"}
    config = override(Config(), changes | {"train.batch_size": 100, "train.total_images": 2900})
    assert [lr_at(config, seen) for seen in (0, 400, 900)] == [0.1, 0.5, 1.0]
    assert abs(lr_at(config, 1900) - 0.5) < 1e-12  # halfway through the cosine
    assert lr_at(config, 2900) == 0.0
    constant = override(config, {"optim.lr_schedule": "constant"})
    assert lr_at(constant, 2900) == 1.0
