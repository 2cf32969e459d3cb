"""The precision in which a net computes: half, if it is asked for and the device has instructions for it.

Without them PyTorch converts every number to float32 and back, which takes several times as long as float32
(github.com/pytorch/pytorch/issues/118499).
"""

from contextlib import AbstractContextManager, nullcontext

import torch

CPUS_WITH_BFLOAT16 = "AVX512", "SVE256"
"""Kinds of CPUs that have them, as `torch.backends.cpu.get_cpu_capability` names them."""
CPU_CAPABILITY = torch.backends.cpu.get_cpu_capability()
"""That of this machine; read once, since torch.compile cannot trace the call."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; a CPU without AVX-512 and a T4 have none."""
    if device.type == "cpu":
        return CPU_CAPABILITY in CPUS_WITH_BFLOAT16
    supported: bool = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    return supported


def supported_dtype(wanted: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """`wanted`, or None, which is float32, where the device has no such instructions."""
    return None if wanted == torch.bfloat16 and not has_bfloat16(device) else wanted


def autocast(device: torch.device, wanted: torch.dtype | None) -> AbstractContextManager:
    """A context in which a net computes in `supported_dtype`, whatever the caller's autocast is."""
    if device.type == "meta":  # it has no autocast
        return nullcontext()
    dtype = supported_dtype(wanted, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
