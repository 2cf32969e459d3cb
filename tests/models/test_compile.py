"""Blocks compiled one by one: the same net, and each shape compiled once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from support import examples
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm.config.tree import UNetConfig
from ddpm.models import compile, dropout, unet

dit = examples.load("dit", "ddpm_dit.net")

UNET = UNetConfig(
    image_size=8,
    channels=1,
    base_width=8,
    width_multipliers=(1, 2),
    blocks_per_resolution=1,
    norm_groups=4,
    attention_resolutions=(4,),
    dropout=0.3,
)
DIT = dit.DiTConfig(image_size=8, channels=1, width=16, depth=3, num_heads=2, dropout=0.3)


@pytest.fixture(autouse=True)
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that are compiled; they are not turned into machine code."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    limit = torch.compiler.config.recompile_limit
    with torch.compiler.set_stance(force_backend=backend):
        yield compiled
    torch.compiler.config.recompile_limit = limit
    torch.compiler.reset()


@pytest.fixture(params=["unet", "dit"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = unet.build(UNET) if request.param == "unet" else dit.build(DIT)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.1)
    return made


def step(net: nn.Module, images: int, model: nn.Module | None = None) -> list[Tensor]:
    """Output and gradients, with fixed keys."""
    layers = dropout.layers(net)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**31), 2**31, (len(layers), images, 2), generator=generator, dtype=torch.int32)
    net.zero_grad()
    with dropout.keyed(layers, keys):
        out = (model or net)(torch.linspace(-1, 1, images * 64).view(images, 1, 8, 8), torch.arange(images))
        out.square().mean().backward()
    return [out.detach(), *(weight.grad.clone() for weight in net.parameters() if weight.grad is not None)]


def test_compiled_blocks_compute_the_same_and_each_shape_is_compiled_once(
    net: nn.Module, graphs: list[torch.fx.GraphModule]
) -> None:
    """For two sizes of a pass. The U-Net has 8 blocks of as many shapes; PyTorch's limit is 8."""
    expected = {images: step(net, images) for images in (4, 3)}
    names = list(net.state_dict())
    compile.compile_blocks(net)
    assert list(net.state_dict()) == names and not graphs
    for _ in range(2):
        for images, wanted in expected.items():
            torch.testing.assert_close(step(net, images), wanted, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 2 * (8 if isinstance(net, unet.UNet) else 1)
    net.eval()
    with torch.no_grad():  # as consistency does for its target
        for images in expected:
            net(torch.zeros(images, 1, 8, 8), torch.arange(images))
    assert len(graphs) == 4 * (8 if isinstance(net, unet.UNet) else 1)


class Whole(nn.Module):
    """A net that marks no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def test_a_net_without_blocks_is_compiled_as_a_whole(graphs: list[torch.fx.GraphModule]) -> None:
    net = Whole()
    compile.compile_blocks(net)
    net(torch.randn(2, 1, 8, 8))
    assert len(graphs) == 1


def test_averaged_gradients_of_compiled_blocks(net: nn.Module, tmp_path: Path) -> None:
    expected = step(net, 4)
    compile.compile_blocks(net)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        for _ in range(2):
            torch.testing.assert_close(step(net, 4, model), expected, rtol=1e-4, atol=1e-5)
    finally:
        sleep(1)  # as in test_unet.py
        torch.distributed.destroy_process_group()
