"""Copying the state of training to the host, with streams whose work is late."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import local
from torch.overrides import TorchFunctionMode

from ddpm.config.tree import Config
from ddpm.runs import checkpoint
from ddpm.training.state import State
from ddpm.training.transfers import DeviceToHost

DEVICE = torch.device("meta")
"""Stands for an accelerator; the tensors are on the CPU."""


class LateStream:
    """A stream whose copies are made when something waits for them, as late as possible."""

    def __init__(self, device: torch.device = DEVICE) -> None:
        self._copies: list[Callable[[], object]] = []
        self._mode = Postpone(self._copies)

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def wait_stream(self, other: "LateStream") -> None: ...

    def record_event(self) -> "LateStream":
        return self

    def wait_event(self, event: "LateStream") -> None:
        event.synchronize()

    def synchronize(self) -> None:
        while self._copies:
            self._copies.pop()()


class Postpone(TorchFunctionMode):
    """Puts copies into a list, and gives up pinned memory, which a machine without accelerator has not."""

    def __init__(self, copies: list[Callable[[], object]]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            self._copies.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **kwargs)


def step(state: State) -> None:
    for weight in state.net.parameters():
        weight.grad = torch.ones_like(weight)
    state.descend(1e-2, bad=torch.tensor(False))
    state.step += 1


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_checkpoint_holds_the_state_of_its_moment(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """Although it is copied beside the next step, or written before anything waits for the copy."""
    monkeypatch.setattr(torch, "Stream", LateStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", LateStream)
    state = State.create(tiny, torch.device("cpu"))
    state.to_host = DeviceToHost(DEVICE)
    step(state)
    expected = {name: tensor.clone() for name, tensor in local.tensors(state).items()}
    snapshot = state.snapshot(tiny, {})
    if goes_on:
        step(state)
        assert all(not torch.equal(expected[name], now) for name, now in local.tensors(state).items())
    checkpoint.write(snapshot, tmp_path / "checkpoint")
    local.assert_same(local.stored(tmp_path / "checkpoint"), expected)
