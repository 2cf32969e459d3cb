"""The power may fail at any moment: a checkpoint that has its name is whole, and one that was reported stays."""

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
    """Store checkpoints at 32 and 64 images, the second as the best, too; the first goes when the second is there."""
    location = locations.resolve(str(root)).child("runs").child("one")
    state = State.create(config, torch.device("cpu"))
    its = CheckpointManager(location, 1, 5.0, committed.append, pytest.fail)
    for state.step in (1, 2):
        state.images_seen = 32 * state.step
        snapshot = state.snapshot(config, {"run_key": "a", "data_fingerprint": "b"})
        its.save(snapshot, b"segment", best=state.step == 2)
    its.flush()
    its.close()


def checkpoints(root: Path) -> list[int]:
    """Positions of the checkpoints, which must be whole, and of which what was tracked must be there."""
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
def test_what_has_a_name_is_whole_at_every_moment(names_survive: bool, tiny: Config, tmp_path: Path) -> None:
    root, count, committed = tmp_path / "disk", itertools.count(), list[int]()
    root.mkdir()

    def power_fails(disk: Disk) -> None:
        safe = max(committed, default=0)
        left = disk.after_power_cut(tmp_path / f"left-{next(count)}", names_survive=names_survive)
        assert max(checkpoints(left), default=0) >= safe

    with Disk(root, power_fails) as disk:
        save_two(root, tiny, committed)
        assert committed == [32, 64]
        left = disk.after_power_cut(tmp_path / "left", names_survive=names_survive)
    assert max(checkpoints(left)) == 64 and next(count) > 30


def test_a_name_that_is_not_on_disk_at_once_is_synced_again(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failures = files.sync, []

    def fails_at_first(path: Path) -> None:
        names = {folder.name for folder in (tmp_path / "runs/one").glob("[bc]*-*")}
        if path == tmp_path / "runs/one" and not names <= set(failures):
            failures.extend(names)
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(files, "sync", fails_at_first)
    committed = list[int]()
    save_two(tmp_path, tiny, committed)
    assert {"checkpoint-000000000032", "best-000000000064", "checkpoint-000000000064"} == set(failures)
    assert committed == [32, 64] and checkpoints(tmp_path) == [64, 64]


@pytest.mark.parametrize("names_survive", [False, True])
def test_without_fsync_it_would_be_lost(
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
