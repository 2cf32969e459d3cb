"""A search that is interrupted: all of its trials stop, and none of them ends."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm.config.presets import DIGITS
from ddpm.evaluation.rung import Rungs
from ddpm.runs import storage
from ddpm.runs.run_folder import Search
from ddpm.search.trainables import IMAGES_SEEN, Spec
from ddpm.search.trials import Trials
from ddpm.search.tune_callbacks import Interruption, Outcomes


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


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_trial_that_an_interruption_stops_has_not_ended(tmp_path: Path, is_interrupted: bool) -> None:
    trials = Trials(storage.resolve(str(tmp_path)), {})
    evaluator: Any = None
    silent: Any = SimpleNamespace(notify=lambda name: None)
    outcomes = Outcomes(
        trials=trials,
        spec=Spec(
            config=DIGITS,
            preset="digits",
            base=DIGITS,
            rungs=Rungs((64, 192), evaluator),
            search=Search("s", "k"),
            verbose=False,
        ),
        publisher=silent,
        interruption=Interruption(lambda: is_interrupted),
        news=lambda line: None,
        tick=lambda: None,
    )
    trial: Any = SimpleNamespace(trial_id="1", config={"optim.lr": 1e-2}, last_result={IMAGES_SEEN: 64})
    outcomes.on_trial_start(0, [], trial)
    outcomes.on_trial_complete(0, [], trial)
    (found,) = trials.all()
    assert found.status == ("running" if is_interrupted else "stopped")
