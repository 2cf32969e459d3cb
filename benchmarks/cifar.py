"""FID over the time and the price of training a preset, and how far that is from published trainings.

    python benchmarks/cifar.py --data shards/cifar10 [--inception-weights FILE] [--workers 8] [--price 2.5]
    python benchmarks/cifar.py --preset fashion-mnist         # a quarter of an hour on two cores

Each seed trains by `jobs/train.py PRESET` as a user types it. Then images are sampled from the averaged weights at
fixed marks of images seen, and compared with the training images, as in the papers: FID by Inception-v3, whose weights
come from a file (torch-fidelity's); without it KID by lite0. The program may be killed and started again at any time:
runs resume, judged marks are in FOLDER/PRESET.json. The table goes to benchmarks/cifar.md (for another preset to
cifar-PRESET.md), above the text written by hand, the plot beside it.

Time is that of the run's own curve train/images_per_s: steps, reading, and what they wait for checkpoints. Sampling and
judging come afterwards and are not in it, nor are the start and what a crash took back; status.json has these.
"""

import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import scale
from harness import tables
from harness.arguments import read
from harness.judged import Judged, picture, read_judged, span, train_command, write_judged

from ddpm.config.tree import SampleConfig
from ddpm.data.ray_stream import open_configured
from ddpm.data.reading import DataSet
from ddpm.evaluation import inputs, nets
from ddpm.evaluation.bits_per_dim import PIECE_IMAGES
from ddpm.evaluation.evaluate import EvalWorker, Piece
from ddpm.evaluation.features import Cache, real_features
from ddpm.evaluation.inputs import Candidate
from ddpm.evaluation.metrics import Moments, fid, kid
from ddpm.runs import curves, run_folder, storage
from ddpm.runs.run_folder import CheckpointName
from ddpm.runs.storage import Location
from ddpm.sampling.pool import WorkerPool
from ddpm.utils import devices
from ddpm.utils.errors import UserError

ANCHORS = """The goal is FID below 4 in 3 hours and at most 3.1 in 5, on one H100. Published, unconditional:

| | FID | time |
|---|---|---|
| DDPM, 35.7 M weights: github.com/FutureXiang/Diffusion | 3.03 | 56 hours of an RTX 3080 Ti |
| TorchCFM: github.com/atong01/conditional-flow-matching | 3.8 | 19 hours of an RTX 4090 |
| EDM: Karras et al. 2022, arXiv:2206.00364 | 1.97 | |
""".splitlines()


@dataclass(frozen=True)
class Race:
    """How a preset is judged."""

    marks: tuple[int, ...]
    """Images seen; multiples of the first, which is the interval of checkpoints."""
    num_images: int
    num_real: int
    features: str
    sample: Mapping[str, Any]
    """Changes to the run's SampleConfig."""
    last: Mapping[str, Any] | None = None
    """The same of another sampler, for the last mark."""
    workers: int = 1


RACES = {
    "cifar10": Race(
        marks=tuple(5_120_000 * i for i in (1, 2, 4, 8, 12, 16, 20)),
        num_images=50_000,
        num_real=50_000,
        features="inception",
        sample={"sampler": "dpmpp_2m", "num_sample_steps": 50, "eta": 1.0},
        last={"sampler": "ddpm", "num_sample_steps": None},
    ),
    "fashion-mnist": Race((6_400, 12_800, 25_600, 51_200), 500, 2000, "lite0", {}, workers=2),
}


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, and its price."""

    preset: str = "cifar10"
    data: str | None = None
    """Folder or URI of the prepared data set. None: jobs/train.py prepares the preset's."""
    inception_weights: str | None = None
    """File of the weights of FID's Inception-v3. None: torch-fidelity's, in torch.hub's folder."""
    workers: int | None = None
    """GPUs to train on; without GPUs, processes."""
    price: float = scale.public("gpu_price")
    """Dollars an hour of one worker."""
    seeds: int = 2
    num_images: int | None = None
    """Images sampled at each mark."""
    features: str | None = None
    marks: tuple[int, ...] = ()
    flags: str = ""
    """More flags for jobs/train.py."""
    folder: Path = Path("runs/race")

    @cached_property
    def race(self) -> Race:
        """The preset's, with what the command line changes."""
        race = RACES.get(self.preset, RACES["fashion-mnist"])
        given = {name: getattr(self, name) for name in ("workers", "num_images", "features", "marks")}
        return replace(race, **{name: value for name, value in given.items() if value})

    @property
    def judged(self) -> Path:
        return self.folder / f"{self.preset}.json"

    def run(self, seed: int) -> Location:
        return storage.resolve(str(self.folder)).child(self.name(seed))

    def name(self, seed: int) -> str:
        return f"{self.preset}-{seed}"


