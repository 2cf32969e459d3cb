"""Checkpoints of a net that was trained a little, and such with valid checksums and wrong content."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.training.state import State


def write_trained(folder: Path, config: Config, steps: int = 3, run_key: str = "k") -> Path:
    """Write a checkpoint at `steps` steps, the last of which changed the net, to `folder`."""
    state = State.create(config, torch.device("cpu"))
    sum(p.square().sum() for p in state.net.parameters()).backward()  # type: ignore[union-attr]
    state.descend(config.optim.lr, bad=torch.tensor(False))
    state.step, state.images_seen = steps, steps * config.train.batch_size
    checkpoint.write(state.snapshot(config, {"run_key": run_key, "data_fingerprint": "f"}), folder)
    return folder


def forge(folder: Path, name: str, data: bytes) -> None:
    """Write `data` to a file of a checkpoint, and update checksums.json (unless that is the file itself)."""
    (folder / name).write_bytes(data)
    if name != "checksums.json":
        update_checksum(folder, name)


def forge_json(folder: Path, name: str, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file of a checkpoint; the value ... removes a key."""
    values = json.loads((folder / name).read_text()) | changes
    forge(folder, name, json.dumps({k: v for k, v in values.items() if v is not ...}).encode())


def forge_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a file of a checkpoint."""
    save_file(change(load_file(folder / name)), folder / name)
    update_checksum(folder, name)


def update_checksum(folder: Path, name: str) -> None:
    sums = json.loads((folder / "checksums.json").read_text())
    sums[name] = checkpoint._sha256(folder / name)
    (folder / "checksums.json").write_text(json.dumps(sums))
