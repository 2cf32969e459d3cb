"""What a trial reports to Tune, also after its process or its driver was killed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.evaluation import rung
from ddpm.evaluation.rung import Evaluation, Evaluator, Rungs
from ddpm.runs import run_folder
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import RunFolder, RunStatus, Search
from ddpm.search import trainables
from ddpm.search.trainables import EVALUATION, FAILED, IMAGES_SEEN, NAME, VALUE, GroupTrial, Spec
from ddpm.utils.errors import UserError

RUNGS = (64, 192)


@pytest.fixture
def spec(tiny: Config, train_set: DataSet, tmp_path: Path) -> Spec:
    """A search of short trials."""
    changes = {
        "train.total_images": RUNGS[-1],
        "train.checkpoint_every_images": RUNGS[0],
        "train.keep_checkpoints": 3,
        "run.storage": str(tmp_path / "search"),
    }
    held_out = train_set.held_out()
    assert held_out is not None
    evaluator = Evaluator(train_set, held_out, num_images=20, num_draws=2)
    return Spec(
        config=override(tiny, changes),
        preset="digits",
        base=tiny,
        rungs=Rungs(RUNGS, evaluator),
        search=Search("search", "5" * 32),
        verbose=False,
    )


@pytest.fixture
def proposal(spec: Spec) -> dict[str, Any]:
    return spec.proposal({"optim.lr": 1e-3})


@pytest.fixture
def run(spec: Spec, proposal: dict[str, Any]) -> RunFolder:
    """The run of a trial, as the driver creates it."""
    return spec.open_run(proposal)


class Stopped(Exception):
    """Tune has stopped the trial."""


@pytest.fixture
def train(
    spec: Spec, proposal: dict[str, Any], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[dict[str, Any]]]:
    """Train the trial, which has one worker, as Tune does; returns what it reported."""

    def train() -> list[dict[str, Any]]:
        reported: list[dict[str, Any]] = []
        monkeypatch.setattr(trainables.tune, "report", reported.append)
        trainables.train_trial(proposal, spec)
        return reported

    return train


def record_rung(run: RunFolder, images_seen: int) -> Evaluation:
    """Write a rung that the trial has measured."""
    evaluation = Evaluation(images_seen, (2.0, 3.0) * 10, 0.5, 0.25)
    run.location.child(rung.file_name(images_seen)).write(evaluation.to_json())
    return evaluation


def test_the_run_of_a_trial_is_named_by_its_changes_and_knows_its_search(
    spec: Spec, proposal: dict[str, Any], run: RunFolder
) -> None:
    card = run_folder.read_card(run.location)
    assert (run.name, card.search, card.command) == (proposal[NAME], spec.search, "")
    assert card.changed == {"optim.lr": 1e-3, "train.total_images": RUNGS[-1]}
    assert spec.config_of(proposal).run.name == run.name
    assert spec.proposal({"optim.lr": 2e-3})[NAME] != run.name


def test_a_trial_reports_everything_that_its_loop_has_measured(
    train: Callable[[], list[dict[str, Any]]], run: RunFolder
) -> None:
    reported = train()
    assert [found[IMAGES_SEEN] for found in reported] == list(RUNGS)
    for found in reported:
        measured = rung.read(run.location, found[IMAGES_SEEN])
        assert (found[EVALUATION], found[VALUE]) == (measured, measured.bits_per_dim.value)


def test_a_trial_whose_last_checkpoint_is_missing_is_trained_to_its_end(
    train: Callable[[], list[dict[str, Any]]], run: RunFolder
) -> None:
    """Its process was killed after it had measured the last rung."""
    train()
    stored = run_folder.checkpoints(run.location)
    stored[-1].delete()
    assert [found[IMAGES_SEEN] for found in train()] == [RUNGS[0], RUNGS[1], RUNGS[1]]
    assert len(run_folder.checkpoints(run.location)) == len(stored)


def test_a_user_s_mistake_is_reported_and_not_raised(
    spec: Spec, proposal: dict[str, Any], train: Callable[[], list[dict[str, Any]]], run: RunFolder
) -> None:
    run.location.child(run_folder.CARD).write(b"{")
    (found,) = train()
    assert "run.json" in found[FAILED]


class Fitted:
    """Stands in for `fit`, which starts a cluster's workers: records that it was called, and ends as it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.then: Callable[[], object] = lambda: None

    def __call__(self, *args: Any, **named: Any) -> None:
        self.calls += 1
        self.then()


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    fitted = Fitted()
    monkeypatch.setattr(trainables, "fit", fitted)
    return fitted


@pytest.fixture
def group_trial(spec: Spec, proposal: dict[str, Any], run: RunFolder, fitted: Fitted) -> GroupTrial:
    """A trial of several workers."""
    cluster = replace(spec.config.cluster, num_workers=2)
    trial = GroupTrial.__new__(GroupTrial)  # Tune's own constructor starts a session
    trial.setup(proposal, replace(spec, config=replace(spec.config, cluster=cluster)))
    return trial


def test_a_trial_of_several_workers_first_reports_its_stored_rungs(
    group_trial: GroupTrial, run: RunFolder, fitted: Fitted
) -> None:
    """Then it trains; the last rung is reported once training has ended, which stores its checkpoint."""
    stored = record_rung(run, RUNGS[0])
    assert group_trial.step() == {**trainables.result(stored), "done": False}
    assert fitted.calls == 0
    fitted.then = lambda: record_rung(run, RUNGS[1])
    assert group_trial.step()["done"]
    assert fitted.calls == 1


def test_a_trial_of_several_workers_whose_last_checkpoint_may_be_missing_is_trained_to_its_end(
    group_trial: GroupTrial, run: RunFolder, fitted: Fitted
) -> None:
    for at in RUNGS:
        record_rung(run, at)
    assert [group_trial.step()["done"] for _ in RUNGS] == [False, True]
    assert fitted.calls == 1


def test_an_error_of_training_is_a_failure_or_is_raised(
    group_trial: GroupTrial, run: RunFolder, fitted: Fitted
) -> None:
    def fail() -> None:
        raise UserError("it broke")

    fitted.then = fail
    failed = group_trial.step()
    assert (failed[FAILED], failed["done"]) == ("it broke", True)
    group_trial._error = OSError("the worker's disk is full")
    with pytest.raises(OSError, match="disk"):
        group_trial.step()
    group_trial._error = None
    with pytest.raises(RuntimeError, match="before its last rung"):
        group_trial.step()


def test_a_stopped_trial_does_not_wait_for_the_process_of_a_killed_driver(
    group_trial: GroupTrial, run: RunFolder, fitted: Fitted
) -> None:
    with (
        DriverLock(run.location, "run", "--run.name", print),
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(group_trial.step)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        group_trial.cleanup()
        assert waiting.result()["done"]
    assert fitted.calls == 0


def test_a_trial_that_is_stopped_has_its_checkpoint(
    spec: Spec, proposal: dict[str, Any], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(found: dict[str, Any]) -> None:
        raise Stopped

    monkeypatch.setattr(trainables.tune, "report", stop)
    with pytest.raises(Stopped):
        trainables.train_trial(proposal, spec)
    assert [rung.recorded_at(run.location), len(run_folder.checkpoints(run.location))] == [[RUNGS[0]], 1]
    status = run_folder.read_status(run.location)
    assert status is not None and status.status == RunStatus.RUNNING  # the driver writes how it ended
