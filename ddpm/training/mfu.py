"""Model FLOPs utilisation (MFU): the net's arithmetic per second, as a share of what the devices can do at most.

Products of matrices and convolutions count. Chowdhery et al. 2022, PaLM, arXiv:2204.02311, Appendix B.
"""

import time
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm.config import Config
from ddpm.diffusion.objectives import PROCESSES

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
"""FLOP/s of dense bfloat16 products, by words of a GPU's name: NVIDIA's data sheets. TF32 has half of it."""
MEASURING_S = 0.2
SIDE = 512
"""Rows and columns of the product that a CPU's peak is measured with: some of many short ones are not interrupted."""


def flops_per_image(net: nn.Module, config: Config) -> float:
    """FLOPs of training on an image: thrice those of the forward pass, since the backward pass takes twice as many."""
    device, model = next(net.parameters()).device, config.model
    t = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        x_t = torch.zeros(1, model.channels, model.image_size, model.image_size, device=device)
        net(x_t, t if PROCESSES[config.objective.process].uses_time else None, None)
    return 3.0 * counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a device: a CPU's measured with the threads of this process, a GPU's from its data sheet, if known."""
    if device.type != "cuda":
        return _measured_peak(getattr(torch, precision), torch.get_num_threads())
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    known = next((peak for words, peak in BFLOAT16_PEAKS.items() if f" {words} " in name), None)
    return known / 2 if known and precision == "float32" else known


@cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the fastest of some products of large matrices."""
    a = torch.full((SIDE, SIDE), 0.5, dtype=dtype)
    fastest, end = float("inf"), time.perf_counter() + MEASURING_S
    while (began := time.perf_counter()) < end:
        a @ a
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIDE**3 / fastest
