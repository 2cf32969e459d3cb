"""This process's device: an accelerator that torch.accelerator knows (CUDA, ROCm, XPU), else the CPU."""

import os
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


def memory() -> tuple[int, int, int] | None:
    """Index, free and total bytes of the accelerator; None unless this process has used it (a query would start it)."""
    device = default()
    if device == CPU or not _module(device).is_initialized():
        return None
    return torch.accelerator.current_device_index(), *torch.accelerator.get_memory_info()


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """If `wanted`, let an accelerator use only kernels that give the same bits every time; all kernels of a CPU do."""
    if device != CPU:
        # CUDA reads it at the first matrix product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted)


def _module(device: torch.device) -> Any:
    """torch.cuda, torch.xpu, ..."""
    return torch.get_device_module(device)
