"""Setups that are rejected before anything starts, and whether the reasons in the error messages are true."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm.cli import search
from ddpm.cluster import ray_init, resources
from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.evaluation.feature_scores import MAX_PAIRWISE
from ddpm.search import driver, setup
from ddpm.search.config import Arguments
from ddpm.utils.errors import UserError

LR = ("optim.lr=log(1e-4,1e-2)",)


def prepared(**changes: Any) -> setup.Setup:
    flat = {key: changes.pop(key) for key in list(changes) if "." in key}
    config = override(DIGITS, {"train.total_images": 9 * 128, **flat})
    return setup.prepare(replace(Arguments("digits", config), **changes))


def test_trials_are_compared_at_equal_images_seen(tmp_path: Path) -> None:
    found = prepared(space=LR, name="s", storage=str(tmp_path))
    assert found.rungs.at == (128, 384, 1152)
    assert found.base.train.checkpoint_every_images == 128
    assert found.base.train.keep_checkpoints == 9  # jobs/evaluate.py can evaluate every rung
    assert found.folder.uri == found.base.run.storage == str(tmp_path / "s")
    assert prepared(space=LR, num_rungs=1).rungs.at == (1152,)
    determining = set(found.file.settings["config"])
    assert not {"run", "cluster", "sample"} & {key.partition(".")[0] for key in determining}
    assert {"train.init_from", "optim.lr"} <= determining and "train.log_every_images" not in determining
    assert found.file.settings["rungs"] == [128, 384, 1152]


def test_kid_is_of_the_images_that_it_compares(tmp_path: Path) -> None:
    found = prepared(space=LR, storage=str(tmp_path), drawn_images=20_000, features="pixels")
    assert (found.file.kid, found.file.kid_images) == ("KID-pixels", MAX_PAIRWISE)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"run.name": "mine"}, "name the search with --name"),
    "name of a folder": ({"name": "a/b"}, "cannot be a folder's name"),
    "process": ({"objective.process": "uniform_mix"}, "has no bits/dim to search by"),
    "space": ({"space": ("optim.lr=2",) * 2}, "has optim.lr twice"),
    "grid": ({"searcher": "grid"}, "--searcher grid needs values of optim.lr"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=list(BAD))
def test_user_errors_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        prepared(**{"space": LR, **changes})
    assert message in str(raised.value) and "\n" not in str(raised.value)


class AllChecked(Exception):
    """All checks have passed: the search would begin."""


def run_search(*flags: str) -> int:
    """Run python tune/search.py digits --name s ... until it would begin, on a cluster of two CPUs."""

    def begin(*args: Any) -> None:
        raise AllChecked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_init, "connect", lambda verbose: None)
        patch.setattr(ray_init, "resources", lambda: {"CPU": 2.0})
        patch.setattr(resources, "check_storage", lambda config: None)
        patch.setattr(driver, "Pusher", begin)
        threads = "--cluster.threads-per-worker", "1"
        patch.setattr(sys, "argv", ["search.py", "digits", "--name", "s", *threads, *flags])
        return search.main()


def test_a_damaged_search_is_refused_before_a_cluster_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_init, "connect", lambda verbose: pytest.fail("a cluster was joined"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s/search.json").write_text('{"trials": 3}')
    found = prepared(space=LR, name="s", storage=str(tmp_path))
    with pytest.raises(UserError, match="is damaged, or of another version"):
        driver.run_search(found.arguments)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["search.json"]


def test_a_too_small_cluster_is_an_error_before_the_search_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 trials.*--max-concurrent"):
        run_search("--cluster.cpus-per-worker", "1.5")
    assert not (tmp_path / "runs/s/search.json").exists()
    with pytest.raises(AllChecked):
        run_search("--seed", "1")
    assert (tmp_path / "runs/s/search.json").exists()