def train(arguments: Arguments, seed: int) -> None:
    """Train to the last mark, from wherever the run is."""
    race = arguments.race
    run = arguments.run(seed)
    if checkpoint_at(run, race.marks[-1]) is not None:
        return
    command = train_command(
        arguments.preset, arguments.folder.absolute(), arguments.name(seed), race.marks[0]
    )
    command += f"--train.total-images {race.marks[-1]} --train.seed {seed} --workers {race.workers}".split()
    command += [] if arguments.data is None else ["--data.shards", arguments.data]
    if code := subprocess.run([*command, *shlex.split(arguments.flags)], check=False).returncode:
        sys.exit(f"training ended with exit code {code}; the same command again continues from there")


def checkpoint_at(run: Location, mark: int) -> Location | None:
    """The first checkpoint after `mark` images."""
    for stored in run_folder.checkpoints(run):
        name = CheckpointName.parse(Path(stored.path).name)
        if name is not None and name.images_seen >= mark:
            return stored
    return None


def trained(run: Location, until: int, workers: int) -> tuple[float, float, float]:
    """Minutes of training up to `until` images, the same of all workers, and the share of steps slower than the median.

    A run whose number of workers changes has a curve of it.
    """
    known = curves.read(run)
    rates = [point for point in known["train/images_per_s"] if point.images_seen <= until]
    numbers = {point.images_seen: point.value for point in known.get("train/workers", [])}
    seconds = list[float]()
    before = 0
    for point in rates:
        seconds.append((point.images_seen - before) / point.value)
        before = point.images_seen
    of_all = sum(s * numbers.get(p.images_seen, workers) for s, p in zip(seconds, rates, strict=True))
    steady = before / statistics.median(point.value for point in rates)
    return sum(seconds) / 60, of_all / 60, max(0.0, 1 - steady / sum(seconds))


class Judge:
    """The real images, the training images as in the papers, and the net that compares with them."""

    def __init__(self, arguments: Arguments, data: DataSet) -> None:
        race = arguments.race
        cache = Cache(data.location.child(inputs.CACHE))
        self.reason = ""
        try:
            self.net = nets.build(race.features, data, cache, arguments.inception_weights)
        except UserError as error:
            if race.features != "inception":
                raise
            self.net = nets.build("lite0", data, cache)
            self.reason = f"Instead of FID here is KID by lite0: {error}."
            print(self.reason, flush=True)
        self.real = real_features(data, self.net, cache, race.num_real, devices.default())
        self.metric = "FID" if self.net.name == "inception" else f"KID-{self.net.name}"

    def score(self, candidate: Candidate, sample: SampleConfig, num_images: int) -> tuple[float, float]:
        """Sample images on all GPUs or cores, and compare them; the value and its standard error, for FID 0."""
        starts = range(0, num_images, PIECE_IMAGES)
        pieces = [Piece(0, start, min(start + PIECE_IMAGES, num_images)) for start in starts]
        settings = inputs.Settings(num_train_images=0)
        worker = partial(
            EvalWorker,
            candidates=[candidate.sampled_with(sample)],
            feature_net=self.net,
            settings=settings,
            held_out_label=None,
        )
        with WorkerPool(worker) as pool:
            drawn = dict(pool.map(EvalWorker.draw, pieces))
        features = np.concatenate([drawn[piece].features for piece in pieces])
        if self.metric == "FID":
            return fid(self._moments, Moments.of(features)), 0.0
        return kid(features, self.real)

    @cached_property
    def _moments(self) -> Moments:
        return Moments.of(self.real)


