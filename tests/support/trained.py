"""Checkpoints of a net that was trained a little, and their files altered."""

import json
from pathlib import Path
from typing import Any

import torch

from ddpm.config.tree import Config
from ddpm.runs import checkpoint
from ddpm.training.state import State


def write_trained(folder: Path, config: Config, steps: int = 3, run_key: str = "k") -> Path:
    """Write a checkpoint at `steps` steps, the last of which changed the net, to `folder`."""
    state = State.create(config, torch.device("cpu"))
    sum(p.square().sum() for p in state.net.parameters()).backward()  # type: ignore[union-attr]
    state.descend(config.optim.lr, bad=torch.tensor(False))
    state.step = steps
    state.images_seen = steps * config.train.batch_size
    checkpoint.write(state.snapshot(config, {"run_key": run_key, "data_fingerprint": "f"}), folder)
    return folder


def replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint, and its checksum (unless that is the file itself)."""
    (folder / name).write_bytes(data)
    if name != "checksums.json":
        sums = json.loads((folder / "checksums.json").read_text())
        sums[name] = checkpoint._sha256(folder / name)
        (folder / "checksums.json").write_text(json.dumps(sums))


def alter_json(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """Set keys of a JSON file of a checkpoint; the value ... removes a key."""
    values = json.loads((folder / name).read_text()) | changes
    replace(folder, name, json.dumps({k: v for k, v in values.items() if v is not ...}).encode())
