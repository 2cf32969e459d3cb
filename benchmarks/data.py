"""Images/s from S3 to uint8 batches on the trainer: ours beside mosaicml-streaming, webdataset and a torch DataLoader.

    PYTHONPATH=tests python benchmarks/data.py [--folder F] [--cases raw encoded small]

All contestants read the same images, yield batches of 64, and shuffle at least some thousand images. Each is a separate
process tree; its wall time and CPU time are measured. The peers are installed by
`pip install -e '.[benchmarks-data]'`, in a separate environment. The tables (data_table.py) go to
benchmarks/data.md.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import data_sets
import data_table
import numpy as np
from data_sets import CASES, FILES, PACE, Case
from harness import processes, tables
from harness.arguments import read
from peers import data as contestants
from peers.data import BATCH

BUCKET = "s3://bench"
RUNS = {"raw": 0.95, "encoded": 4.0, "small": 2.0}
"""Largest number of epochs of a run; mosaicml-streaming from S3 runs less than one."""
SETTLED_S = 2.0
"""Seconds after which pending reads have ended."""
LONGEST_S = 8.0
"""Longest run, in seconds from its first batch."""
SKIPPED = 0.25
"""Share of a run that does not count, since processes start."""


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    cases: tuple[Literal["raw", "encoded", "small"], ...] = ("raw", "encoded", "small")
    """small: two epochs at a trainer's pace, to detect stalls between them."""
    only: tuple[str, ...] = tuple(data_table.NAMES)
    repeats: int = 1
    num_images: int = 0
    """Images of a case; 0: as many as data_sets.py says."""
    folder: Path | None = None
    """Folder that keeps the server's data, files and figures for the next call; None: they are not kept."""
    prepare: bool = False
    """Only prepare the data."""
    run: str | None = None
    """Run only this contestant, in this process: NAME DECODER START."""

    def case(self, name: str) -> Case:
        return Case(name, self.num_images or CASES[name].num_images)


# In the process of a contestant -----------------------------------------------------------------------------------


