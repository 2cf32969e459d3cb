"""Model FLOPs utilisation (MFU): the net's arithmetic per second, as a share of the devices' peak.

Matrix products and convolutions count. Chowdhery et al. 2022, PaLM, arXiv:2204.02311, Appendix B.
"""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.utils import devices

BFLOAT16_PEAKS = {
    "H200": 989e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""FLOP/s of dense bfloat16 products, by words of a GPU's name, from NVIDIA's data sheets. TF32 has half of that."""


def flops_per_image(net: nn.Module, config: Config) -> float:
    """FLOPs of training on one image: 3 times the forward pass, since the backward pass takes twice as many.

    A forward pass without a gradient, as that of consistency tuning, does not count.
    """
    device = next(net.parameters()).device
    model = config.model
    t = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x_t = torch.zeros(1, model.channels, model.image_size, model.image_size, device=device)
        net(x_t, t if kinds.objective(config.objective.process).uses_time else None, None)
    return 3.0 * counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a GPU, from its data sheet; None: unknown, as that of a CPU."""
    if device == devices.CPU:
        return None
    name = f" {devices.product_name(device).replace('-', ' ')} "
    known = next((peak for words, peak in BFLOAT16_PEAKS.items() if f" {words} " in name), None)
    return known / 2 if known and precision == "float32" else known
