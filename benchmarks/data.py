"""Images/s from S3 to uint8 batches on the trainer: ours beside mosaicml-streaming, webdataset and a torch DataLoader.

    PYTHONPATH=tests python benchmarks/data.py [--folder F] [--cases raw encoded small]

Everybody reads the same images, hands out batches of 64, and shuffles at least some thousand images. Every contestant
is a process tree of its own, whose CPU time is counted besides the clock. The peers come with
`pip install -e '.[benchmarks-data]'`, in an environment of their own. The tables go to
benchmarks/data.md.
"""

import datetime
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import data_contestants as contestants
import data_sets
import numpy as np
import psutil
import tyro
from data_contestants import BATCH, WORKERS
from data_sets import STORED, TRAINED, Case
from runtime import processor, write_table

BUCKET = "s3://bench"
CASES = {case.name: case for case in (Case("raw", 200_000), Case("encoded", 12_288), Case("small", 32_768))}
FILES = 50_000
"""At most so many image files."""
RUNS = {"raw": 0.95, "encoded": 4.0, "small": 2.0}
"""Epochs of a run, at most; of mosaicml-streaming's from S3 less than one."""
PACE = 4000
"""Images/s that the trainer of the case `small` takes: waits are stalls then."""
SETTLED_S = 2.0
"""After so long nothing is read any more that was asked for before."""
LONGEST_S = 8.0
"""Of a run, from its first batch on."""
SKIPPED = 0.25
"""Share of a run that does not count: processes start."""
NAMES = {
    "ours-1": "ours, 1 consumer",
    "ours-2": "ours, 2 consumers",
    "mosaicml_streaming": "mosaicml-streaming, first epoch",
    "mosaicml_local": "mosaicml-streaming, from its local copy",
    "webdataset": "webdataset",
    "dataloader": "DataLoader, files",
}


EXACT = {
    "ours-1": ("yes", "yes"),
    "ours-2": ("yes, whatever the number of consumers", "yes"),
    "mosaicml_streaming": ("yes", "yes"),
    "mosaicml_local": ("yes", "yes"),
    "webdataset": ("no", "no"),
    "dataloader": ("with a seeded sampler", "no"),
}
"""Whether the order is a function of the seed, and whether reading goes on where it stopped: by documentation."""
PACKAGES = ("ray", "torch", "pyarrow", "pillow", "simplejpeg", "mosaicml-streaming", "webdataset")
TITLES = {
    "raw": "Raw, 32x32x3",
    "encoded": f"JPEG, {STORED}x{STORED} decoded to {TRAINED}x{TRAINED}",
}
HOW = f"""All hand out uint8 batches of {BATCH}; {WORKERS} loader workers or reading tasks, one a core; ours and
webdataset shuffle {CASES["raw"].window:,} images (JPEG: {CASES["encoded"].window:,}) among each other,
mosaicml-streaming (py1e, its default) and DataLoader all. Ours and webdataset read S3 always, mosaicml-streaming in its
first epoch, DataLoader (PNG or JPEG files, at most {FILES:,}) the local disk. CPU time is that of all processes of a
contestant, Ray's own included; the server's is not. Neighbours: mean distance of successive images in the original
order; displacement: mean distance of an image from its original place; 1 is a uniform permutation. Memory: what the
largest process shares with no other. First batch: ours starts its processes, with Ray running; the peers' library is
imported already. "Pillow and Resize" is what the peers' documentation does, "draft mode" decodes JPEGs at a fraction of
their size, and "our decoder" is `ddpm.data.row_group.decode`, which does that too.""".replace("\n", " ")
SEEKS = [
    "From the call to the first batch, raw images; Ray runs already, the peer's workers are started.",
    "",
]
STALLS = (
    f"{CASES['small'].num_images:,} raw images, two epochs, and a trainer that takes {PACE:,} a second: the longest "
    f"wait for a batch from the last one of the epoch to {CASES['small'].window:,} images later, and anywhere else."
)


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    cases: tuple[Literal["raw", "encoded", "small"], ...] = ("raw", "encoded", "small")
    """small: two epochs at a trainer's pace, to see whether their boundary stalls."""
    only: tuple[str, ...] = tuple(NAMES)
    repeats: int = 1
    folder: Path | None = None
    """Where the server's data, files and figures are kept for the next call; None: nowhere."""
    prepare: bool = False
    """Only make the data."""
    run: str | None = None
    """Consume as this contestant alone, in this process: NAME DECODER START."""


# In the process of a contestant -----------------------------------------------------------------------------------


