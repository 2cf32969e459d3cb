"""Transfers between host and device that let the host prepare the next step while an accelerator computes this one.

On a CPU there is nothing to overlap, and everything is done at once. tests/gpu tests the accelerator's side.
"""

from collections import deque
from collections.abc import Callable

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.utils.devices import CPU


class HostToDevice:
    """Copies arrays to the device: to an accelerator from pinned memory, on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device == CPU else torch.Stream(device)

    def __call__(self, array: NDArray) -> Tensor:
        if self._stream is None:
            return torch.from_numpy(array).to(self._device)
        with self._stream:
            copy = torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)
        current = torch.accelerator.current_stream(self._device)
        current.wait_stream(self._stream)
        copy.record_stream(current)
        return copy


Parts = dict[str, dict[str, Tensor]]


class DeviceToHost:
    """Copies tensors to the host's memory; an accelerator does it beside the work that follows, which must not write to
    them before `wait_to_write`.

    Copies of an accelerator are in pinned memory, which PyTorch uses again when they have been dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device == CPU else torch.Stream(device)
        self._copied: torch.Event | None = None

    def __call__(self, parts: Parts) -> tuple[Parts, Callable[[], object]]:
        """Row-major copies, and a function that returns when they can be read."""
        if self._stream is None:
            return _copies(parts), lambda: None
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            copies = _copies(parts, pin_memory=True)
        self._copied = self._stream.record_event()
        return copies, self._copied.synchronize

    def wait_to_write(self) -> None:
        """Let the device finish copying before the work that follows; the host does not wait."""
        if self._copied is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._copied)
            self._copied = None


def _copies(parts: Parts, pin_memory: bool = False) -> Parts:
    def copy(tensor: Tensor) -> Tensor:
        # safetensors stores row-major tensors only; channels-last weights are laid out again on load.
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin_memory)
        return empty.copy_(tensor, non_blocking=pin_memory)

    return {part: {name: copy(tensor) for name, tensor in tensors.items()} for part, tensors in parts.items()}


class LateFlags:
    """Reads each step's flags on the host; those of an accelerator one step late, so that the host need not wait."""

    def __init__(self) -> None:
        self._unread: deque[tuple[Tensor, torch.Event | None]] = deque()
        self._num_flags = 0

    def read(self, flags: Tensor, at_once: bool) -> list[int]:
        """Count each flag over the steps not read before; on an accelerator this step is included only if `at_once`.

        Args:
            flags: [n] bool, of this step.
        """
        copied = None if flags.device == CPU else torch.Event(flags.device)
        self._unread.append((flags.to("cpu", non_blocking=True), copied))
        if copied is not None:
            copied.record()
        self._num_flags = len(flags)
        return self._count(unread=0 if at_once or copied is None else 1)

    def rest(self) -> list[int]:
        """Count each flag over all steps not read yet, and wait for the device."""
        return self._count(unread=0)

    def _count(self, unread: int) -> list[int]:
        """Count each flag over the steps not read yet, but for the last `unread`."""
        counts = torch.zeros(self._num_flags, dtype=torch.int64)
        while len(self._unread) > unread:
            copy, done = self._unread.popleft()
            if done is not None:
                done.synchronize()
            counts += copy
        return counts.tolist()