def judge(arguments: Arguments, seed: int) -> Judge:
    """Score the marks of a run that have no score yet."""
    race = arguments.race
    run = arguments.run(seed)
    by = None
    judged = read_judged(arguments.judged)
    known = {(j.name, j.images_seen, j.how, j.num_images) for j in judged}
    for mark in race.marks:
        stored = checkpoint_at(run, mark)
        assert stored is not None, "training has ended"
        (candidate,) = inputs.read_checkpoints([stored.uri])
        by = by or Judge(arguments, open_configured(candidate.config))
        last = [race.last] if race.last and mark == race.marks[-1] else []
        for changes in (race.sample, *last):
            own = replace(candidate.config.sample, seed=seed, **changes)
            sample = inputs.resolved(candidate.config, own)
            how = f"{by.metric}, {sample.num_sample_steps} steps of {sample.sampler}"
            key = arguments.name(seed), candidate.state["images_seen"], how, race.num_images
            if key in known:
                continue
            minutes, of_all, _ = trained(run, key[1], race.workers)
            value, error = by.score(candidate, sample, race.num_images)
            judged.append(Judged(key[0], key[1], minutes, of_all, value, error, race.num_images, how))
            write_judged(arguments.judged, judged)
            print(f"{key[0]} {key[1]:,} images, {minutes:.2f} minutes: {how}: {value:.4f}", flush=True)
    assert by is not None, "there are marks"
    return by


def write(arguments: Arguments, by: Judge) -> None:
    """The table, as Markdown, and the plot."""
    race = arguments.race
    is_cifar = arguments.preset == "cifar10"
    every = [j for j in read_judged(arguments.judged) if j.num_images == race.num_images]
    judged = [j for j in every if j.how.startswith(f"{by.metric},")]
    by_run = {seed: [j for j in judged if j.name == arguments.name(seed)] for seed in range(arguments.seeds)}
    fast = {
        arguments.name(seed): [j for j in found if j.how == judged[0].how]
        for seed, found in by_run.items()
        if found
    }
    unit, per = ("hours", 60) if is_cifar else ("minutes", 1)
    hours = "worker-hours" if devices.default() == devices.CPU else "GPU-hours"
    values = (10, 5, 4, 3.1) if by.metric == "FID" else (0.1, 0.05)
    reached = [[name, *(span(curve, v, per) for v in values)] for name, curve in fast.items()]
    points = []
    for j in judged:
        gpu_hours = j.processor_minutes / 60
        score = f"{j.value:.2f}" if by.metric == "FID" else f"{j.value:.4f} ± {j.error:.4f}"
        time = f"{j.minutes / per:.2f}", f"{gpu_hours:.2f}", f"{gpu_hours * arguments.price:.2f}"
        points.append([j.name, f"{j.images_seen:,}", *time, j.how.partition(", ")[2], score])
    beside = []
    for seed in (seed for seed, found in by_run.items() if found):
        slower = trained(arguments.run(seed), race.marks[-1], race.workers)[2]
        status = run_folder.read_status(arguments.run(seed))
        assert status is not None, "it has been trained"
        beside.append(
            f"{arguments.name(seed)}: steps slower than the median, which wait for checkpoints or compile, take "
            f"{slower:.1%} of this time. With starts and what crashes took back ({status.images_lost:,} images) the "
            f"run took {status.minutes / per:.2f} {unit}."
        )
    script = str(Path(__file__).with_stem("cifar" if is_cifar else f"cifar-{arguments.preset}"))
    tables.write(
        script,
        f"{by.metric} over the time and price of training {arguments.preset}",
        f"`python benchmarks/cifar.py {shlex.join(sys.argv[1:])}`: {race.num_images:,} images at each mark against "
        f"{len(by.real):,} training images; {race.workers} worker(s) at {arguments.price:.2f} $ an hour. "
        f"{tables.machine(device=devices.default().type)}. {by.reason}",
        "",
        *tables.table(["run", *(f"{unit} to {by.metric} {v:g}" for v in values)], reached),
        "",
        *([*ANCHORS, ""] if is_cifar else ()),
        f"![{by.metric} over {unit}]({Path(script).stem}.png)",
        "",
        *tables.table(["run", "images seen", unit, hours, "$", "sampler", by.metric], points),
        "",
        *beside,
    )
    picture(script, by.metric, fast, values[-1:], unit)


def main() -> None:
    arguments = read(
        Arguments,
        __doc__,
        preset="digits",
        marks=(640, 1280),
        num_images=20,
        features="pixels",
        workers=1,
        seeds=1,
        flags="--train.batch-size 64 --train.log-every-images 640 --model.base-width 8 --model.norm-groups 4",
    )
    for seed in range(arguments.seeds):
        train(arguments, seed)
        write(arguments, judge(arguments, seed))


if __name__ == "__main__":
    main()