def consume(case: Case, batches: Iterable[Any], images: int) -> dict[str, Any]:
    """The time of each batch, the wait for it, and the numbers that its images show."""
    times = []
    waits = []
    seen = []
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

    from ddpm.runs.storage import resolve

    torch.set_num_threads(1)
    if name != "dataloader":  # imports do not count
        importlib.import_module("webdataset" if name == "webdataset" else "streaming")
    with tempfile.TemporaryDirectory(dir=arguments.folder, ignore_cleanup_errors=True) as folder:
        bucket = BUCKET
        if name == "dataloader":
            bucket = f"{arguments.folder}/files"
        if name == "mosaicml_local":
            name = "mosaicml_streaming"
            bucket = f"{folder}/copy"
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

    from ddpm.cluster.ray_init import connect
    from ddpm.data import ray_stream
    from ddpm.data.plan import ReadOrder

    start_ray = time.monotonic()
    connect()
    n = case.num_images
    order = ReadOrder(BATCH * consumers, BATCH, int(RUNS[case.name] * n), window_rows=case.window)
    data_set = ray_stream.open_data_set(f"{BUCKET}/ours/{case.name}", image_size=case.side)
    trainer = ray.remote(num_cpus=0)(_train)

    def consumed(order: ReadOrder, start: int, images: int) -> tuple[float, list[Any]]:
        began = time.monotonic()
        chunk = next(ray_stream.dataset_chunks(data_set, order, start))
        iterators = ray_stream.split(data_set, order, chunk, start, consumers)
        positions = chunk[0][0], chunk[-1][1]
        done = [trainer.remote(case, it, order, k, positions, images) for k, it in enumerate(iterators)]
        return began, ray.get(done)

    began, done = consumed(order, 0, int(RUNS[case.name] * n) // consumers)
    seeks = []
    for start in (0, n // 2, 100 * n + n // 2):
        there = replace(order, total_images=start + n)
        start -= start % (BATCH * consumers)
        time.sleep(SETTLED_S)
        asked, (first, *_) = consumed(there, start, BATCH)
        seeks.append(first["times"][0] - asked)
    ray.shutdown()
    return {"began": began, "start_ray": began - start_ray, "consumers": done, "seeks": seeks}


def _train(
    case: Case, iterator: Any, order: Any, rank: int, positions: tuple[int, int], images: int
) -> dict[str, Any]:
    import torch

    from ddpm.data import ray_stream
    from ddpm.data.reading import cut

    reader = ray_stream.RankReader(
        iterator, rank, *positions, stall_timeout_s=order.stall_timeout_s, storage_timeout_s=300
    )
    batches = cut(reader, order.share(rank, order.batch_size // BATCH), BATCH)
    return consume(case, (torch.from_numpy(batch.image) for batch in batches), images)


# Around it --------------------------------------------------------------------------------------------------------


def measure(arguments: Arguments, case: Case, name: str, decoder: str, start: int = 0) -> dict[str, Any]:
    """The measurements of a contestant, run in a separate process."""
    command = [sys.executable, __file__, "--cases", case.name, "--folder", str(arguments.folder)]
    command += ["--num-images", str(case.num_images), "--run", f"{name} {decoder} {start}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = processes.Watch(process.pid)
    watch.start()
    try:
        out, err = process.communicate()
    finally:
        process.kill()
        watch.stop()
    try:
        result = processes.read_answer(out)
    except ValueError:
        raise RuntimeError(f"{name} {case.name}: {err[-3000:]}") from None
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
    begin = int(SKIPPED * len(times))
    end = len(times) - 1
    images = (end - begin) * BATCH
    found["per_s"] = images / (times[end] - times[begin])
    found["per_cpu_s"] = images / watch.between(times[begin], times[end])
    found |= quality(consumers, case, name)
    if case.name == "small":
        found |= stalls(consumers[0]["waits"], case.num_images // BATCH, case.window // BATCH)
    return found


def quality(consumers: list[dict[str, Any]], case: Case, name: str) -> dict[str, float]:
    """Shuffling quality of the first epoch; a uniform permutation has 1."""
    parts = [np.array(consumer["numbers"]).reshape(-1, BATCH) for consumer in consumers]
    shown = min(len(part) for part in parts)
    order = np.stack([part[:shown] for part in parts], 1).reshape(-1)
    n = case.num_images if name != "dataloader" else min(case.num_images, FILES)
    order = order[:n]
    places = np.arange(len(order)) / n
    expected = n * np.mean(places**2 - places + 0.5)  # of an image from a uniformly random place
    return {
        "neighbours": float(np.abs(np.diff(order)).mean() / (n / 3)),
        "displacement": float(np.abs(order - n * places).mean() / expected),
        "repeated": len(order) - len(set(order.tolist())),
    }


def stalls(waits: list[float], boundary: int, window: int) -> dict[str, float]:
    """The longest wait for a batch: from the epoch's last one to a window later, and elsewhere."""
    about = slice(boundary - 1, boundary + window)
    elsewhere = np.concatenate([waits[boundary // 4 : about.start], waits[about.stop :]])
    return {"boundary_s": max(waits[about]), "elsewhere_s": float(elsewhere.max())}


def prepare(case: Case, folder: Path, only: tuple[str, ...]) -> None:
    """Prepare the data of a case for these contestants, unless it exists."""
    import pyarrow.fs as pafs

    from ddpm.runs.storage import resolve

    done = folder / f"{case.name}-{case.num_images}.done"
    if done.exists():
        return
    data_sets.write_shards(case, f"{BUCKET}/ours/{case.name}")
    if any(name.startswith("mosaicml") for name in only):
        data_sets.write_mds(case, f"{BUCKET}/mds/{case.name}")
    if "webdataset" in only:
        with tempfile.TemporaryDirectory() as tar:
            data_sets.write_tar(case, Path(tar))
            there = resolve(f"{BUCKET}/tar/{case.name}")
            pafs.copy_files(tar, there.path, destination_filesystem=there.filesystem)
    data_sets.write_files(Case(case.name, min(case.num_images, FILES)), folder / "files" / case.name)
    done.touch()


def contests(case: Case, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Name and decoder."""
    for name in only:
        if case.name == "small" and name in ("ours-2", "ours-8", "mosaicml_local"):
            continue
        yield name, "decode_as_ours"
        if case.encoded and not name.startswith("ours"):
            yield name, "drafted"
            yield name, "documented"


def main() -> None:
    arguments = read(Arguments, __doc__, cases=("raw",), only=("ours-1",), num_images=16_384)
    if arguments.run is not None:
        name, decoder, start = arguments.run.split()
        case = arguments.case(arguments.cases[0])
        if name.startswith("ours"):
            result = run_ours(case, int(name[-1]))
        else:
            result = run_peer(arguments, case, name, decoder, int(start))
        processes.answer(result)
        os._exit(0)  # without waiting for workers that read ahead
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        compete(replace(arguments, folder=folder), folder)


def compete(arguments: Arguments, folder: Path) -> None:
    """Start the server, prepare the data, and measure all contestants."""
    import boto3
    from support.servers import S3Server

    with S3Server(folder / "s3") as server:
        # mosaicml-streaming has its own name for the endpoint.
        os.environ.update(server.client_env | {"S3_ENDPOINT_URL": server.endpoint, "OMP_NUM_THREADS": "1"})
        client = boto3.client("s3", **server.client_options)
        if not any(bucket["Name"] == "bench" for bucket in client.list_buckets()["Buckets"]):
            client.create_bucket(Bucket="bench")
        for name in arguments.cases:
            prepare(arguments.case(name), folder, arguments.only)
        if arguments.prepare:
            return
        kept = folder / "figures.json"
        figures: dict[str, list[Any]] = json.loads(kept.read_text()) if kept.exists() else {}
        for k in range(arguments.repeats):
            for case in map(arguments.case, arguments.cases):
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
    tables.write(__file__, "From shards in S3 to batches on the trainer", *data_table.lines(figures))


if __name__ == "__main__":
    main()
