"""This process's device: an accelerator that torch.accelerator knows (CUDA, ROCm, XPU), else the CPU."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")
WITHOUT_FLOAT64 = ("mps",)
"""Kinds of accelerators that cannot hold the float64 sums and tables of training and sampling: the CPU is used."""


def default() -> torch.device:
    """The accelerator, if there is one that can be used."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return CPU if accelerator is None or accelerator.type in WITHOUT_FLOAT64 else accelerator


def count() -> int:
    """Number of accelerators that this process sees."""
    return torch.accelerator.device_count() if default() != CPU else 0


def product_name(device: torch.device) -> str:
    """The name of an accelerator, such as NVIDIA H100 80GB HBM3."""
    return str(_module(device).get_device_name(device))


def hardware() -> str:
    """Name of this process's accelerator, else the number of cores and the processor of its machine."""
    if (device := default()) != CPU:
        return product_name(device)
    name = platform.machine()
    with suppress(OSError):  # not on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{os.cpu_count()} cores, {name}"


def peak_memory_share() -> float | None:
    """The most of the accelerator's memory that this process has reserved, as a share.

    None unless it has used one: a query would start it.
    """
    device = default()
    if device == CPU or not _module(device).is_initialized():
        return None
    _, total = torch.accelerator.get_memory_info()
    return torch.accelerator.max_memory_reserved() / total


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """If `wanted`, let an accelerator use only kernels that give the same bits every time; all kernels of a CPU do."""
    if device != CPU:
        # CUDA reads it at the first matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu, ..."""
    return torch.get_device_module(device)
