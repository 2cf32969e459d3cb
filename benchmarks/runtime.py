"""The cost of Ray: images/s of RayRuntime beside the same loop under torchrun, on the same data and net.

    python benchmarks/runtime.py [--repeats 3] [--preset fashion-mnist --images 4096]

The two take turns, so that a machine that gets busy slows both. Every run is a separate process; its speed is measured
between two log points well after the start. The table goes to benchmarks/runtime.md.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed
import tyro
from harness import processes, tables, turns
from torch import Tensor, nn

from ddpm.cluster.ray_init import KEPT_MEMORY
from ddpm.config import Config, override
from ddpm.data import builtin, ray_dataset
from ddpm.data.plan import rank_shard
from ddpm.data.reading import DataSet, MicroBatch, RankBatch, cut
from ddpm.presets import PRESETS
from ddpm.training import loop
from ddpm.training.runtime import LocalRuntime, NoTracker

RUNTIMES = ("torchrun", "ray")
CASES = ((1, 1), (1, 2), (2, 1))
"""Workers, and torch threads of each."""
SAMPLE_S = 3.0
"""Seconds between two samples of the meter; its own cost is part of the measurement."""
READERS = ("ray::SplitCoordinator", "ray::MapBatches", "ray::_StatsActor", "ray::IDLE")
"""Titles of Ray Data's processes; idle ones are workers of reading tasks between two reads."""


@dataclass(frozen=True)
class Arguments:
    """How long to measure."""

    repeats: int = 3
    """Runs of each."""
    images: int = 64_000
    """Images per run; the first fifth does not count."""
    preset: str = "digits"
    workers: int = 1
    """With --runtime: number of workers."""
    threads: int = 1
    """With --runtime: torch threads of each worker."""
    runtime: Literal["torchrun", "ray"] | None = None
    """Measure only this one, in this process."""


@dataclass(frozen=True)
class Found:
    """Measurements of one run, without its first fifth."""

    images_per_s: float
    wait: float
    """Share of the time spent waiting for data."""
    reading: float | None
    """Cores used by Ray Data."""
    others: float | None
    """Cores used by Ray's other processes and the driver."""
    by_process: dict[str, float]
    """Cores by kind of process, without the workers."""