def consume(case: Case, batches: Iterable[Any], images: int) -> dict[str, Any]:
    """When each batch was there, how long it was waited for, and which images were in it."""
    times, waits, seen = [], [], []
    asked = time.monotonic()
    for k, batch in enumerate(batches):
        now = time.monotonic()
        times.append(now)
        waits.append(now - asked)
        seen.append(data_sets.numbers(case, batch.numpy()))
        if (k + 1) * BATCH >= images or (case.name != "small" and now - times[0] > LONGEST_S):
            break
        if case.name == "small":
            time.sleep(max(0.0, times[0] + (k + 1) * BATCH / PACE - time.monotonic()))
        asked = time.monotonic()
    return {"times": times, "waits": waits, "numbers": np.concatenate(seen).tolist()}


def run_peer(arguments: Arguments, case: Case, name: str, decoder: str, start: int) -> dict[str, Any]:
    import pyarrow.fs as pafs
    import torch

    from ddpm.storage import resolve

    torch.set_num_threads(1)
    if name != "dataloader":  # what is imported does not count
        importlib.import_module("webdataset" if name == "webdataset" else "streaming")
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        bucket = BUCKET
        if name == "dataloader":
            bucket = f"{arguments.folder}/files"
        if name == "mosaicml_local":
            name, bucket = "mosaicml_streaming", f"{folder}/copy"
            copied = resolve(f"{BUCKET}/mds/{case.name}")
            Path(bucket).mkdir()
            pafs.copy_files(copied.path, bucket, source_filesystem=copied.filesystem)
        batches = getattr(contestants, name)(case, bucket, Path(folder), getattr(contestants, decoder), start)
        epochs = RUNS[case.name]
        if name == "mosaicml_streaming" and bucket == BUCKET and case.name != "small":
            epochs = min(epochs, 0.95)
        images = BATCH if start else epochs * case.num_images
        began = time.monotonic()
        return {"began": began, "consumers": [consume(case, batches, int(images))], "seeks": []}


