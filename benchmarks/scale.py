"""Computes docs/design/scale.md: what changes from 1 to 256 GPUs and from 1 GB to 100 TB.

    PYTHONPATH=benchmarks python benchmarks/scale.py

Each quantity is a model of a few lines. What this machine can measure is measured, in seconds of one core: rows read
and decoded per second, copying, writing and hashing of a checkpoint, bytes of a manifest, FLOPs per image. The rest is
from public figures, each with its source in `PUBLIC`. Nothing here was run on GPUs.
"""

import io
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import tables
from harness.arguments import read

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.presets import CELEBA64, CIFAR10
from ddpm.config.tree import Config
from ddpm.data.manifest import Encoding, Shard, make_manifest, manifest_from_json
from ddpm.data.plan import CHUNK_IMAGES
from ddpm.data.prepare import MAX_ROWS_PER_ROW_GROUP, ROW_GROUP_BYTES
from ddpm.data.ray_stream import BYTES_PER_WORKER, OBJECT_STORE_SHARE
from ddpm.data.shards import read_row_group, write_shard
from ddpm.runs import checkpoint
from ddpm.runs.storage import resolve
from ddpm.training import mfu
from ddpm.training.state import State, parameter_count
from ddpm.utils.images import png_bytes

OUT = Path(__file__).parent.parent / "docs/design/scale.md"
GPUS = (1, 8, 256)
SIZES = {"1 GB": 1e9, "1 TB": 1e12, "100 TB": 1e14}
IMAGES_PER_GPU = 128
BYTES_PER_PARAMETER = 16
"""In a checkpoint: net, EMA, and AdamW's two moments, float32."""
PUBLIC = {
    "peak": (989e12, "H100 SXM, bf16 without sparsity, FLOP/s: NVIDIA's data sheet"),
    "utilisation": (
        None,
        "of the peak: that of Ho et al. 2020, Appendix B, 21 steps of 128 images a second on a TPU v3-8, "
        "whose peak is 420 TFLOP/s (Google Cloud's documentation); ours has not been measured",
    ),
    "nvlink": (450e9, "bytes/s a direction between GPUs of a machine, NVLink 4: NVIDIA's H100 data sheet"),
    "network": (400e9, "bytes/s of a machine of 8 GPUs to others, p5.48xlarge, 3,200 Gbit/s: AWS's EC2 "
    "instance types"),
    "bus_share": (0.7, "of those that large messages reach; an assumption"),
    "latency": (20e-6, "seconds a step of an all-reduce takes besides the bytes; an assumption"),
    "get_limit": (5500, "GETs a second a prefix: Amazon S3's user guide, performance"),
    "s3_stream": (90e6, "bytes/s a connection: Amazon S3's user guide, performance guidelines (85-90 MB/s)"),
    "pcie": (6.3e10, "bytes/s from a GPU to pinned memory, PCIe 5.0 x16: PCI-SIG; reached in part only"),
    "get_price": (0.0004 / 1000, "$ a GET: S3 Standard, us-east-1"),
    "month_price": (0.023 / 1e9, "$ a byte and month: S3 Standard, us-east-1, the first 50 TB"),
    "gpu_price": (55.04 / 8, "$ an hour and H100: p5.48xlarge on demand, us-east-1, since June 2025"),
    "core_price": (0.357 / 8, "$ an hour and vCPU: c7i.2xlarge on demand, us-east-1"),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements on one core of this machine."""

    raw_rows: float
    """Rows a second, 32x32 colour, raw, checksum included."""
    png_rows: float
    """The same, PNG."""
    requests: float
    """Requests to S3, per row group."""
    copy: float
    """Bytes a second at which a checkpoint is copied in memory; on a CPU training waits for it."""
    write: float
    """Bytes a second at which it is written to disk and hashed; training does not wait."""
    manifest_bytes: float
    """Bytes of the manifest per row group."""
    manifest_s: float
    """Seconds to read and check the manifest, per row group."""


def measure() -> Measured:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        raw = rows_per_second(f"{folder}/raw", "raw")
        png = rows_per_second(f"{folder}/encoded", "encoded")
        requests = requests_per_row_group(folder)
        state = State.create(CIFAR10, torch.device("cpu"))
        size = parameter_count(state.net) * BYTES_PER_PARAMETER
        sum(weight.sum() for weight in state.net.parameters()).backward()
        state.optimizers[0].step()  # creates AdamW's moments
        began = time.process_time()
        snapshot = state.snapshot(CIFAR10, {})
        copied = time.process_time()
        checkpoint.write(snapshot, Path(folder, "checkpoint"))
        written = time.process_time()
    groups = 20_000
    digest = "0" * 64
    rows = MAX_ROWS_PER_ROW_GROUP
    num_rows = groups * rows
    image_bytes = 32 * 32 * 3
    shard = Shard(
        "train/00000.parquet", num_rows, (rows,) * groups, num_rows * image_bytes, digest, (digest,) * groups
    )
    manifest = make_manifest("test", (32, 32, 3), "raw", [], {"train": [shard]}, "")
    text = json.dumps(asdict(manifest), indent=1)
    parsing = time.process_time()
    manifest_from_json(text, "manifest.json")
    parsed = time.process_time()
    copy = size / (copied - began)
    write = size / (written - copied)
    return Measured(raw, png, requests, copy, write, len(text) / groups, (parsed - parsing) / groups)


def rows_per_second(folder: str, kind: Encoding) -> float:
    """Rows read per second; each image shows a wave, so it compresses neither badly nor trivially."""
    location = resolve(folder)
    rows = MAX_ROWS_PER_ROW_GROUP
    waves = np.sin(np.linspace(0, 9, 32 * 32 * 3) + np.arange(rows)[:, None])
    pixels = ((waves + 1) * 127).astype(np.uint8).reshape(rows, 32, 32, 3)
    images = pixels if kind == "raw" else [png_bytes(image) for image in pixels]
    shard = write_shard(location, "train/00000.parquet", images, None, rows_per_row_group=rows)
    manifest = make_manifest("test", (32, 32, 3), kind, [], {"train": [shard]}, "")
    read_row_group(location, manifest, "train", 0)
    began = time.process_time()
    count = 0
    while time.process_time() - began < 2:
        count += len(read_row_group(location, manifest, "train", 0)[0])
    return count / (time.process_time() - began)


def requests_per_row_group(folder: str) -> float:
    """Reads of a file, from opening to a row group's pixels: each is a GET of S3; one more request gets the size."""
    path = f"{folder}/raw/train/00000.parquet"
    with Counted(path) as file:
        pq.ParquetFile(pa.PythonFile(file, mode="r"), pre_buffer=True).read_row_group(0, use_threads=False)
        return file.reads + 1


class Counted(io.FileIO):
    reads = 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        return super().read(size)


@cache
def flops_per_image(config: Config) -> float:
    """FLOPs of a training step per image."""
    return mfu.flops_per_image(build_net(override(config, {"train.precision": "float32"})).eval(), config)


def all_reduce_s(gpus: int, num_bytes: float) -> float:
    """Each GPU sends 2 (N - 1) / N of the gradient over the slowest link, in as many steps as a tree is deep.

    Source: Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms.
    """
    link = public("nvlink") if gpus <= 8 else min(public("nvlink"), public("network"))
    latency = 2 * math.log2(gpus) * public("latency")
    return 2 * (gpus - 1) / gpus * num_bytes / (link * public("bus_share")) + latency


def public(name: str) -> float:
    value = PUBLIC[name][0]
    assert value is not None
    return value


@dataclass(frozen=True)
class Plan:
    """The needs of a run on `gpus` GPUs; rates are per second."""

    gpus: int
    images: float
    step_s: float
    all_reduce_s: float
    cores: float
    bytes: float
    requests: float
    object_store: float
    dollars: float


def plan(config: Config, gpus: int, utilisation: float, measured: Measured) -> Plan:
    """The plan for `gpus` GPUs; the backward pass, two thirds of the step, hides as much of `all_reduce_s` as fits."""
    image = config.model.image_size**2 * config.model.channels
    compute = IMAGES_PER_GPU * flops_per_image(config) / (public("peak") * utilisation)
    reduce = all_reduce_s(gpus, 4.0 * parameters(config))
    step = compute + max(0.0, reduce - 2 / 3 * compute)
    images = gpus * IMAGES_PER_GPU / step
    cores = images / (measured.raw_rows * 32 * 32 * 3 / image)  # time per row is proportional to its pixels
    requests = images / rows_of(image) * measured.requests
    # Each core holds the chunk it reads, and the chunk before, which waits to be fetched.
    store = 2 * math.ceil(cores) * CHUNK_IMAGES * image
    dollars = gpus * public("gpu_price") + cores * public("core_price")
    dollars += requests * 3600 * public("get_price")
    return Plan(gpus, images, step, reduce, cores, images * image, requests, store, dollars)


def rows_of(image_bytes: int) -> int:
    """Images of a row group, as `prepare` makes them."""
    return min(MAX_ROWS_PER_ROW_GROUP, ROW_GROUP_BYTES // image_bytes)


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return parameter_count(build_net(config))


@dataclass(frozen=True)
class Arguments:
    """What is known better than by default."""

    utilisation: float | None = None
    """Measured share of the peak (benchmarks/step.py on a GPU). None: that of Ho et al. 2020."""


def main() -> None:
    own = read(Arguments, __doc__).utilisation
    measured = measure()
    published = 21 * 128 * flops_per_image(CIFAR10) / 420e12
    source = PUBLIC["utilisation"][1] if own is None else "of the peak: measured, benchmarks/gpu.md"
    PUBLIC["utilisation"] = (own or published, source)
    text = page(measured, own or published)
    tables.result(OUT).write_text(text)
    print(text)


def page(measured: Measured, utilisation: float) -> str:
    """docs/design/scale.md."""
    plans = {
        (name, gpus): plan(config, gpus, utilisation, measured)
        for name, config in {"cifar10": CIFAR10, "celeba64": CELEBA64}.items()
        for gpus in GPUS
    }
    cifar10 = {gpus: plans["cifar10", gpus] for gpus in GPUS}
    image = 32 * 32 * 3
    every = CIFAR10.train.checkpoint_every_images
    size = parameters(CIFAR10) * BYTES_PER_PARAMETER
    write_s = size / measured.write
    upload_s = size / public("s3_stream")
    largest = cifar10[GPUS[-1]]
    limit = public("get_limit")
    tasks = BYTES_PER_WORKER // (CHUNK_IMAGES * image)
    worst = max(p.object_store / p.gpus for p in plans.values())
    than = "more than" if largest.requests > limit else "below"
    days = SIZES["100 TB"] / image / measured.raw_rows / 3600 / 24
    due = ", ".join(f"{every / p.images:,.1f} s on {gpus}" for gpus, p in cifar10.items())
    flops = ", ".join(f"{flops_per_image(config) / 1e9:.1f} G" for config in (CIFAR10, CELEBA64))
    gpu_rows = "\n".join(gpu_row(name, p) for (name, _), p in plans.items())
    size_rows = "\n".join(size_row(name, total, cifar10, measured) for name, total in SIZES.items())
    public_rows = "\n".join(f"| {source} | {value:.3g} |" for value, source in PUBLIC.values())
    return f"""\
# From 1 to 256 GPUs, from 1 GB to 100 TB

Computed by [benchmarks/scale.py](../../benchmarks/scale.py), a model with a line or two per quantity. Nothing on this
page was run on GPUs. It shows where the next bottleneck is, not how soon it is reached. {tables.machine()}.

## More GPUs: {IMAGES_PER_GPU} images each a step, raw shards in S3

| preset | GPUs | images/s | step | all-reduce | cores that read | S3 | requests/s | object store | $/hour |
|---|---|---|---|---|---|---|---|---|---|
{gpu_rows}

The cores read, check and decode a local file. TLS, the object store and the dealing of blocks need more cores; how
many is not known, so provide several times as many.

- **1 GPU.** Its machine has enough cores to read. There is nothing to set.
- **8 GPUs, one machine.** The all-reduce hides behind the backward pass. Reading needs cores that the workers leave
  free (`--cluster.cpus-per-worker`), or a pool of machines without GPUs.
- **Reading ahead** may take {human(BYTES_PER_WORKER)} of the object store for each worker, and
  {OBJECT_STORE_SHARE:.0%} of it in all; a task reads {CHUNK_IMAGES:,} images. So {tasks} tasks of
  `cifar10` and {tasks // 4} of `celeba64` may run at once for each worker. The column `object store` needs
  {human(worst)} a worker at most.
- **256 GPUs.** The global batch is {GPUS[-1] * IMAGES_PER_GPU:,}. It needs another learning rate and warm-up, or fewer
  images a GPU. At least {math.ceil(largest.cores)} cores read, on separate machines. {largest.requests:,.0f} requests
  a second are {than} the {limit:,.0f} that S3 answers for one prefix; larger row groups need fewer. One actor deals
  the stream to all workers, which has not been measured with so many.

## More data: raw 32x32 colour images, row groups of {rows_of(image):,}

| shards | images | row groups | manifest | to read it | S3 a month | requests of an epoch | epoch on 8 GPUs | on 256 |
|---|---|---|---|---|---|---|---|---|
{size_rows}

- **Up to 1 TB** nothing changes but the price. In AWS a gateway endpoint for S3 keeps traffic free of charge.
- **100 TB.** The manifest is the bottleneck: JSON with a checksum per row group, which every process reads completely,
  and 256 MiB of it at most. Row groups of sixteen times the size make it a sixteenth (`rows_per_row_group` of
  `ddpm.data.prepare.prepare`), and tasks sixteen times as large. Larger manifests would need Parquet, one part per
  split. To read all images once takes one core {days:,.1f} days; `ddpm prepare` uses all cores of a cluster
  (`--parallel` for files in a folder that all nodes see).

## Checkpoints

`cifar10` has {parameters(CIFAR10) / 1e6:.1f} M weights and checkpoints of {human(size)} (net, EMA, AdamW). Rank 0
writes them, with any number of GPUs. A GPU copies them to pinned memory beside the next step:
{size / public("pcie") * 1e3:.0f} ms of {cifar10[1].step_s * 1e3:.0f}. A CPU waits for the copy,
{size / measured.copy:.2f} s here. Writing and hashing take {write_s:.1f} s beside the
next steps, and sending to S3 over one connection {upload_s:.0f} s. The preset asks for one
every {every:,} images, which would be every
{due} GPUs: with many GPUs ask for fewer (`--train.checkpoint-every-images`), not more often than every
{write_s + upload_s:.0f} s.
{CIFAR10.train.keep_checkpoints} are kept; in a versioned bucket those deleted cost money until they expire.

## Constants

| measured here, one core | |
|---|---|
| rows a second, 32x32 colour, raw, checksum included | {measured.raw_rows:,.0f} |
| the same, PNG | {measured.png_rows:,.0f} |
| requests a row group | {measured.requests:.0f} |
| a checkpoint copied in memory | {human(measured.copy)}/s |
| a checkpoint written and hashed | {human(measured.write)}/s |
| manifest, a row group | {measured.manifest_bytes:.0f} B, {measured.manifest_s * 1e6:.1f} us |
| FLOPs of an image, forward and backward: `cifar10`, `celeba64` | {flops} |

| taken from elsewhere | |
|---|---|
{public_rows}

Prices are list prices as known when this was written, and change: look them up before you rely on them.
"""


def gpu_row(name: str, p: Plan) -> str:
    cells = [f"`{name}`", p.gpus, f"{p.images:,.0f}"]
    cells += [f"{p.step_s * 1e3:.1f} ms", f"{p.all_reduce_s * 1e3:.2f} ms"]
    cells += [math.ceil(p.cores), f"{human(p.bytes)}/s", f"{p.requests:,.1f}", human(p.object_store)]
    return row(*cells, f"{p.dollars:,.0f}")


def size_row(name: str, total: float, plans: dict[int, Plan], measured: Measured) -> str:
    """A row of the table of sizes, for raw 32x32 colour images."""
    images = total / (32 * 32 * 3)
    groups = images / rows_of(32 * 32 * 3)
    cells = [name, human(images, ""), f"{groups:,.0f}", human(groups * measured.manifest_bytes)]
    cells += [f"{groups * measured.manifest_s:,.1f} s", f"{total * public('month_price'):,.2f} $"]
    cells += [f"{groups * measured.requests * public('get_price'):,.2f} $"]
    return row(*cells, *(f"{images / plans[gpus].images / 3600:,.2f} h" for gpus in (8, 256)))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def human(value: float, unit: str = "B") -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} P{unit}"


if __name__ == "__main__":
    main()