class TorchrunRuntime(LocalRuntime):
    """The runtime in a process started by torchrun, as written without Ray."""

    def __init__(self, config: Config, train: DataSet, folder: Path) -> None:
        super().__init__(config, train, train.held_out(), folder)
        torch.distributed.init_process_group("gloo")
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def wrap(self, net: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return net
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        train = self._config.train
        batches = self._rank_batches(images_seen)
        return cut(batches, self.rank, self.world_size, train.batch_size, train.micro_batch_size)

    def _rank_batches(self, images_seen: int) -> Iterator[RankBatch]:
        start = 0
        for image, label in self._batches(images_seen):
            which = (start, self.rank, self.world_size, self._config.train.micro_batch_size)
            yield rank_shard(image, *which), rank_shard(label, *which)
            start += len(label)

    def mean(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values / self.world_size

    def gather(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        counts = torch.stack([torch.as_tensor(flag).float() for flag in flags])
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        return counts > 0, [int(count > 0) for count in counts.tolist()]


class Points(NoTracker):
    """Stores tracked points."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}

    def metrics(self, values: dict[str, float], images_seen: int) -> None:
        self.points.setdefault(images_seen, {}).update(values)


class Meter:
    """A `should_continue` of `fit.fit` that samples the CPU seconds of all processes below this one."""

    def __init__(self, first: int) -> None:
        self._first, self._samples = first, list[tuple[float, dict[int, tuple[str, float]]]]()

    def __call__(self, notes: Mapping[str, Any]) -> bool:
        progress = notes.get("progress")
        due = not self._samples or time.monotonic() - self._samples[-1][0] > SAMPLE_S
        if progress is not None and progress.images_seen >= self._first and due:
            seen = {p.pid: (_title(p), processes.cpu_s(p)) for p in processes.family()}
            self._samples.append((time.monotonic(), seen))
        return True

    def cores(self) -> dict[str, float]:
        """Cores by kind of process, without the workers."""
        (began, before), (ended, after) = self._samples[0], self._samples[-2]
        found: dict[str, float] = defaultdict(float)
        for pid, (title, cpu_s) in after.items():
            if not title.startswith("ray::RayTrainWorker"):
                kind = "the driver" if pid == os.getpid() else Path(title.split(".")[0]).name
                found[kind] += (cpu_s - before.get(pid, ("", 0.0))[1]) / (ended - began)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:1])
    return ""


def measure(arguments: Arguments) -> None:
    """Train once, and print the measurements as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "train.total_images": arguments.images,
            "train.log_every_images": arguments.images // 10,
            "train.checkpoint_every_images": 0,
            "train.sample_every_images": 0,
            "sample.num_images": arguments.workers,
            "sample.num_sample_steps": 1,
            "cluster.num_workers": arguments.workers,
            "cluster.threads_per_worker": arguments.threads,
            "run.storage": folder,
            "run.name": "bench",
        }
        config = builtin.with_shards(override(PRESETS[arguments.preset], values))
        data_set = ray_dataset.open_configured(config)
        cores: dict[str, float] = {}
        if arguments.runtime == "torchrun":
            torch.set_num_threads(arguments.threads)
            tracker, runtime = Points(), TorchrunRuntime(config, data_set, Path(folder, "bench"))
            loop.train(config, runtime, tracker)
            points = tracker.points
            torch.distributed.destroy_process_group()
            if runtime.rank:
                return
        else:
            import mlflow

            from ddpm.cluster.ray_init import connect
            from ddpm.training import fit

            os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder}/mlflow.db"
            connect()
            meter = Meter(arguments.images // 5)
            result = fit.fit(config, data_set, should_continue=meter)
            assert result.delivery is not None and result.delivery.run_id is not None
            client, points = mlflow.MlflowClient(uri), {}
            for key in ("train/images_per_s", "train/data_wait_share"):
                for point in client.get_metric_history(result.delivery.run_id, key):
                    points.setdefault(point.step, {})[key] = point.value
            cores = meter.cores()
        late = [values for step, values in points.items() if step > arguments.images / 5]
        speed = statistics.median(values["train/images_per_s"] for values in late)
        wait = statistics.mean(values["train/data_wait_share"] for values in late)
        reading = sum(value for kind, value in cores.items() if kind.startswith(READERS))
        both = [reading, sum(cores.values()) - reading] if cores else [None, None]
        processes.answer([speed, wait, *both, cores])


def run(arguments: Arguments, workers: int, threads: int, runtime: str) -> Found:
    """One run in separate processes."""
    command = [sys.executable]
    if runtime == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    command += [__file__, "--images", str(arguments.images), "--preset", arguments.preset]
    command += ["--runtime", runtime, "--workers", str(workers), "--threads", str(threads)]
    kept = os.environ | KEPT_MEMORY  # as Ray's workers have
    return Found(*processes.ask(command, kept))


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.runtime is not None:
        measure(arguments)
        return
    keys = [(*case, name) for case in CASES for name in RUNTIMES]
    write(arguments, turns.in_turns(keys, arguments.repeats, lambda key: run(arguments, *key)))


def write(arguments: Arguments, found: Mapping[tuple[int, int, str], list[Found]]) -> None:
    """The table, as Markdown."""
    speed = {key: statistics.median(one.images_per_s for one in runs) for key, runs in found.items()}
    titles = {"torchrun": "torchrun", "ray": "RayRuntime, MLflow on"}
    how = (
        f"Preset {arguments.preset}, {arguments.images:,} images a run; medians of {arguments.repeats} runs that took "
        f"turns, with the same settings of the C library (`python benchmarks/runtime.py`). "
        f"{tables.machine('ray')}."
    )
    names = ["workers x threads", "", "images/s", "of torchrun", "waits", "cores of Ray Data", "of the rest"]
    rows = []
    for key, runs in found.items():
        workers, threads, name = key
        ratio = speed[key] / speed[workers, threads, "torchrun"]
        cores = [
            f"{statistics.median(values):.3f}" if None not in values else "-"
            for values in ([one.reading for one in runs], [one.others for one in runs])
        ]
        wait = statistics.median(one.wait for one in runs)
        every = ", ".join(f"{one.images_per_s:,.0f}" for one in runs)
        numbers = [f"{speed[key]:,.0f}", f"{ratio:.3f}", f"{wait:.2%}", *cores, every]
        rows.append([f"{workers} x {threads}", titles[name], *numbers])
    lines = [
        how,
        "",
        *tables.table([*names, "all runs"], rows),
        "",
        "Cores by process, beside the workers, of the last run of each. An actor of Ray that does nothing takes 0.008 "
        "to 0.01 of a core on this machine: its main thread wakes up every 10 ms to look for signals, which is no "
        "setting (Ray 2.60; seen with strace).",
        "",
    ]
    for (workers, threads, name), runs in found.items():
        if runs[-1].by_process:
            cores = (f"{kind} {number:.3f}" for kind, number in runs[-1].by_process.items() if number > 5e-4)
            lines.append(f"- {workers} x {threads}, {titles[name]}: {', '.join(cores)}")
    tables.write(__file__, "What Ray costs", *lines)


if __name__ == "__main__":
    main()
