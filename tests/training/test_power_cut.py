"""Power cuts at any moment: a checkpoint with its final name is complete, and a committed one is not lost."""

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.local import finished
from support.power import Disk

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import checkpoint, curves, run_folder, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training import run_state
from ddpm.training.state import State
from ddpm.training.store import RunStore
from ddpm.utils import files
from ddpm.utils.errors import UserError


def save_two(root: Path, config: Config, committed: list[int]) -> None:
    """Save checkpoints at 32 and 64 images, the second also as the best; then the first is deleted, and the curves are
    merged."""

    def notify(subject: str, value: Any) -> None:
        assert subject != run_state.WARNINGS, value
        if subject == run_state.COMMITTED:
            committed.append(value)

    run = RunFolder("one", storage.resolve(str(root)).child("runs").child("one"), "a")
    state = State.create(config, torch.device("cpu"))
    changes = {"train.keep_checkpoints": 1, "train.total_images": 64, "run.storage_timeout_s": 300.0}
    config = override(config, changes)
    with finished(RunStore(config, run, "b", notify)) as store, store.latest_checkpoint():
        for state.step in (1, 2):
            state.images_seen = 32 * state.step
            store.metrics({"train/loss": 0.5}, state.images_seen)
            store.save(state, best=state.step == 2)


def checkpoints(root: Path) -> list[int]:
    """Positions of the checkpoints; checks that each is valid, and has its part of the curves."""
    location = storage.resolve(str(root)).child("runs").child("one")
    found = []
    names = [
        *(folder.path for folder in run_folder.checkpoints(location)),
        *map(str, Path(location.path).glob("best-*")),
    ]
    for folder in map(Path, names):
        checkpoint.verify(folder)
        seen = checkpoint.images_seen_at(folder)
        points = [(point.images_seen, point.value) for point in curves.read(location)["train/loss"]]
        assert points[: seen // 32] == [(at, 0.5) for at in range(32, seen + 1, 32)]
        found.append(seen)
    return found


@pytest.mark.parametrize("names_survive", [False, True])
def test_checkpoints_are_complete_after_a_power_cut(
    names_survive: bool, tiny: Config, tmp_path: Path
) -> None:
    root = tmp_path / "disk"
    count = itertools.count()
    committed = list[int]()
    root.mkdir()

    def cut_power(disk: Disk) -> None:
        safe = max(committed, default=0)
        left = disk.after_power_cut(tmp_path / f"left-{next(count)}", names_survive=names_survive)
        assert max(checkpoints(left), default=0) >= safe

    with Disk(root, cut_power) as disk:
        save_two(root, tiny, committed)
        assert committed == [32, 64]
        left = disk.after_power_cut(tmp_path / "left", names_survive=names_survive)
    assert max(checkpoints(left)) == 64 and next(count) > 30


def test_a_failed_folder_sync_is_retried(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = files.sync
    failures = []

    def fails_once(path: Path) -> None:
        names = {folder.name for folder in (tmp_path / "runs/one").glob("[bc]*-*")}
        if path == tmp_path / "runs/one" and not names <= set(failures):
            failures.extend(names)
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync", fails_once)
    committed = list[int]()
    save_two(tmp_path, tiny, committed)
    assert {"checkpoint-000000000032-g1", "best-000000000064-g1", "checkpoint-000000000064-g1"} == set(
        failures
    )
    assert committed == [32, 64] and checkpoints(tmp_path) == [64, 64]


def test_without_fsync_a_checkpoint_would_be_lost(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync", lambda path: None)
    root = tmp_path / "disk"
    committed = list[int]()
    root.mkdir()
    with Disk(root, lambda disk: None) as disk:
        save_two(root, tiny, committed)
        unnamed = disk.after_power_cut(tmp_path / "unnamed", names_survive=False)
        empty = disk.after_power_cut(tmp_path / "empty", names_survive=True)
    assert committed == [32, 64] and checkpoints(root) == [64, 64] and checkpoints(unnamed) == []
    with pytest.raises(UserError, match="is damaged"):
        checkpoints(empty)
