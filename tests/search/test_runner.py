"""A running trial: what it reports and when; training is faked."""

import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import evaluated

from ddpm import config_io
from ddpm.checkpoints import runs
from ddpm.checkpoints.checkpoint import name_at
from ddpm.cluster import resources
from ddpm.config import Config
from ddpm.data.ray_dataset import open_configured
from ddpm.data.reading import DataSet
from ddpm.search import runner
from ddpm.search.evaluator import RUNGS_FOLDER, Evaluator
from ddpm.search.event_log import Rung
from ddpm.search.runner import News, Spec, Trained, TrialRunner
from ddpm.training import run_state
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Progress

RUNGS = [64, 192]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return Path(evaluated.make_run(folder, evaluated.make_data(folder / "data")).location.path)


class FakeTraining:
    """A fake `fit` that copies finished checkpoints, as the test requests them."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self._trained = trained
        self.config: Config = config_io.override(
            evaluated.CONFIG, {"run.storage": str(folder), "data.shards": str(trained.parent / "data")}
        )
        self.data: DataSet = open_configured(self.config)
        self.to_come = queue.Queue[Any]()
        """Items: images_seen of the next checkpoint; an error to raise; None, which ends training."""
        self.fits, self.delivers = 0, threading.Event()
        self.reports = queue.Queue[News]()

    def fit(
        self,
        given: Config,
        data: DataSet,
        *,
        should_continue: Callable[[Any], bool],
        trained: Any,
        **rest: Any,
    ) -> None:
        self.fits += 1
        run = runs.open_run(str(given.run.name), given.run.storage)
        while True:
            try:
                step = self.to_come.get(timeout=0.02)
            except queue.Empty:
                if should_continue({}):
                    continue
                step = None
            if step is None:
                break
            if isinstance(step, BaseException):
                raise step
            place = Path(run.location.path) / name_at(step)
            shutil.copytree(self._trained / name_at(step), place.with_suffix(".part"))
            place.with_suffix(".part").rename(place)  # atomic: the folder is complete when it appears
            should_continue({run_state.PROGRESS: Progress(step, 192, 1.0, 0.5)})
        trained()
        assert self.delivers.wait(600)  # MLflow delivery may take long

    def start(self) -> TrialRunner:
        held_out = self.data.held_out()
        assert held_out is not None
        evaluator, group = Evaluator(self.data, held_out, 40, num_draws=2), SimpleNamespace()
        spec = Spec(self.config, RUNGS, evaluator, {}, None, False, None)
        return TrialRunner(self.config, spec, group, self.reports.put)  # type: ignore[arg-type]

    def next(self) -> News:
        return self.reports.get(timeout=600)


@pytest.fixture
def training(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    made = FakeTraining(trained, tmp_path / "runs")
    monkeypatch.setattr(runner, "fit", made.fit)
    monkeypatch.setattr(runner, "POLL_INTERVAL_S", 0.02)
    return made


def test_the_last_result_arrives_after_the_workers_are_released(training: FakeTraining) -> None:
    trial = training.start()
    training.to_come.put(64)
    first = training.next()
    assert isinstance(first, Rung) and first.images_seen == 64
    assert training.reports.empty()  # training continues
    for step in (192, None):
        training.to_come.put(step)
    over = training.next()
    assert isinstance(over, Trained) and over.training_s > 0
    last = training.next()
    assert isinstance(last, Rung) and (last.images_seen, last.training_s) == (192, over.training_s)
    assert trial._training is not None and trial._training.is_alive()  # it is still delivering to MLflow
    trial.leave()  # another trial gets the workers at once
    training.delivers.set()


def test_evaluated_checkpoints_are_not_evaluated_again(
    training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.delivers.set()
    for step in (64, 192, None):
        training.to_come.put(step)
    first = training.start()
    found = [news for news in (training.next() for _ in range(3)) if isinstance(news, Rung)]
    assert first._training is not None
    monkeypatch.setattr(Evaluator, "evaluate", lambda *args: pytest.fail("the evaluator was asked"))
    training.start()
    again = [training.next() for _ in range(3)]
    assert [type(news) for news in again] == [Rung, Trained, Rung] and training.fits == 1
    assert [vars(rung) | {"training_s": 0.0} for rung in found] == [vars(rung) for rung in again[::2]]


def test_a_resumed_trial_only_waits_for_missing_checkpoints(training: FakeTraining) -> None:
    training.delivers.set()
    training.to_come.put(64)
    killed = training.start()
    assert isinstance(training.next(), Rung)
    killed.leave()
    assert training.reports.empty()  # a trial that has left reports nothing
    training.start()
    known = training.next()
    assert isinstance(known, Rung) and known.images_seen == 64
    for step in (192, None):
        training.to_come.put(step)
    assert [type(training.next()) for _ in range(2)] == [Trained, Rung] and training.fits == 2


@pytest.mark.parametrize("error", [UserError("the loss is not finite"), RuntimeError("of ours")])
def test_an_error_is_reported_once(training: FakeTraining, error: BaseException) -> None:
    training.to_come.put(64)
    training.start()
    assert isinstance(training.next(), Rung)
    training.to_come.put(error)
    assert training.next() is error and training.reports.empty()


def test_a_deleted_checkpoint_is_a_user_error(training: FakeTraining) -> None:
    training.delivers.set()
    training.to_come.put(None)
    training.start()
    assert isinstance(training.next(), Trained)
    error = training.next()
    assert isinstance(error, UserError) and "does not exist, though training is over" in str(error)


def test_resources_of_a_killed_driver_are_released(
    training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(resources, "remove_placement_group", freed.append)
    training.delivers.set()
    folder = Path(training.config.run.storage, str(training.config.run.name))
    folder.mkdir(parents=True)
    (folder / runner.PLACEMENT_GROUP).write_text("0f")
    for step in (64, 192, None):
        training.to_come.put(step)
    training.start()
    assert sorted(type(training.next()).__name__ for _ in range(3)) == ["Rung", "Rung", "Trained"]
    assert freed == ["0f"]
    assert sorted(path.name for path in (folder / RUNGS_FOLDER).iterdir()) == [
        "000000000064.json",
        "000000000192.json",
    ]
