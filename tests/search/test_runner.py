"""A trial under way: what is told of it, and when; training is arithmetic here."""

import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import judged

from ddpm import config
from ddpm.checkpoints import runs
from ddpm.checkpoints.checkpoint import name_at
from ddpm.cluster import resources
from ddpm.config import Config
from ddpm.data.ray_dataset import open_configured
from ddpm.data.reading import DataSet
from ddpm.search import runner
from ddpm.search.evaluator import Evaluator
from ddpm.search.event_log import Rung
from ddpm.search.runner import JUDGED, News, Spec, Trained, TrialRunner
from ddpm.training import run_state
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Progress

RUNGS = [64, 192]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    return Path(judged.make_run(folder, judged.make_data(folder / "data")).location.path)


class Stage:
    """In the place of `fit`: copies checkpoints, as many as it is let."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self._trained = trained
        self.config: Config = config.override(
            judged.CONFIG,
            {"run.storage": str(folder), "data.shards": str(trained.parent / "data")},
        )
        self.data: DataSet = open_configured(self.config)
        self.to_come = queue.Queue[Any]()
        """images_seen of checkpoints; an error to raise; None: training ends."""
        self.fits, self.delivers = 0, threading.Event()
        self.told = queue.Queue[News]()

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
            place.with_suffix(".part").rename(place)  # it is whole as soon as it is there
            should_continue({run_state.PROGRESS: Progress(step, 192, 1.0, 0.5)})
        trained()
        assert self.delivers.wait(280)  # MLflow takes its time

    def attempt(self) -> TrialRunner:
        held_out = self.data.held_out()
        assert held_out is not None
        evaluator, group = Evaluator(self.data, held_out, 40, num_draws=2), SimpleNamespace()
        spec = Spec(self.config, self.data, RUNGS, evaluator, {}, None, False, None)
        return TrialRunner(self.config, spec, group, self.told.put)  # type: ignore[arg-type]

    def next(self) -> News:
        return self.told.get(timeout=280)


@pytest.fixture
def stage(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(trained, tmp_path / "runs")
    monkeypatch.setattr(runner, "fit", made.fit)
    monkeypatch.setattr(runner, "POLL_INTERVAL_S", 0.02)
    return made


def test_the_last_result_comes_when_the_workers_are_free_already(stage: Stage) -> None:
    trial = stage.attempt()
    stage.to_come.put(64)
    first = stage.next()
    assert isinstance(first, Rung) and first.images_seen == 64
    assert stage.told.empty()  # training goes on
    for step in (192, None):
        stage.to_come.put(step)
    over = stage.next()
    assert isinstance(over, Trained) and over.training_s > 0
    last = stage.next()
    assert isinstance(last, Rung) and (last.images_seen, last.training_s) == (192, over.training_s)
    assert trial._training is not None and trial._training.is_alive()  # it still delivers to MLflow
    trial.leave()  # the workers are for another trial, at once
    stage.delivers.set()


def test_what_was_judged_is_not_judged_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.delivers.set()
    for step in (64, 192, None):
        stage.to_come.put(step)
    first = stage.attempt()
    found = [news for news in (stage.next() for _ in range(3)) if isinstance(news, Rung)]
    assert first._training is not None
    monkeypatch.setattr(Evaluator, "judge", lambda *args: pytest.fail("the evaluator was asked"))
    stage.attempt()
    again = [stage.next() for _ in range(3)]
    assert [type(news) for news in again] == [Rung, Trained, Rung] and stage.fits == 1
    assert [vars(rung) | {"training_s": 0.0} for rung in found] == [vars(rung) for rung in again[::2]]


def test_who_should_continue_waits_for_what_is_missing_alone(stage: Stage) -> None:
    stage.delivers.set()
    stage.to_come.put(64)
    killed = stage.attempt()
    assert isinstance(stage.next(), Rung)
    killed.leave()
    assert stage.told.empty()  # of one that left nothing is told
    stage.attempt()
    known = stage.next()
    assert isinstance(known, Rung) and known.images_seen == 64
    for step in (192, None):
        stage.to_come.put(step)
    assert [type(stage.next()) for _ in range(2)] == [Trained, Rung] and stage.fits == 2


@pytest.mark.parametrize("error", [UserError("the loss is not finite"), RuntimeError("of ours")])
def test_what_goes_wrong_is_told_once(stage: Stage, error: BaseException) -> None:
    stage.to_come.put(64)
    stage.attempt()
    assert isinstance(stage.next(), Rung)
    stage.to_come.put(error)
    assert stage.next() is error and stage.told.empty()


def test_a_checkpoint_that_somebody_deleted_is_a_line(stage: Stage) -> None:
    stage.delivers.set()
    stage.to_come.put(None)
    stage.attempt()
    assert isinstance(stage.next(), Trained)
    error = stage.next()
    assert isinstance(error, UserError) and "does not exist, though training is over" in str(error)


def test_what_a_killed_driver_held_is_given_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(resources, "free", freed.append)
    stage.delivers.set()
    folder = Path(stage.config.run.storage, str(stage.config.run.name))
    folder.mkdir(parents=True)
    (folder / runner.PLACE).write_text("0f")
    for step in (64, 192, None):
        stage.to_come.put(step)
    stage.attempt()
    assert sorted(type(stage.next()).__name__ for _ in range(3)) == ["Rung", "Rung", "Trained"]
    assert freed == ["0f"]
    assert sorted(path.name for path in (folder / JUDGED).iterdir()) == [
        "000000000064.json",
        "000000000192.json",
    ]
