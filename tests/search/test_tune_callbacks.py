"""What the driver of a search does when trials begin, report and end, and when it is interrupted."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import searches

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.data.reading import DataSet
from ddpm.evaluation.rung import Evaluation, Evaluator, Rungs
from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunStatus, Search, Status
from ddpm.search.trainables import IMAGES_SEEN, NAME, Spec, failure, result
from ddpm.search.trials import Trials, read_trial
from ddpm.search.tune_callbacks import Interruption, Outcomes, Scoreboard
from ddpm.tracking.pusher import NoPusher
from ddpm.utils.errors import UserError

RUNGS = (64, 192)


def test_a_signal_stops_all_trials_and_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(lambda: False) as interruption:
        assert not interruption.stop_all()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.stop_all() and interruption.stop_all()
        assert not interruption("a trial", {})  # no trial is stopped on its own
    assert interruption.signal == signal.SIGTERM
    assert capsys.readouterr().err.count("SIGTERM") == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_lost_lock_stops_all_trials(capsys: pytest.CaptureFixture[str]) -> None:
    lost = list[bool]()
    with Interruption(lambda: bool(lost)) as interruption:
        assert not interruption.stop_all()
        lost.append(True)
        assert interruption.stop_all()
    assert interruption.signal is None
    assert capsys.readouterr().err == ""


@pytest.fixture
def spec(train_set: DataSet, tmp_path: Path) -> Spec:
    config = override(DIGITS, {"run.storage": str(tmp_path / "search")})
    held_out = train_set.held_out()
    assert held_out is not None
    rungs = Rungs(RUNGS, Evaluator(train_set, held_out, num_images=20))
    return Spec(config, "digits", DIGITS, rungs, Search("search", "k"), verbose=False)


@pytest.fixture
def trials(spec: Spec) -> Trials:
    return searches.begin(storage.resolve(spec.config.run.storage))


def outcomes_of(trials: Trials, spec: Spec, is_interrupted: bool = False) -> Outcomes:
    scoreboard = Scoreboard(trials.all, 1)
    return Outcomes(trials, spec, NoPusher(), Interruption(lambda: is_interrupted), scoreboard)


def run_trial(outcomes: Outcomes, spec: Spec, *results: dict[str, Any]) -> str:
    """What Tune calls for a trial with these results, whose process has written its status; returns its name."""
    proposal = spec.proposal({"optim.lr": 1e-2})
    trial: Any = SimpleNamespace(config=proposal, last_result={})
    outcomes.on_trial_start(0, [], trial)
    run = spec.open_run(proposal)
    run_folder.write_status(run.location, Status(RunStatus.RUNNING, 64, 0, 0.5))
    for found in results:
        trial.last_result = found
        outcomes.on_trial_result(0, [], trial, found)
    outcomes.on_trial_complete(0, [], trial)
    return str(proposal[NAME])


def measured(images_seen: int) -> dict[str, Any]:
    return result(Evaluation(images_seen, (2.0, 9.0, 3.0, 9.0), 0.5, 0.25))


@pytest.mark.parametrize(
    ("results", "status", "reason"),
    [
        ([measured(64)], RunStatus.PRUNED, ""),
        ([measured(64), measured(192)], RunStatus.FINISHED, ""),
        ([failure(UserError("it broke"))], RunStatus.FAILED, "it broke"),
    ],
)
def test_how_a_trial_ended_is_in_both_of_its_files(
    trials: Trials, spec: Spec, results: list[dict[str, Any]], status: RunStatus, reason: str
) -> None:
    """From what it reported alone: nothing that it has stored is read."""
    name = run_trial(outcomes_of(trials, spec), spec, *results)
    (found,) = trials.all()
    assert [evaluation.images_seen for evaluation in found.rungs] == [
        of_rung[IMAGES_SEEN] for of_rung in results if of_rung[IMAGES_SEEN]
    ]
    folder = trials.folder.child(name)
    stored = read_trial(folder)
    of_run = run_folder.read_status(folder)
    assert stored is not None and of_run is not None
    assert (stored.status, stored.reason) == (status, reason)
    assert (of_run.status, of_run.images_seen, of_run.ended_ms is None) == (status, 64, False)


def test_a_trial_that_an_interruption_stops_has_not_ended(trials: Trials, spec: Spec) -> None:
    name = run_trial(outcomes_of(trials, spec, is_interrupted=True), spec, measured(64))
    (found,) = trials.all()
    of_run = run_folder.read_status(trials.folder.child(name))
    assert not found.has_ended and of_run is not None and of_run.status == RunStatus.RUNNING


def test_a_trial_whose_process_cannot_start_has_failed(trials: Trials, spec: Spec) -> None:
    trial: Any = SimpleNamespace(config=spec.proposal({"optim.lr": 1e-2}), last_result={})
    outcomes_of(trials, spec).on_trial_error(0, [], trial)
    (found,) = trials.all()
    of_run = run_folder.read_status(trials.folder.child(found.name))
    assert (found.status, of_run and of_run.status) == (RunStatus.FAILED, RunStatus.FAILED)


def test_each_rung_is_shown_once(trials: Trials, spec: Spec, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial whose process was killed reports its rungs again."""
    run_trial(outcomes_of(trials, spec), spec, measured(64), measured(64), measured(192))
    out = capsys.readouterr().out
    assert [out.count(f"after {at} images: 2.5000 ± 0.5000 bits/dim") for at in RUNGS] == [1, 1]
