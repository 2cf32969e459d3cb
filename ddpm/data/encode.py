"""From a data set of images to one of their latents, with Ray Data.

Tasks read and decode images, actors encode them, on GPUs where there are any, and write shards; the manifest is written
last. The set of latents has the splits of the images, and their rows in the same row groups; a shard has at most
SHARD_IMAGES of them, or one row group, so that a kill costs no more. The same command resumes. The numbers are float32,
one thread per actor on CPUs: the same images and autoencoder give the same set.

Mean and deviation by channel are those of the first images that are encoded, at least MEASURED_IMAGES of the training
split, in an order that a seed decides.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.cluster import ray_init
from ddpm.data import latents, prepare
from ddpm.data.manifest import FORMAT, Latents, Manifest, Shard, make_manifest, write_manifest
from ddpm.data.row_group import Pixels
from ddpm.data.shards import kept_shard, read_row_group, write_shard
from ddpm.latents.autoencoder import Autoencoder, Shape, shape_of
from ddpm.latents.scaling import Scaling
from ddpm.runs.lock import DriverLock
from ddpm.runs.storage import Location
from ddpm.utils import devices, images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.progress import track
from ddpm.utils.retry import as_user_error, retry_io

log = logging.getLogger(__name__)

SHARD_IMAGES = 512
"""Images of a shard, unless a row group has more."""
MEASURED_IMAGES = 1024
"""Training images from which mean and deviation are measured."""
DECODED_IMAGES = 100
"""Training images that are decoded to choose the limit."""
LIMITS = (3.0, 4.0, 5.0, 6.0)
"""Deviations at which latents may be clipped."""
MAX_LOSS_DB = 0.1
"""The largest loss of PSNR by storing latents as uint8."""
ENCODED_AT_ONCE = 16
"""Images encoded in one pass."""
SCALING = "scaling.json"
"""A note of an unfinished set: its scaling."""
TIMEOUT_S = 300.0
"""Seconds that storage may fail."""


@dataclass(frozen=True)
class _Task:
    """A shard to be written: consecutive row groups of a shard of images."""

    path: str
    split: str
    first: int
    """The first row group, counted over the split."""
    row_groups: tuple[int, ...]
    """Rows of each."""
    mirrored: bool

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


class _Measured(NamedTuple):
    """The scaling of a set, and what it costs."""

    scaling: Scaling
    clipped_share: float
    loss_db: float


def encode(
    pixels: Location,
    manifest: Manifest,
    location: Location,
    autoencoder: Autoencoder,
    kind: str,
    *,
    mirror: bool = False,
) -> Manifest:
    """Write the latents of the images at `pixels` as a data set at `location`, unless it is there; resume.

    Ray must be connected.

    Args:
        manifest: of the images.
        kind: the autoencoder's.
        mirror: mirror images of the training images follow them, so that there are twice as many.
    """
    if manifest.latents is not None:
        raise UserError(f"{pixels.uri} holds latents; name the set of images that they were made from")
    shape = shape_of(autoencoder)
    if manifest.height != manifest.width:
        raise UserError(
            f"{pixels.uri} holds images of {manifest.height}x{manifest.width}; they must be square"
        )
    side = shape.side(manifest.height)
    options = options_of(manifest, autoencoder, mirror)
    existing = prepare.find(location, options)
    if existing is not None:
        return existing
    with DriverLock(location, "data set", "URI", log.warning, waits=True) as lock:
        existing = prepare.find(location, options)  # another process may have made it meanwhile
        if existing is not None:
            return existing
        prepare.begin(manifest.splits, location, options)
        with as_user_error(f"{location.uri} is not finished; run the same command again to continue"):
            latents.store(autoencoder, location)
            pool = _Pool(pixels, manifest, location, kind, autoencoder.digest)
            tasks = _tasks(manifest, mirror)
            measured = _measured(pool, tasks, autoencoder)
            total = sum(task.num_rows for task in tasks)
            done = pool.run(tasks, measured.scaling)
            shards = dict(track("images encoded", total, done, lambda each: each[0].num_rows))
            lock.check()
        ordered: dict[str, list[Shard]] = {split: [] for split in manifest.splits}
        for task in tasks:
            ordered[task.split].append(shards[task])
        made = make_manifest(
            manifest.source,
            shape=(side, side, shape.channels),
            encoding="raw",
            class_names=manifest.class_names,
            shards=ordered,
            options=options,
            latents=_described(pixels, manifest, autoencoder, kind, shape, measured, mirror),
        )
        with as_user_error(f"cannot write to {location.uri}"):
            write_manifest(location, made)
            location.child(prepare.NOTES).delete()
        return made


def options_of(manifest: Manifest, autoencoder: Autoencoder, mirror: bool) -> str:
    """Hash of everything that decides the bytes of the set of latents."""
    options = [FORMAT, manifest.fingerprint, autoencoder.digest, mirror, MEASURED_IMAGES, SHARD_IMAGES]
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()


def _described(
    pixels: Location,
    manifest: Manifest,
    autoencoder: Autoencoder,
    kind: str,
    shape: Shape,
    measured: _Measured,
    mirror: bool,
) -> Latents:
    return Latents(
        pixels=pixels.uri,
        pixels_fingerprint=manifest.fingerprint,
        autoencoder=kind,
        digest=autoencoder.digest,
        factor=shape.factor,
        mean=measured.scaling.mean,
        std=measured.scaling.std,
        limit=measured.scaling.limit,
        clipped_share=measured.clipped_share,
        loss_db=measured.loss_db,
        mirrored=mirror,
    )


def _tasks(manifest: Manifest, mirror: bool) -> list[_Task]:
    """The shards to be written, those of a split in order."""
    tasks = []
    for split, content in manifest.splits.items():
        number = 0
        for mirrored in (False, True) if mirror and split == "train" else (False,):
            first = 0
            for shard in content.shards:
                per_shard = max(1, SHARD_IMAGES // max(shard.row_groups))
                for i in range(0, len(shard.row_groups), per_shard):
                    row_groups = shard.row_groups[i : i + per_shard]
                    tasks.append(
                        _Task(f"{split}/{number:05d}.parquet", split, first + i, row_groups, mirrored)
                    )
                    number += 1
                first += len(shard.row_groups)
    return tasks


def _measured(pool: "_Pool", tasks: Sequence[_Task], autoencoder: Autoencoder) -> _Measured:
    """The scaling of the set, noted beside its shards: an earlier call may have measured it."""
    note = pool.location.child(prepare.NOTES).child(SCALING)
    if note.exists():
        kept = strict_json.parse(_Note, note.read(), f"{note.uri} is damaged; remove it")
        return _Measured(Scaling(kept.mean, kept.std, kept.limit), kept.clipped_share, kept.loss_db)
    of_images = [task for task in tasks if task.split == "train" and not task.mirrored]
    chosen = []
    num_images = 0
    for i in np.random.RandomState(0).permutation(len(of_images)):
        if num_images >= MEASURED_IMAGES:
            break
        chosen.append(of_images[i])
        num_images += of_images[i].num_rows
    encoded = track("latents measured", num_images, pool.latents(chosen), lambda each: each[0].num_rows)
    z_of = dict(encoded)
    z = torch.cat([z_of[task] for task in chosen])
    by_channel = z.double().transpose(0, 1).flatten(1)
    mean = tuple(by_channel.mean(1).tolist())
    std = tuple(by_channel.std(1).tolist())
    x = pool.images_of(chosen[0])[:DECODED_IMAGES]
    measured = _with_limit(mean, std, z, x, z_of[chosen[0]][: len(x)], autoencoder)
    found = _Note(mean, std, measured.scaling.limit, measured.clipped_share, measured.loss_db)
    note.write(json.dumps(asdict(found)).encode(), durable=True)
    for task in chosen:
        pool.write(task, measured.scaling.to_uint8(z_of[task]).numpy())
    return measured


@dataclass(frozen=True)
class _Note:
    """Content of scaling.json."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    limit: float
    clipped_share: float
    loss_db: float


