"""Training FLOPs per image, against counts by hand, and the peaks of GPUs."""

import pytest
import torch

from ddpm.build import build_net
from ddpm.config import Config
from ddpm.config_io import override
from ddpm.training.mfu import flops_per_image, peak_flops
from ddpm.utils import devices


def test_flops_of_a_transformer_are_those_of_its_matrix_products() -> None:
    values = {"model.net": "dit", "model.image_size": 8, "model.channels": 1, "model.patch_size": 2}
    config = override(Config(), values | {"model.width": 32, "model.depth": 1, "model.num_heads": 2})
    tokens, width = 16, 32
    of_tokens = 4 * width + 3 * width**2 + width**2 + 2 * 4 * width**2 + width * 4
    attention = 2 * tokens * width
    of_image = (256 * width + width**2) + 6 * width**2 + 2 * width**2
    products = tokens * (of_tokens + attention) + of_image
    assert flops_per_image(build_net(config), config) == 3 * 2 * products


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.5e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA A1000", "bfloat16", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    monkeypatch.setattr(devices, "product_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == peak


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(devices.CPU, "float32") is None
