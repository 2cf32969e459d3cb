"""The record of a search: its settings, and the outcome of each trial beside its run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import searches

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Evaluation, file_name
from ddpm.runs import storage
from ddpm.runs.evaluations import Score
from ddpm.runs.run_folder import RunStatus
from ddpm.runs.storage import Location
from ddpm.search import trials
from ddpm.search.trials import Trials, rung_positions
from ddpm.utils.errors import UserError

SETTINGS = {"searcher": "optuna", "rungs": [64, 192], "space": {"optim.lr": {"low": 1e-4}}}
SCORE = Score("KID-pixels", 0.02, 0.001, 100)


@pytest.fixture
def place(root_uri: str) -> Location:
    return storage.resolve(root_uri).child("search")


def measured(images_seen: int, mean: float) -> Evaluation:
    bits = mean + np.linspace(-0.5, 0.5, 21)
    return Evaluation(images_seen, tuple(bits.tolist()), 0.5, 0.25)


def test_a_new_driver_finds_every_trial_and_its_outcome(place: Location) -> None:
    before = searches.begin(place, SETTINGS)
    changes: dict[str, Any] = {"optim.lr": 1e-3, "schedule.kind": "cosine", "model.width_multipliers": [1, 2]}
    before.begin("digits-a", changes)
    before.begin("digits-b", {"optim.lr": 2e-3})
    before.begin("digits-c", {"optim.lr": 1e-3, "train.seed": 1}, repeats="digits-a")
    searches.measure(before, "digits-a", measured(64, 3.0))
    searches.measure(before, "digits-a", measured(192, 2.5))
    assert before.end("digits-a", RunStatus.FINISHED, wall_s=2.5).images_seen == 192
    before.end("digits-b", RunStatus.FAILED, "its process died")
    before.score("digits-a", SCORE)
    place.child("data").child("manifest.json").write(b"{}")  # no trial

    after = searches.begin(place, SETTINGS)
    assert after.file == before.file
    assert after.all() == before.all()
    first, second, third = after.all()
    assert (first.changes, first.status, first.wall_s) == (changes, RunStatus.FINISHED, 2.5)
    assert first.score == SCORE
    assert [evaluation.images_seen for evaluation in first.rungs] == [64, 192]
    assert first.bits_per_dim == pytest.approx(2.5)
    assert (second.status, second.reason, second.rungs) == (RunStatus.FAILED, "its process died", ())
    assert (third.has_ended, third.repeats, third.number) == (False, "digits-a", 2)
    assert after.begin("digits-b", {}) == second  # it has ended, and stays so
    assert after.begin("digits-d", {}).number == 3


def test_a_rung_that_is_reported_again_is_not_new(place: Location) -> None:
    found = searches.begin(place, SETTINGS)
    found.begin("digits-a", {})
    assert [found.reach("digits-a", measured(at, 3.0)) for at in (64, 64, 192, 64)] == [
        True,
        False,
        True,
        False,
    ]
    assert [evaluation.images_seen for evaluation in found.all()[0].rungs] == [64, 192]


def test_another_setting_is_another_search(place: Location) -> None:
    searches.begin(place, SETTINGS)
    with pytest.raises(UserError, match="searcher"):
        searches.begin(place, {**SETTINGS, "searcher": "grid"})


def test_what_does_not_determine_the_trials_is_that_of_the_newest_command(place: Location) -> None:
    first = searches.begin(place, SETTINGS)
    searches.begin(place, SETTINGS, override(DIGITS, {"run.experiment": "other"}), kid="KID-lite0")
    found = Trials(place)
    assert (found.config.run.experiment, found.file.kid) == ("other", "KID-lite0")
    assert found.file.search_key == first.file.search_key


def test_a_folder_without_a_search_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.json"):
        Trials(storage.resolve(str(tmp_path)))
    (tmp_path / "search.json").write_text('{"trials": 3}')
    with pytest.raises(UserError, match="is damaged, or of another version") as raised:
        searches.begin(storage.resolve(str(tmp_path)), SETTINGS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["trial.json", file_name(64)])
def test_a_damaged_file_is_one_line(place: Location, name: str) -> None:
    found = searches.begin(place, SETTINGS)
    found.begin("digits-a", {})
    searches.measure(found, "digits-a", measured(64, 3.0))
    place.child("digits-a").child(name).write(b'{"number": ')
    with pytest.raises(UserError, match=f"digits-a/{name} is damaged") as raised:
        Trials(place)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("total", "factor", "num", "expected"),
    [
        (9 * 128, 3, 3, [128, 384, 1152]),
        (1000, 2, 2, [512, 1024]),
        (128, 3, 3, [128]),
        (6400, 4, 1, [6400]),
    ],
)
def test_rungs_are_multiples_of_the_first(total: int, factor: int, num: int, expected: list[int]) -> None:
    assert rung_positions(total, 128, factor, num) == expected


def test_the_best_are_finished_trials_of_the_search_itself(place: Location) -> None:
    found = searches.begin(place, SETTINGS)
    for name, mean, status, repeats in (
        ("a", 2.5, RunStatus.FINISHED, None),
        ("b", 2.0, RunStatus.FAILED, None),
        ("c", 2.25, RunStatus.FINISHED, None),
        ("d", 1.0, RunStatus.FINISHED, "a"),
    ):
        found.begin(name, {}, repeats)
        searches.measure(found, name, measured(64, mean))
        found.end(name, status)
    assert [trial.name for trial in trials.best(found.all())] == ["c", "a"]