def run_ours(case: Case, consumers: int) -> dict[str, Any]:
    """What `RayRuntime.batches` does, without the training around it."""
    import ray

    from ddpm.config import Config, override
    from ddpm.connection import connect
    from ddpm.data import librarian, stream

    start_ray = time.monotonic()
    connect()
    n = case.num_images
    values = {
        "data.shards": f"{BUCKET}/ours/{case.name}",
        "data.window_rows": case.window,
        "model.image_size": case.side,
        "train.batch_size": BATCH * consumers,
        "train.micro_batch_size": BATCH,
        "train.total_images": int(RUNS[case.name] * n),
    }
    config = override(Config(), values)
    data_set = stream.open_data_set(config)
    desk = librarian.employ(consumers)
    trainer = ray.remote(num_cpus=0)(_train)

    def consumed(config: Config, start: int, images: int) -> tuple[float, list[Any]]:
        began = time.monotonic()
        leg = next(stream.legs(config, data_set, start))
        iterators = ray.get(desk.split.remote(config, data_set, leg, start, consumers))
        done = [trainer.remote(case, it, config, k, images) for k, it in enumerate(iterators)]
        return began, ray.get(done)

    began, done = consumed(config, 0, int(RUNS[case.name] * n) // consumers)
    seeks = []
    for start in (0, n // 2, 100 * n + n // 2):
        there = override(Config(), values | {"train.total_images": start + n})
        start -= start % (BATCH * consumers)
        time.sleep(SETTLED_S)
        asked, (first, *_) = consumed(there, start, BATCH)
        seeks.append(first["times"][0] - asked)
    ray.shutdown()
    return {"began": began, "start_ray": began - start_ray, "consumers": done, "seeks": seeks}


def _train(case: Case, iterator: Any, config: Any, rank: int, images: int) -> dict[str, Any]:
    from ddpm.data import stream
    from ddpm.training.runtime import cut

    train = config.train
    world_size = train.batch_size // BATCH
    shares = stream.shares(iterator, config)
    batches = cut(shares, rank, world_size, train.batch_size, train.micro_batch_size)
    return consume(case, (batch.image for batch in batches), images)


# Around it --------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """CPU time and memory of a process and all that descend from it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._ended = psutil.Process(pid), threading.Event()
        self._cpu: dict[int, float] = {}
        self.at: list[float] = []
        self.seconds: list[float] = []
        self.largest: dict[int, int] = {}

    def run(self) -> None:
        k = 0
        while not self._ended.wait(0.2):
            k += 1
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                    if k % 5 == 0:
                        memory = process.memory_full_info().uss
                        self.largest[process.pid] = max(self.largest.get(process.pid, 0), memory)
                except psutil.Error:  # it has just ended
                    continue
            self.at.append(time.monotonic())
            self.seconds.append(sum(self._cpu.values()))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def between(self, begin: float, end: float) -> float:
        """CPU seconds."""
        return float(np.interp(end, self.at, self.seconds) - np.interp(begin, self.at, self.seconds))


def measure(arguments: Arguments, case: Case, name: str, decoder: str, start: int = 0) -> dict[str, Any]:
    """Run a contestant in a process of its own, and say how it did."""
    command = [sys.executable, __file__, "--cases", case.name, "--folder", str(arguments.folder)]
    command += ["--run", f"{name} {decoder} {start}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    try:
        out, err = process.communicate()
    finally:
        process.kill()
        watch.stop()
    line = next((line for line in out.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{name} {case.name}: {err[-3000:]}")
    result = json.loads(line.removeprefix("RESULT "))
    consumers = result["consumers"]
    times = np.sort(np.concatenate([consumer["times"] for consumer in consumers]))
    found = {
        "first_s": times[0] - result["began"],
        "seeks_s": result["seeks"],
        "start_ray_s": result.get("start_ray", 0.0),
        "memory": max(watch.largest.values(), default=0),
    }
    if start:
        return found
    begin, end = int(SKIPPED * len(times)), len(times) - 1
    images = (end - begin) * BATCH
    found["per_s"] = images / (times[end] - times[begin])
    found["per_cpu_s"] = images / watch.between(times[begin], times[end])
    found |= quality(consumers, case, name)
    if case.name == "small":
        found |= stalls(consumers[0]["waits"], case.num_images // BATCH, case.window // BATCH)
    return found


def quality(consumers: list[dict[str, Any]], case: Case, name: str) -> dict[str, float]:
    """How well shuffled the first epoch is; 1 is what a uniform permutation has."""
    parts = [np.array(consumer["numbers"]).reshape(-1, BATCH) for consumer in consumers]
    shown = min(len(part) for part in parts)
    order = np.stack([part[:shown] for part in parts], 1).reshape(-1)
    n = case.num_images if name != "dataloader" else min(case.num_images, FILES)
    order = order[:n]
    places = np.arange(len(order)) / n
    expected = n * np.mean(places**2 - places + 0.5)  # of an image that comes from anywhere
    return {
        "neighbours": float(np.abs(np.diff(order)).mean() / (n / 3)),
        "displacement": float(np.abs(order - n * places).mean() / expected),
        "repeated": len(order) - len(set(order.tolist())),
    }


def stalls(waits: list[float], boundary: int, window: int) -> dict[str, float]:
    """The longest wait for a batch: from the epoch's last one to a window after, and elsewhere."""
    about = slice(boundary - 1, boundary + window)
    elsewhere = np.concatenate([waits[boundary // 4 : about.start], waits[about.stop :]])
    return {"boundary_s": max(waits[about]), "elsewhere_s": float(elsewhere.max())}


def prepare(case: Case, folder: Path) -> None:
    """Make the data of a case, unless it is there."""
    import pyarrow.fs as pafs

    from ddpm.storage import resolve

    done = folder / f"{case.name}-{case.num_images}.done"
    if done.exists():
        return
    data_sets.write_shards(case, f"{BUCKET}/ours/{case.name}")
    data_sets.write_mds(case, f"{BUCKET}/mds/{case.name}")
    with tempfile.TemporaryDirectory() as tar:
        data_sets.write_tar(case, Path(tar))
        there = resolve(f"{BUCKET}/tar/{case.name}")
        pafs.copy_files(tar, there.path, destination_filesystem=there.filesystem)
    data_sets.write_files(Case(case.name, min(case.num_images, FILES)), folder / "files" / case.name)
    done.touch()


def contests(case: Case, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and decoder."""
    for name in only:
        if case.name == "small" and name in ("ours-2", "mosaicml_local"):
            continue
        yield name, "decode_as_ours"
        if case.encoded and not name.startswith("ours"):
            yield name, "drafted"
            yield name, "documented"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.run is not None:
        name, decoder, start = arguments.run.split()
        case = CASES[arguments.cases[0]]
        if name.startswith("ours"):
            result = run_ours(case, int(name[-1]))
        else:
            result = run_peer(arguments, case, name, decoder, int(start))
        print("RESULT " + json.dumps(result), flush=True)
        os._exit(0)  # without waiting for workers that read ahead
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        compete(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        compete(replace(arguments, folder=Path(folder)))


def compete(arguments: Arguments) -> None:
    """Start the server, make the data, and let everybody read."""
    import boto3
    from servers import S3Server

    folder = arguments.folder
    assert folder is not None
    with S3Server(folder / "s3") as server:
        # mosaicml-streaming has a name of its own for the endpoint.
        os.environ.update(server.client_env | {"S3_ENDPOINT_URL": server.endpoint, "OMP_NUM_THREADS": "1"})
        client = boto3.client("s3", **server.client_options)
        if not any(bucket["Name"] == "bench" for bucket in client.list_buckets()["Buckets"]):
            client.create_bucket(Bucket="bench")
        for name in arguments.cases:
            prepare(CASES[name], folder)
        if arguments.prepare:
            return
        kept = folder / "figures.json"
        figures: dict[str, list[Any]] = json.loads(kept.read_text()) if kept.exists() else {}
        for k in range(arguments.repeats):
            for case in (CASES[name] for name in arguments.cases):
                for name, decoder in list(contests(case, arguments.only))[:: 1 if k % 2 == 0 else -1]:
                    try:
                        found = measure(arguments, case, name, decoder)
                        if name == "mosaicml_streaming" and case.name == "raw":
                            seek = measure(arguments, case, name, decoder, start=case.num_images // 2)
                            found["seeks_s"] = [found["first_s"], seek["first_s"]]
                    except RuntimeError as error:
                        print(error, flush=True)
                        continue
                    figures.setdefault(f"{case.name} {name} {decoder}", []).append(found)
                    print(case.name, name, decoder, json.dumps(found), flush=True)
                    kept.write_text(json.dumps(figures))
    write(figures)


def write(figures: dict[str, list[Any]]) -> None:
    """The tables, as Markdown."""

    def median(key: str, name: str) -> float:
        values = [run[name] for run in figures.get(key, []) if name in run]
        return statistics.median(values) if values else math.nan

    def titles(case: str) -> dict[str, str]:
        """Of every key of the case."""
        how = {
            "documented": ", Pillow and Resize",
            "drafted": ", Pillow's draft mode",
            "decode_as_ours": ", our decoder",
        }
        found = {}
        for name in NAMES:
            for decoder in how:
                if (key := f"{case} {name} {decoder}") in figures:
                    suffix = how[decoder] if case == "encoded" and not name.startswith("ours") else ""
                    found[key] = NAMES[name] + suffix
        return found

    def table(case: str) -> list[str]:
        ours = [key for key in titles(case) if key.split()[1].startswith("ours")]
        best = {name: max(median(key, name) for key in ours) for name in ("per_s", "per_cpu_s")}
        lines = [
            "| | images/s | ours is faster by | images/s of CPU time | ours is faster by | first batch | neighbours "
            "| displacement | memory | exact order | exact resume |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key, title in titles(case).items():
            speed, cpu = median(key, "per_s"), median(key, "per_cpu_s")
            lines.append(
                f"| {title} | {speed:,.0f} | {best['per_s'] / speed:.2f} | {cpu:,.0f} | {best['per_cpu_s'] / cpu:.2f} "
                f"| {median(key, 'first_s'):.1f} s | {median(key, 'neighbours'):.2f} "
                f"| {median(key, 'displacement'):.2f} | {median(key, 'memory') / 2**20:,.0f} MiB "
                f"| {' | '.join(EXACT[key.split()[1]])} |"
            )
        return lines

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    lines = [
        "# From shards in S3 to batches on the trainer",
        "",
        f"`PYTHONPATH=tests python benchmarks/data.py`, {datetime.date.today()}, {os.cpu_count()} cores of "
        f"{processor()}, which the S3 server (SeaweedFS) shares; {versions}. {HOW}",
    ]
    for case, title in TITLES.items():
        if f"{case} ours-1 decode_as_ours" in figures:
            lines += ["", f"## {title}", "", *table(case)]
    ours = next((runs for key, runs in figures.items() if key.startswith("raw ours-1")), None)
    if ours:
        seeks = [statistics.median(run["seeks_s"][i] for run in ours) for i in range(3)]
        peer = figures.get("raw mosaicml_streaming decode_as_ours", [{}])[-1].get("seeks_s")
        lines += [
            "",
            "## Seeking",
            "",
            *SEEKS,
            "| | from the beginning | from the middle of the epoch | of the 101st |",
        ]
        lines += ["|---|---|---|---|", f"| ours | {' | '.join(f'{s:.2f} s' for s in seeks)} |"]
        if peer:
            lines.append(f"| mosaicml-streaming | {' | '.join(f'{s:.2f} s' for s in peer)} | - |")
        lines.append("| webdataset, DataLoader | - | reads and drops what comes before | - |")
    if any(key.startswith("small") for key in figures):
        lines += ["", "## The end of an epoch", "", STALLS, ""]
        lines += ["| | longest wait at the boundary | elsewhere |", "|---|---|---|"]
        for key, title in titles("small").items():
            lines.append(
                f"| {title} | {1000 * median(key, 'boundary_s'):.0f} ms | {1000 * median(key, 'elsewhere_s'):.0f} ms |"
            )
    write_table(__file__, lines)


if __name__ == "__main__":
    main()
