"""Power cuts at any moment: a checkpoint with its final name is complete, and a committed one is not lost."""

import errno
import itertools
from pathlib import Path

import pytest
import torch
from support.power import Disk

from ddpm.checkpoints import checkpoint, runs
from ddpm.config import Config
from ddpm.storage import locations
from ddpm.training import checkpoint_manager
from ddpm.training.checkpoint_manager import CheckpointManager
from ddpm.training.state import State
from ddpm.utils import files
from ddpm.utils.errors import UserError


def save_two(root: Path, config: Config, committed: list[int]) -> None:
    """Save checkpoints at 32 and 64 images, the second also as the best; then the first is deleted."""
    location = locations.resolve(str(root)).child("runs").child("one")
    state = State.create(config, torch.device("cpu"))
    manager = CheckpointManager(location, 1, 5.0, committed.append, pytest.fail)
    for state.step in (1, 2):
        state.images_seen = 32 * state.step
        snapshot = state.snapshot(config, {"run_key": "a", "data_fingerprint": "b"})
        manager.save(snapshot, b"segment", best=state.step == 2)
    manager.flush()
    manager.close()


def checkpoints(root: Path) -> list[int]:
    """Positions of the checkpoints; checks that each is valid and has its segment in the spool."""
    location, found = locations.resolve(str(root)).child("runs").child("one"), []
    names = [
        *(place.path for place in runs.checkpoints(location)),
        *map(str, Path(location.path).glob("best-*")),
    ]
    for folder in map(Path, names):
        checkpoint.verify(folder)
        seen = checkpoint.position(folder)
        assert (Path(location.path) / f"tracking/{seen:012d}.zip").read_bytes() == b"segment"
        found.append(seen)
    return found


@pytest.mark.parametrize("names_survive", [False, True])
def test_checkpoints_are_complete_after_a_power_cut(
    names_survive: bool, tiny: Config, tmp_path: Path
) -> None:
    root, count, committed = tmp_path / "disk", itertools.count(), list[int]()
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
    sync, failures = files.sync, []

    def fails_once(path: Path) -> None:
        names = {folder.name for folder in (tmp_path / "runs/one").glob("[bc]*-*")}
        if path == tmp_path / "runs/one" and not names <= set(failures):
            failures.extend(names)
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync", fails_once)
    committed = list[int]()
    save_two(tmp_path, tiny, committed)
    assert {"checkpoint-000000000032", "best-000000000064", "checkpoint-000000000064"} == set(failures)
    assert committed == [32, 64] and checkpoints(tmp_path) == [64, 64]


@pytest.mark.parametrize("names_survive", [False, True])
def test_without_fsync_a_checkpoint_would_be_lost(
    names_survive: bool, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync", lambda path: None)
    root, committed = tmp_path / "disk", list[int]()
    root.mkdir()
    with Disk(root, lambda disk: None) as disk:
        save_two(root, tiny, committed)
        left = disk.after_power_cut(tmp_path / "left", names_survive=names_survive)
    assert committed == [32, 64] and checkpoints(root) == [64, 64]
    location = locations.resolve(str(left)).child("runs").child("one")
    if not names_survive:
        assert runs.checkpoints(location) == []
        return
    with (
        pytest.raises(UserError, match=r"every checkpoint of .* is damaged"),
        checkpoint_manager.latest_valid(location, 5.0, lambda line: None),
    ):
        pass