@torch.no_grad()
def _with_limit(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    z: Tensor,
    x: Tensor,
    z_of_x: Tensor,
    autoencoder: Autoencoder,
) -> _Measured:
    """The scaling with the limit that costs least, by the error of decoded images `x` [N, 3, H, W]."""

    def error(z: Tensor) -> float:
        decoded = torch.cat([autoencoder.decode(part) for part in z.split(ENCODED_AT_ONCE)])
        return (decoded.clamp(-1, 1) - x).square().mean().item()

    right = error(z_of_x)
    best: _Measured | None = None
    for limit in LIMITS:
        scaling = Scaling(mean, std, limit)
        loss_db = 10 * math.log10(error(scaling.from_uint8(scaling.to_uint8(z_of_x))) / right)
        if best is not None and loss_db >= best.loss_db:
            break
        best = _Measured(scaling, scaling.clipped_share(z), loss_db)
    assert best is not None
    if best.loss_db > MAX_LOSS_DB:
        raise UserError(
            f"stored as uint8, the latents of this autoencoder lose {best.loss_db:.2f} dB of the decoded images; at "
            f"most {MAX_LOSS_DB} are accepted"
        )
    return best


class _Pool:
    """Ray Data's tasks and actors, which read images and encode them.

    Args:
        pixels: the data set of images.
        manifest: its manifest.
        location: of the set of latents, with the autoencoder.
        kind: of the autoencoder.
        digest: of the autoencoder.
    """

    def __init__(
        self, pixels: Location, manifest: Manifest, location: Location, kind: str, digest: str
    ) -> None:
        self.location = location
        self._pixels = pixels
        self._manifest = manifest
        self._kind = kind
        self._digest = digest

    def images_of(self, task: _Task) -> Tensor:
        """The images of a task, [N, 3, H, W]."""
        image, _ = _read(self._pixels, self._manifest, task)
        return _inputs(image)

    def write(self, task: _Task, stored: Pixels) -> Shard:
        """Write the shard of a task, whose latents are known."""
        _, label = _read(self._pixels, self._manifest, task)
        return _write(self.location, task, stored, label if self._manifest.class_names else None)

    def latents(self, tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        """Each task with its latents [N, C, h, w] float32."""
        for task, row in self._rows(tasks, None):
            yield task, torch.from_numpy(np.array(row["latents"][0]))

    def run(self, tasks: Sequence[_Task], scaling: Scaling) -> Iterator[tuple[_Task, Shard]]:
        """Each task with its shard, which is written unless it is kept from an earlier call."""
        missing = []
        for task in tasks:
            shard = kept_shard(self.location, task.path, task.num_rows)
            if shard is None:
                missing.append(task)
            else:
                yield task, shard
        for task, row in self._rows(missing, scaling):
            yield task, strict_json.parse(Shard, str(row["shard"][0]), task.path)

    def _rows(
        self, tasks: Sequence[_Task], scaling: Scaling | None
    ) -> Iterator[tuple[_Task, dict[str, Any]]]:
        """Each task with the row that its actor returns; without scaling, its latents."""
        if not tasks:
            return
        items = [{"number": i, "task": json.dumps(asdict(task))} for i, task in enumerate(tasks)]
        have = ray.cluster_resources()
        cpus = have.get("CPU", 1.0)
        gpus = int(have.get("GPU", 0.0))
        reading = ray_init.reading_cpus(cpus)
        rows = ray.data.from_items(items, override_num_blocks=len(items))
        rows.context.enable_progress_bars = False
        read: Any = _ReadTask(self._pixels, self._manifest)
        images_read = rows.map_batches(read, batch_size=1, batch_format="numpy", num_cpus=reading)
        size = gpus or max(1, round(cpus))
        resources: dict[str, Any] = {"num_cpus": max(0.01, (cpus - reading) / size)}
        if gpus:
            resources = {"num_gpus": 1}
        encoder: Any = _Encoder
        encoded = images_read.map_batches(
            encoder,
            fn_constructor_args=(self.location, self._kind, self._digest, scaling),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(size, len(tasks))),
            **resources,
        )
        try:
            batches: Any = encoded.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0)
            for row in batches:
                yield tasks[int(row["number"][0])], row
        except ray.exceptions.RayTaskError as error:
            raise _told(error) from None


