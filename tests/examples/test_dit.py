"""The diffusion Transformer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import examples

from ddpm.build import build_net, build_objective
from ddpm.config.json import from_json, override, to_json
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config, UNetConfig
from ddpm.training.mfu import flops_per_image
from ddpm.training.state import State
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PhiloxGenerator

dit = examples.load("dit", "ddpm_dit.net")

SMALL = dit.DiTConfig(
    image_size=8, channels=3, num_classes=5, patch_size=2, width=16, depth=2, num_heads=2, mlp_ratio=3
)
TINY = {
    "model.net": "dit",
    "model.image_size": 8,
    "model.channels": 1,
    "model.width": 32,
    "model.depth": 2,
    "schedule.num_timesteps": 50,
    "optim.lr": 2e-3,
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny(on_path: Callable[[str], None]) -> Config:
    """A config with this net."""
    on_path("dit")
    return override(Config(), TINY)


def test_patches_are_cut_row_by_row_and_reassembled() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = dit.patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4].view(3, 2, 2), x[1, :, 2:4, 2:4])  # the fourth of two rows of three
    assert torch.equal(dit.unpatchify(tokens, 2, rows=2), x)


def test_position_embeddings_are_distinct() -> None:
    where = dit.positions(4, 6, 16, CPU)
    assert where.shape == (24, 16)
    assert len(where.unique(dim=0)) == 24


def test_images_that_were_not_augmented_need_no_condition() -> None:
    net = dit.build(SMALL, num_conditions=7)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    x_t = torch.randn(4, 3, 8, 8)
    t = torch.arange(4)
    told = torch.zeros(4, 7)
    assert torch.equal(net(x_t, t), net(x_t, t, None, told))
    assert not torch.allclose(net(x_t, t), net(x_t, t, None, told + 1), atol=1e-3)


@pytest.mark.parametrize("learned", [False, True])
def test_initially_blocks_are_the_identity_and_the_output_is_0(learned: bool) -> None:
    """adaLN-Zero; every weight has a gradient as soon as the last layers are not 0."""
    net = dit.build(SMALL, out_channels=6 if learned else None)
    tokens = torch.randn(4, 16, 16)
    condition = torch.randn(4, 16)
    for block in net.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    x_t = torch.randn(4, 3, 8, 8)
    t = torch.arange(4)
    label = torch.tensor([0, 3, 4, 5])
    out = net(x_t, t, label)
    assert torch.equal(out, torch.zeros(4, 6 if learned else 3, 8, 8))
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    net(x_t, t, label).square().sum().backward()
    assert [name for name, weight in net.named_parameters() if not weight.grad.any()] == []  # type: ignore[union-attr]


def test_the_output_depends_on_t_label_and_position_but_not_on_the_batch() -> None:
    net = dit.build(SMALL)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x_t = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    t = torch.tensor([1, 9, 1])
    label = torch.tensor([0, 0, 1])
    out = net(x_t, t, label)
    assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[0], out[2])
    torch.testing.assert_close(out[1:2], net(x_t[1:2], t[1:2], label[1:2]))
    flat = net(torch.ones(1, 3, 8, 8), t[:1])  # no label means the null label
    assert not torch.allclose(flat[..., :2, :2], flat[..., 2:4, :2])
    torch.testing.assert_close(flat, net(torch.ones(1, 3, 8, 8), t[:1], torch.tensor([5])))


@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("classes", [0, 5])
def test_the_number_of_weights_follows_the_formula(time: bool, classes: int) -> None:
    E = 16
    L = 2
    r = 3
    pixels = 4 * 3
    S = 256
    config = replace(SMALL, num_classes=classes)
    block = 3 * E * E + 3 * E + E * E + E + 2 * r * E * E + r * E + E + 6 * E * E + 6 * E
    rest = pixels * E + E + 2 * E * E + 2 * E + E * pixels + pixels
    conditions = time * (S * E + E + E * E + E) + bool(classes) * (classes + 1) * E
    net = dit.build(config, time_conditional=time)
    assert sum(weight.numel() for weight in net.parameters()) == L * block + rest + conditions
    assert not list(net.buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "image_size is 8"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"width": 18}, "width is 18"),
        ({"width": 10**12}, "width is 1000000000000"),
        ({"num_heads": 3}, "num_heads is 3"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"depth": 65}, "depth is 65"),
        ({"mlp_ratio": 10**9}, "mlp_ratio is 1000000000"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
    ],
)
def test_invalid_sizes_are_errors(changes: dict[str, int], message: str) -> None:
    """The net checks what it is given, also where no config has been checked."""
    with pytest.raises(ValueError, match=message):
        dit.build(replace(SMALL, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seeds_give_the_same_loss_and_a_short_training_lowers_it(
    tiny: Config, precision: str
) -> None:
    config = override(tiny, {"train.precision": precision})
    x_0 = torch.linspace(-1, 1, 64).view(1, 1, 8, 8) * torch.tensor([-1.0, 1.0]).repeat(32).view(64, 1, 1, 1)
    objective = build_objective(config)

    def losses(steps: int) -> list[float]:
        state = State.create(config, CPU)
        history = []
        for step in range(steps):
            loss = objective.loss(state.net, x_0, None, PhiloxGenerator(0, step)).value
            loss.backward()
            state.descend(config.optim.lr, bad=torch.tensor(False))
            state.net.zero_grad()
            history.append(loss.item())
        return history

    first = losses(60)
    assert losses(5) == first[:5]
    assert first[0] == pytest.approx(1, abs=0.1)  # the initial prediction of eps is 0
    assert sum(first[-10:]) / 10 < 0.5


def test_without_t_it_fits_the_uniform_mix_process(tiny: Config) -> None:
    net = build_net(override(tiny, {"objective.process": "uniform_mix"}))
    assert net(torch.randn(2, 1, 8, 8), None).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="t must be None"):
        net(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))


def test_another_net_keeps_the_shared_settings(on_path: Callable[[str], None]) -> None:
    on_path("dit")
    before = override(PRESETS["digits"], {"model.num_classes": 10, "model.dropout": 0.1})
    after = override(before, {"model.net": "dit", "model.depth": 3})
    assert after.model == dit.DiTConfig(image_size=8, channels=1, num_classes=10, dropout=0.1, depth=3)
    assert override(after, {"model.depth": 4}).model == replace(after.model, depth=4)  # type: ignore[call-arg]
    assert from_json(to_json(after)) == after
    back = override(after, {"model.net": "unet"}).model
    assert back == UNetConfig(image_size=8, channels=1, num_classes=10, dropout=0.1)
    with pytest.raises(UserError, match=r"unknown key 'base_width'; known are net, image_size, .*patch_size"):
        override(before, {"model.net": "dit", "model.base_width": 8})


def test_its_flops_are_those_of_its_matrix_products(on_path: Callable[[str], None]) -> None:
    on_path("dit")
    values = {"model.net": "dit", "model.image_size": 8, "model.channels": 1, "model.patch_size": 2}
    config = override(Config(), values | {"model.width": 32, "model.depth": 1, "model.num_heads": 2})
    tokens = 16
    width = 32
    of_tokens = 4 * width + 3 * width**2 + width**2 + 2 * 4 * width**2 + width * 4
    attention = 2 * tokens * width
    of_image = (256 * width + width**2) + 6 * width**2 + 2 * width**2
    products = tokens * (of_tokens + attention) + of_image
    assert flops_per_image(build_net(config), config) == 3 * 2 * products


def test_its_flags_are_those_of_the_command_line(run_job: Callable[..., Any], tmp_path: Path) -> None:
    env = examples.env("dit")
    shown = run_job("train", "digits", "--model.net", "dit", "--help-all", cwd=tmp_path, env=env)
    assert "--model.patch-size" in shown.stdout and "--model.base-width" not in shown.stdout
    assert "{unet,dit}" in shown.stdout


@pytest.mark.slow
def test_it_trains_on_ray_and_is_sampled(run_job: Callable[..., Any], tmp_path: Path) -> None:
    words = "--model.net dit --model.width 32 --model.depth 2 --total-images 640 --name a --workers 1"
    done = run_job("train", "digits", *words.split(), cwd=tmp_path, env=examples.env("dit"))
    assert done.returncode == 0, done.stderr
    words = "runs/a --num-images 4 --num-sample-steps 5 --out drawn"
    done = run_job("sample", *words.split(), cwd=tmp_path, env=examples.env("dit"))
    assert done.returncode == 0, done.stderr
    refused = run_job("sample", *words.split(), cwd=tmp_path)
    assert refused.returncode == 2 and "examples/dit" in refused.stderr
