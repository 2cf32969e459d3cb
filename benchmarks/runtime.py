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
from harness import processes, tables, turns
from harness.arguments import read

from ddpm.cluster.ray_init import KEPT_MEMORY
from ddpm.config.json import override
from ddpm.config.presets import PRESETS
from ddpm.config.tree import Config
from ddpm.data import prepare_for_run, ray_stream
from ddpm.data.plan import ReadOrder, rank_shard
from ddpm.data.reading import DataSet, LabelledImages, MicroBatch, cut
from ddpm.data.sources import folder_preset as folder_preset
from ddpm.runs import curves, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training import loop
from ddpm.training.runtime import Runtime
from ddpm.training.store import RunStore

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
    cases: tuple[tuple[int, int], ...] = CASES
    preset: str = "digits"
    """Or a folder of pictures, for the preset `folder`."""
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


class TorchrunRuntime(Runtime):
    """The runtime in a process started by torchrun, as written without Ray."""

    def __init__(self, config: Config, train: DataSet, store: RunStore) -> None:
        super().__init__(config, train, train.held_out(), None)
        torch.distributed.init_process_group("gloo")
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        if self.rank == 0:
            self.store = store

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        order = ReadOrder.from_config(self._config)
        share = order.share(self.rank, self.world_size)
        return cut(self._rank_batches(images_seen, share), share, order.micro_batch_size)

    def _rank_batches(self, images_seen: int, share: range) -> Iterator[LabelledImages]:
        start = 0
        size = self._config.train.micro_batch_size
        for images in self._batches(images_seen):
            yield LabelledImages(
                rank_shard(images.image, start, share, size), rank_shard(images.label, start, share, size)
            )
            start += len(images.label)


class Meter:
    """A `should_continue` of `fit.fit` that samples the CPU seconds of all processes below this one."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._samples = list[tuple[float, dict[int, tuple[str, float]]]]()

    def __call__(self, notes: Mapping[str, Any]) -> bool:
        progress = notes.get("progress")
        due = not self._samples or time.monotonic() - self._samples[-1][0] > SAMPLE_S
        if progress is not None and progress.images_seen >= self._first and due:
            seen = {p.pid: (_title(p), processes.cpu_s(p)) for p in processes.family()}
            self._samples.append((time.monotonic(), seen))
        return True

    def cores(self) -> dict[str, float]:
        """Cores by kind of process, without the workers."""
        if len(self._samples) < 3:  # the run was too short
            return {}
        began, before = self._samples[0]
        ended, after = self._samples[-2]
        found: dict[str, float] = defaultdict(float)
        for pid, (title, cpu_s) in after.items():
            if not title.startswith("ray::RayTrainWorker"):
                kind = title.split(".")[0] if title.startswith("ray::") else Path(title).name
                if pid == os.getpid():
                    kind = "the driver"
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
        preset = PRESETS.get(arguments.preset) or folder_preset.preset(arguments.preset)
        config = prepare_for_run.prepared(override(preset, values))
        data_set = ray_stream.open_configured(config)
        cores: dict[str, float] = {}
        location = storage.resolve(folder).child("bench")
        if arguments.runtime == "torchrun":
            torch.set_num_threads(arguments.threads)
            store = RunStore(config, RunFolder("bench", location, ""), data_set.rows.fingerprint)
            runtime = TorchrunRuntime(config, data_set, store)
            loop.train(config, runtime)
            store.flush()
            store.close()
            torch.distributed.destroy_process_group()
            if runtime.rank:
                return
        else:
            from ddpm.cluster.ray_init import connect
            from ddpm.training import fit

            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            connect()
            meter = Meter(arguments.images // 5)
            fit.fit(config, data_set, should_continue=meter)
            cores = meter.cores()
        logged = {
            name: [point.value for point in curve if point.images_seen > arguments.images / 5]
            for name, curve in curves.read(location).items()
        }
        speed = statistics.median(logged["train/images_per_s"])
        wait = statistics.mean(logged["train/data_wait_share"])
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
    arguments = read(Arguments, __doc__, repeats=1, images=6_400, cases=CASES[:1])
    if arguments.runtime is not None:
        measure(arguments)
        return
    keys = [(*case, name) for case in arguments.cases for name in RUNTIMES]
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