def _told(error: Any) -> BaseException:
    """The user's error in a chain of causes, without the worker's traceback; if there is none, `error` itself.

    Ray Data wraps what a function raises in an exception of its own.
    """
    cause = error.cause
    while cause is not None:
        if isinstance(cause, UserError | OSError):
            return cause
        cause = cause.__cause__
    return error


class _ReadTask:
    """The function of a reading task: adds images and labels to a row that has a _Task."""

    def __init__(self, pixels: Location, manifest: Manifest) -> None:
        self._shared = ray.put((pixels, manifest))  # every task unpickles this object

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        pixels, manifest = ray.get(self._shared)
        image, label = _read(pixels, manifest, _task_in(batch))
        has_label = np.array([bool(manifest.class_names)])
        return {**batch, "image": image[None], "label": label[None], "has_label": has_label}


class _Encoder:
    """An actor with the autoencoder.

    The first task loads it, not the constructor: Ray Data starts an actor whose constructor fails again, for minutes.
    """

    def __init__(self, location: Location, kind: str, digest: str, scaling: Scaling | None) -> None:
        torch.set_num_threads(1)
        self._device = devices.default()
        self._kind = kind
        self._digest = digest
        self._location = location
        self._scaling = scaling

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        loaded: Autoencoder = latents.load(self._location, self._kind, self._digest).to(self._device)
        return loaded

    @torch.no_grad()
    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        task = _task_in(batch)
        parts = []
        for image in np.array_split(batch["image"][0], math.ceil(task.num_rows / ENCODED_AT_ONCE)):
            x = _inputs(image).to(self._device)
            z = self._autoencoder.encode(x.flip(3) if task.mirrored else x)
            parts.append(z.cpu() if self._scaling is None else self._scaling.to_uint8(z).cpu())
        encoded = torch.cat(parts).numpy()
        if self._scaling is None:
            return {"number": batch["number"], "latents": encoded[None]}
        label = batch["label"][0] if batch["has_label"][0] else None
        shard = _write(self._location, task, encoded, label)
        return {"number": batch["number"], "shard": np.array([json.dumps(asdict(shard))])}


