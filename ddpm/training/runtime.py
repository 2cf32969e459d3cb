"""The training loop's interfaces: the protocols `Runtime` and `Tracker`, and `Runtime` in plain torch.

The loop is written once against them. `LocalRuntime` needs neither Ray nor a network; `worker.RayRuntime` needs Ray.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.data.corrupt import CorruptImages
from ddpm.data.plan import ReadOrder, last_position
from ddpm.data.reading import DataSet, Images, MicroBatch, RankBatch, cut
from ddpm.training.device import LateFlags, stack_flags
from ddpm.utils import files
from ddpm.utils.progress import Progress

CORRUPT = "corrupt.jsonl"
"""File of a run that lists the images that could not be read."""


class Tracker(Protocol):
    """A receiver of curves and pictures. No call may block or raise, so that tracking cannot disturb training."""

    def metrics(self, values: dict[str, float], images_seen: int) -> None: ...
    def image(self, key: str, image: NDArray[np.uint8], images_seen: int) -> None: ...
    def artifact(self, name: str, data: bytes) -> None: ...


class NoTracker:
    """Tracks nothing, on every rank but the first."""

    def metrics(self, values: dict[str, float], images_seen: int) -> None: ...
    def image(self, key: str, image: NDArray[np.uint8], images_seen: int) -> None: ...
    def artifact(self, name: str, data: bytes) -> None: ...


class Runtime(Protocol):
    """One worker of a training run, with access to the other workers and to storage."""

    rank: int
    world_size: int
    device: torch.device
    identity: dict[str, Any]
    """Run key and data fingerprint; stored in every checkpoint."""

    def wrap(self, net: nn.Module) -> nn.Module:
        """`net` with its gradients averaged over the workers."""

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches, from the global batch at `images_seen` to the end of training.

        Every rank calls it; reading may begin at once.
        """

    def held_out(self) -> Images | None:
        """The first config.train.held_out_images held-out images; None: there are none."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the workers, elementwise."""

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of every rank as [world_size * n, ...], rank after rank."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest committed checkpoint as a local folder."""

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        """Whether each flag is set on any rank. Every rank calls it, in every step.

        Returns:
            [n] bool on the device, and the counts of `LateFlags.read` for this step and those before.
        """

    def wants_stop(self) -> bool:
        """Whether this rank has been asked to end training after the current step."""

    def save(self, snapshot: checkpoint.Snapshot, best: bool) -> None:
        """Store a checkpoint, now or in the background (rank 0 only); `best`: it has the lowest held-out loss."""

    def flush(self) -> None:
        """Return when all that was saved and published is stored."""

    def facts(self) -> dict[str, float]:
        """Values to log besides the loss (rank 0's counts)."""

    def progress(self, progress: Progress) -> None:
        """Report how far training is (rank 0 only)."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file into the run's folder (rank 0 only)."""


class LocalRuntime:
    """One process in plain torch, for tests, benchmarks and debugging."""

    rank = 0
    world_size = 1

    def __init__(self, config: Config, train: DataSet, held_out: DataSet | None, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.identity = {"run_key": "", "data_fingerprint": train.rows.fingerprint}
        self._config, self._train, self._held_out, self._folder = config, train, held_out, folder
        self._corrupt = CorruptImages(train.rows.num_rows, config.data.max_corrupt_share)
        self._flags = LateFlags()

    def wrap(self, net: nn.Module) -> nn.Module:
        return net

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        train = self._config.train
        return cut(self._batches(images_seen), 0, 1, train.batch_size, train.micro_batch_size)

    def _batches(self, images_seen: int) -> Iterator[RankBatch]:
        order = ReadOrder.from_config(self._config)
        plan = self._train.plan(order.seed, order.window_rows)
        stop = last_position(images_seen, order.total_images, order.batch_size)
        parts = self._train.parts(plan, images_seen, stop, on_corrupt=order.on_corrupt)
        with ThreadPoolExecutor(1) as reader:  # reads the next part while this one is trained on
            ahead = reader.submit(next, parts, None)
            while images := ahead.result():
                ahead = reader.submit(next, parts, None)
                if self._corrupt.add(images.substitutions):
                    self.publish(CORRUPT, self._corrupt.to_jsonl().encode())
                    self._corrupt.check()
                yield images.image, images.label

    def held_out(self) -> Images | None:
        return read_held_out(self._held_out, self._config)

    def mean(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        found = sorted(self._folder.glob(f"{checkpoint.PREFIX}*/checksums.json"))
        return nullcontext(found[-1].parent if found else None)

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        stacked = stack_flags(flags, self.device)
        return stacked, self._flags.read(stacked, at_once)

    def wants_stop(self) -> bool:
        return False

    def save(self, snapshot: checkpoint.Snapshot, best: bool) -> None:
        prefixes = [checkpoint.PREFIX] + [checkpoint.BEST_PREFIX] * best
        for name in (checkpoint.name_at(snapshot.images_seen, prefix) for prefix in prefixes):
            temporary = files.temporary(self._folder / name)
            checkpoint.write(snapshot, temporary)
            files.put_in_place(temporary, self._folder / name)
            files.sync(self._folder)
        old = sorted(self._folder.glob(f"{checkpoint.PREFIX}*"))[: -self._config.train.keep_checkpoints]
        worse = sorted(self._folder.glob(f"{checkpoint.BEST_PREFIX}*"))[:-1]
        for path in old + worse:
            shutil.rmtree(path)

    def flush(self) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def facts(self) -> dict[str, float]:
        return {"data/corrupt_images": float(self._corrupt.count)}

    def publish(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_held_out(held_out: DataSet | None, config: Config) -> Images | None:
    """The first few held-out images, the same for every run on this data set and every seed."""
    if held_out is None or config.train.held_out_images == 0:
        return None
    plan = held_out.plan(seed=0, window_rows=config.data.window_rows)
    stop = min(config.train.held_out_images, plan.num_images)
    return held_out.read(plan, 0, stop, config.data.on_corrupt)
