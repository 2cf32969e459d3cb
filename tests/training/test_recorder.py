"""A run that is stopped between two logs, or gets other workers, logs what the undisturbed run logs, bit for bit."""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.local import Logged, fit
from torch import Tensor

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.diffusion.objectives import Loss
from ddpm.training.recorder import Recorder
from ddpm.training.runtime import Runtime
from ddpm.training.state import State
from ddpm.utils.progress import Progress

MICRO_BATCHES = 4
STEPS = 12
TIMES = ("train/images_per_s", "train/data_wait_share")
"""Metrics that depend on the clock."""

Rows = dict[int, dict[str, float]]


class Untimed(Logged):
    """What is logged, but times; stands for the store of rank 0."""

    saved: State | None = None

    def metrics(self, values: Mapping[str, float], images_seen: int) -> None:
        super().metrics({name: value for name, value in values.items() if name not in TIMES}, images_seen)

    def goodput(self) -> float:
        return 1.0

    def progress(self, progress: Progress) -> None: ...

    def save(self, state: State, best: bool, before: Mapping[str, bytes]) -> None:
        self.saved = state


class Ranks:
    """Recorders of several ranks, each in its own thread, as workers are processes."""

    def __init__(self, config: Config, world_size: int, store: Untimed) -> None:
        self.config = config
        self.world_size = world_size
        self.store = store
        self.saved = store.saved
        self._barrier = threading.Barrier(world_size)
        self._values = [torch.zeros(0)] * world_size

    def mean(self, rank: int, values: Tensor) -> Tensor:
        self._values[rank] = values
        self._barrier.wait()
        mean = torch.stack(self._values).sum(0) / self.world_size
        self._barrier.wait()
        return mean

    def train(self, steps: range) -> None:
        with ThreadPoolExecutor(self.world_size) as pool:
            list(pool.map(lambda rank: self._train(rank, steps), range(self.world_size)))

    def _train(self, rank: int, steps: range) -> None:
        state = State.create(self.config, torch.device("cpu"))
        if self.saved is not None:
            state.interval = self.saved.interval
            state.skipped_steps = self.saved.skipped_steps
        state.step = steps.start
        state.images_seen = steps.start * 32
        recorder = Recorder(self.config, Rank(self, rank), state)
        for step in steps:
            bad = step in (4, 8)  # 8 is the only one between a stop and a log
            state.skipped_steps += bad
            losses = [loss(step, index) for index in range(rank, MICRO_BATCHES, self.world_size)]
            recorder.add(losses, torch.tensor(step / 3), torch.tensor(bad))
            state.step += 1
            state.images_seen += 32
            recorder.after_step(stopping=step == steps[-1])


class Rank(Runtime):
    """One of the `ranks`."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks = ranks
        self.rank = rank
        self.world_size = ranks.world_size
        self.device = torch.device("cpu")
        self.store: Any = ranks.store if rank == 0 else None

    class_names: Any = ()

    def held_out(self) -> None:
        return None

    def decoder(self) -> None:
        return None

    def mean(self, values: Tensor) -> Tensor:
        return self._ranks.mean(self.rank, values)


def loss(step: int, index: int) -> Loss:
    """The loss of a micro-batch, with values of all sizes; NaN in a step that is skipped."""
    generator = torch.Generator().manual_seed(step * MICRO_BATCHES + index)
    per_image = torch.rand(8, generator=generator) ** 9 * 10
    quarter = torch.randint(0, 4, (8,), generator=generator)
    return Loss(per_image.mean() * (float("nan") if step in (4, 8) else 1), per_image, quarter)


def logged(config: Config, parts: Iterable[tuple[int, int]]) -> Rows:
    """What a run logs that is stopped at each of `parts`: (step, workers until then)."""
    store = Untimed()
    start = 0
    for stop, world_size in parts:
        Ranks(config, world_size, store).train(range(start, stop))
        start = stop
    return store.rows


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_between_two_logs_changes_no_value(tiny: Config, world_size: int) -> None:
    changes = {
        "train.log_every_images": 96,
        "train.sample_every_images": 0,
        "train.checkpoint_every_images": 0,
    }
    config = override(tiny, changes | {"train.total_images": 10**6, "optim.skip_non_finite": 9})
    undisturbed = logged(config, [(STEPS, world_size)])
    assert list(undisturbed) == [96, 192, 288, 384]
    assert undisturbed[288]["train/grad_norm"] == pytest.approx(7 / 3)
    for stop in range(1, STEPS):
        assert logged(config, [(stop, world_size), (STEPS, world_size)]) == undisturbed, stop
    every_step = [(stop, stop % 2 + 1) for stop in range(1, STEPS + 1)]
    assert logged(config, every_step) == undisturbed


def test_training_that_is_stopped_logs_what_undisturbed_training_does(
    tiny: Config, train_set: DataSet, tmp_path: Path
) -> None:
    """Stopped after every step, all values are the same, those of the checkpoints too."""

    class Stopped(Runtime):
        def wants_stop(self) -> bool:
            return True

    config = override(tiny, {"train.log_every_images": 96})
    rows = []
    for runtime in (Runtime, Stopped):
        logged = Untimed()
        for _ in range(8):
            fit(config, train_set, tmp_path / runtime.__name__, logged, runtime)
        rows.append(logged.rows)
    assert rows[0] == rows[1] and list(rows[0]) == [96, 128, 192, 256]
