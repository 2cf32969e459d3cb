"""Training FLOPs per image, against counts by hand, and the peaks of GPUs."""

import pytest
import torch

from ddpm.training.mfu import peak_flops
from ddpm.utils import devices


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