def _task_in(batch: dict[str, NDArray[Any]]) -> _Task:
    return strict_json.parse(_Task, str(batch["task"][0]), "a task")


def _read(pixels: Location, manifest: Manifest, task: _Task) -> tuple[Pixels, NDArray[np.int64]]:
    """The images of a task [N, H, W, C], and their labels, zeros if there are none."""
    parts = []
    for i in range(task.first, task.first + len(task.row_groups)):
        read = partial(read_row_group, pixels, manifest, task.split, i)
        parts.append(retry_io(read, where=pixels.uri, timeout_s=TIMEOUT_S))
    image = np.concatenate([image for image, _ in parts])
    labels = [np.zeros(len(image), np.int64) if label is None else label for image, label in parts]
    return image, np.concatenate(labels)


def _inputs(image: Pixels) -> Tensor:
    """uint8 [N, H, W, 1 or 3] as an autoencoder's input [N, 3, H, W]; grey becomes three equal channels."""
    return images.to_model(torch.from_numpy(np.array(image))).expand(-1, 3, -1, -1)


def _write(location: Location, task: _Task, stored: Pixels, label: NDArray[np.int64] | None) -> Shard:
    return write_shard(location, task.path, stored, label, rows_per_row_group=task.row_groups[0])


def about(manifest: Manifest) -> list[str]:
    """Lines for the user about a set of latents."""
    latents = manifest.latents
    assert latents is not None, "it is a set of latents"
    size = manifest.height * latents.factor
    height, width, channels = manifest.shape
    lines = [f"{name:<11} {split.num_rows:,} images" for name, split in manifest.splits.items()]
    return [
        *lines,
        f"latents     {height}x{width} in {channels} channels, of images of {size}x{size}",
        f"stored      within {latents.limit:g} deviations ({latents.clipped_share:.2%} clipped), which costs "
        f"{max(latents.loss_db, 0.0):.3f} dB of the decoded images",
        f"fingerprint {manifest.fingerprint}",
    ]
