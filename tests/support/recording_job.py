"""jobs/train.py with workers that record the content of every micro-batch: a separate program, for tests.

    PYTHONPATH=tests python tests/support/recording_job.py FOLDER RANK:STEP ... -- digits --run.name ...

FOLDER gets one file per rank with one line per micro-batch: its step, its place in the global batch, and a digest of
x_0, x_t and t (so of the noise too). At each STEP given, the loss of RANK is NaN. FLUSH_AFTER_S in the environment
delays what the run's store writes after an error.
"""

import hashlib
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from ddpm.data.plan import ReadOrder
from ddpm.training import worker_group
from support.processes import REPO

FOLDER = Path(sys.argv[1]).absolute()
FLUSH_AFTER_S = float(os.environ.get("FLUSH_AFTER_S", "0"))
BAD = [tuple(map(int, word.split(":"))) for word in sys.argv[2 : sys.argv.index("--")]]
work = worker_group.train_worker


class Recording:
    """An objective that also records its inputs."""

    def __init__(self, objective: Any, config: Any, rank: int, world_size: int) -> None:
        self._objective = objective
        self._rank = rank
        self._grain = config.train.micro_batch_size
        self._share = ReadOrder.from_config(config).share(rank, world_size)
        self._micro_batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, model: Any, x_0: Any, label: Any, generator: Any, progress: float = 1.0) -> Any:
        lines = []

        def record(x_t: Any, t: Any, *rest: Any) -> Any:
            for one in zip(*(tensor.split(self._grain) for tensor in (x_0, x_t, t)), strict=True):
                digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in one)).hexdigest()
                step, k = divmod(self._micro_batches, len(self._share))
                lines.append({"step": step, "index": self._share[k], "digest": digest})
                self._micro_batches += 1
            return model(x_t, t, *rest)

        if not model.training or not x_0.any():  # held-out images, or the pass before the first step
            return self._objective.loss(model, x_0, label, generator, progress)
        loss = self._objective.loss(record, x_0, label, generator, progress)
        step = lines[-1]["step"]
        with (FOLDER / f"{self._rank}.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return loss._replace(value=loss.value * float("nan")) if (self._rank, step) in BAD else loss


def recording_work(spec: dict[str, Any]) -> None:
    import ray.train

    from ddpm.training import loop, store

    flush = store.RunStore.flush_on_error

    def flush_late(self: Any) -> None:
        time.sleep(FLUSH_AFTER_S)
        flush(self)

    store.RunStore.flush_on_error = flush_late  # type: ignore[method-assign]
    context = ray.train.get_context()
    build = loop.build_objective
    ranks = context.get_world_rank(), context.get_world_size()
    loop.build_objective = lambda config: Recording(build(config), config, *ranks)
    work(spec)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True)
    worker_group.train_worker = recording_work
    job = str(REPO / "jobs" / "train.py")
    sys.argv = [job, *sys.argv[sys.argv.index("--") + 1 :]]
    runpy.run_path(job, run_name="__main__")
