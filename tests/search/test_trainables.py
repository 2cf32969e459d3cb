"""A trial of several workers: what it reports when another process trains an equal proposal."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Evaluation, Rungs, file_name
from ddpm.runs import storage
from ddpm.runs.lock import DriverLock
from ddpm.runs.run_folder import RunFolder, Search
from ddpm.search import trainables
from ddpm.search.trainables import FAILED, IMAGES_SEEN, VALUE, GroupTrial, Spec
from ddpm.search.trials import Outcome, Trials

RUNGS = (64, 192)


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    """A search with a trial."""
    trials = Trials(storage.resolve(str(tmp_path)), {})
    trials.begin("one", {})
    return trials


@pytest.fixture
def trial(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> GroupTrial:
    """An equal proposal of it, which must not be trained."""
    run = RunFolder("one", trials.folder.child("one"), "key")
    monkeypatch.setattr(trainables, "open_trial", lambda config, spec: run)
    monkeypatch.setattr(trainables, "fit", lambda *args, **named: pytest.fail("it is trained twice"))
    evaluator: Any = SimpleNamespace(train=None)
    spec = Spec(
        config=DIGITS,
        preset="digits",
        base=DIGITS,
        rungs=Rungs(RUNGS, evaluator),
        search=Search("s", "k"),
        verbose=False,
    )
    trial = GroupTrial.__new__(GroupTrial)  # Tune's own constructor starts a session
    trial.setup({}, spec)
    return trial


@pytest.fixture
def first(trials: Trials) -> DriverLock:
    """What the process that trains the first proposal holds."""
    return DriverLock(trials.folder.child("one"), "run", "--run.name", print)


def write_rung(trials: Trials, images_seen: int) -> None:
    evaluation = Evaluation(images_seen, (2.0, 3.0) * 10, 0.5, 0.25)
    trials.folder.child("one").child(file_name(images_seen)).write(evaluation.to_json())


@pytest.mark.parametrize(("outcome", "value"), [("stopped", 2.0), ("failed", None)])
def test_an_equal_proposal_reports_the_results_of_the_first(
    trial: GroupTrial, trials: Trials, first: DriverLock, outcome: Outcome, value: float | None
) -> None:
    with first, ThreadPoolExecutor(1) as pool:
        write_rung(trials, 64)
        assert trial.step() == {IMAGES_SEEN: 64, VALUE: 2.0, "done": False}
        waiting = pool.submit(trial.step)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        trials.end("one", outcome, "it broke" if outcome == "failed" else "")
        last = waiting.result()
        trial.cleanup()
    assert last["done"]
    assert (FAILED in last) == (value is None)
    if value is not None:
        assert last == {IMAGES_SEEN: 64, VALUE: value, "done": True}


def test_an_equal_proposal_that_is_stopped_does_not_wait_for_the_first(
    trial: GroupTrial, trials: Trials, first: DriverLock
) -> None:
    with first, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(trial.step)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        trial.cleanup()
        assert waiting.result()["done"]
