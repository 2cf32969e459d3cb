"""Persistent workers: each run equals one with its own workers, and the worker processes stay the same."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import local
from support.processes import members

from ddpm.config import Config
from ddpm.config_io import override
from ddpm.data.reading import DataSet
from ddpm.search.persistent_group import PersistentWorkerGroup
from ddpm.training import loop
from ddpm.training.fit import Result
from ddpm.training.fit import fit as train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]


def kill_run_state() -> None:
    (state,) = members(psutil.Process().pid, "ray::RunQueue")
    state.send_signal(signal.SIGKILL)


def workers() -> list[psutil.Process]:
    return members(psutil.Process().pid, "ray::RayTrainWorker")


def test_runs_one_after_the_other_including_failures_and_kills(
    tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    tiny = override(tiny, {"cluster.threads_per_worker": 1, "run.storage": str(tmp_path / "runs")})
    group = PersistentWorkerGroup(tiny)

    def fit(name: str, **how: Any) -> Result:
        changes = {key: how.pop(key) for key in list(how) if "." in key}
        return train(override(tiny, {"run.name": name, **changes}), train_set, group=group, **how)

    freed: list[str] = []
    assert fit("first", trained=lambda: freed.append("first")).images_seen == 256
    (worker,) = workers()
    assert freed == ["first"]

    with pytest.raises(loop.NonFinite):
        fit("infinite", **{"optim.lr": 1e30})
    early = fit("early", should_continue=lambda values: False, **{"train.total_images": 10**6})
    assert 0 < early.images_seen < 10**6 and early.checkpoint.endswith(f"{early.images_seen:012d}")
    fit("second", **{"train.seed": 1})
    assert workers() == [worker]

    kill_run_state()  # killed between two runs; the workers stay
    fit("again", **{"train.seed": 1})
    assert workers() == [worker]

    worker.send_signal(signal.SIGKILL)  # killed between two runs
    fit("third", **{"train.seed": 2})
    assert workers() not in ([], [worker])
    kill_run_state()
    group.close(300)
    assert psutil.wait_procs(workers(), timeout=300)[1] == []
    last: Any = group.result  # the last report that Ray Train received
    assert last.metrics["images_seen"] == 256
    assert last.checkpoint.path.endswith("third/checkpoint-000000000256")

    for name, seed in (("first", 0), ("second", 1), ("again", 1), ("third", 2)):
        local.fit(override(tiny, {"train.seed": seed}), train_set, tmp_path / name)
        folder = f"{name}/checkpoint-000000000256"
        local.assert_same(local.stored(tmp_path / "runs" / folder), local.stored(tmp_path / folder))
