"""Transfers between host and device that let the host prepare the next step while a GPU computes this one.

On a CPU there is nothing to overlap, and everything is done at once. tests/gpu tests the GPU's side.
"""

import os
from collections import deque
from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """If `wanted`, let a GPU use only kernels that give the same bits every time; a CPU's kernels always do."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
        torch.use_deterministic_algorithms(wanted)


class HostToDevice:
    """Copies arrays to the device: to a GPU from pinned memory, on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, array: NDArray) -> Tensor:
        if self._stream is None:
            return torch.from_numpy(array).to(self._device)
        with torch.cuda.stream(self._stream):
            copy = torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copy.record_stream(current)
        return copy


def stack_flags(flags: Sequence[Tensor | bool], device: torch.device) -> Tensor:
    """Stack flags of host and device as [n] bool on the device; the host does not wait for the device."""
    return torch.stack(
        [flag if isinstance(flag, Tensor) else torch.full((), flag, device=device) for flag in flags]
    )


class LateFlags:
    """Reads each step's flags on the host; a GPU's flags one step late, so that the host need not wait for the GPU."""

    def __init__(self) -> None:
        self._unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def read(self, flags: Tensor, at_once: bool) -> list[int]:
        """Count each flag over the steps not read before; on a GPU this step is included only if `at_once`.

        Args:
            flags: [n] bool, of this step.
        """
        copied = torch.cuda.Event() if flags.device.type == "cuda" else None
        self._unread.append((flags.to("cpu", non_blocking=True), copied))
        if copied is not None:
            copied.record()
        counts = torch.zeros(len(flags), dtype=torch.int64)
        while len(self._unread) > (0 if at_once or copied is None else 1):
            copy, done = self._unread.popleft()
            if done is not None:
                done.synchronize()
            counts += copy
        return counts.tolist()
