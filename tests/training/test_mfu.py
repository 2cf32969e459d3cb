"""Training FLOPs per image, against counts by hand."""

import torch

from ddpm.build import build_net
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.training.mfu import flops_per_image, peak_flops


def test_flops_of_a_transformer_are_those_of_its_matrix_products() -> None:
    values = {"model.net": "dit", "model.image_size": 8, "model.channels": 1, "model.patch_size": 2}
    config = override(Config(), values | {"model.width": 32, "model.depth": 1, "model.num_heads": 2})
    tokens, width = 16, 32
    of_tokens = 4 * width + 3 * width**2 + width**2 + 2 * 4 * width**2 + width * 4
    attention = 2 * tokens * width
    of_image = (256 * width + width**2) + 6 * width**2 + 2 * width**2
    products = tokens * (of_tokens + attention) + of_image
    assert flops_per_image(build_net(config), config) == 3 * 2 * products


def test_the_peak_of_a_processor_is_measured_once() -> None:
    cpu = torch.device("cpu")
    peak = peak_flops(cpu, "float32")
    assert peak is not None and 1e8 < peak < 1e14
    assert peak_flops(cpu, "float32") == peak
