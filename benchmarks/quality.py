"""Training time until images are good: our preset beside lucidrains' Trainer and diffusers' recipe.

    python benchmarks/quality.py race [--minutes 12] [--shards URI] [--folder runs/quality]
    python benchmarks/quality.py train ours | lucidrains | diffusers      # one of them alone
    python benchmarks/quality.py judge                                    # what has not been judged yet
    python benchmarks/quality.py plot

The three train on the same images, on all cores, and take turns of a minute: the others are suspended (SIGSTOP), so
that a machine that gets busy slows all equally. Ours is `jobs/train.py` as a user types it. Averaged weights are saved
during training; their time is the training time until then, for ours from the command, for the peers from their first
step. Afterwards every net samples the same number of images with the same sampler, on its own schedule, and KID
compares them with the same held-out images. The table goes to benchmarks/quality.md, above the text written by hand,
the plot beside it.
"""

import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import tyro
from harness import tables
from harness.arguments import read
from harness.judged import (
    REPO,
    Judged,
    crossing,
    picture,
    read_judged,
    span,
    train_command,
    write_judged,
)
from harness.turns import Contestant, Spent, Turn, ended_after, read_turns, spent
from peers import quality as peers

from ddpm.checkpoints import checkpoint
from ddpm.config import SampleConfig
from ddpm.config_io import to_json
from ddpm.data.manifest import MANIFEST, read_manifest
from ddpm.data.reading import DataSet
from ddpm.diffusion import samplers, schedules
from ddpm.diffusion.objectives import Model, Objective
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.diffusion.schedules import Schedule
from ddpm.evaluation import nets
from ddpm.evaluation.features import features_of
from ddpm.evaluation.metrics import kid
from ddpm.evaluation.reference import Cache, images_of, real_features
from ddpm.presets import PRESETS
from ddpm.storage import locations
from ddpm.training.state import parameter_count
from ddpm.utils import images
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.seeding import Purpose

Name = Literal["ours", "lucidrains", "diffusers"]
NAMES: tuple[Name, ...] = get_args(Name)
SAMPLER = SampleConfig(sampler="dpmpp_2m", num_sample_steps=20, eta=1.0)
"""The sampler of all nets; by benchmarks/samplers.md it is as good as all 1000 steps of Algorithm 2."""
MARKS = (0.04, 0.08, 0.125, 0.17, 0.25, 0.33, 0.5, 0.67, 0.83, 1.0)
"""Times at which nets are evaluated, as shares of all minutes; each trainer's nearest snapshot is used."""
THRESHOLDS = (1.0, 0.7, 0.5, 0.1, 0.05)
VALUE = 0.1
"""The target value of KID, a line in the plot."""
NUM_REAL, BATCH_SIZE = 2000, 50
CHECKPOINT_IMAGES = 6400
JUDGED = "judged.json"


@dataclass(frozen=True)
class Arguments:
    """What to run, and where."""

    what: tyro.conf.Positional[Literal["race", "train", "judge", "plot"]]
    who: tyro.conf.Positional[Name | None] = None
    """train: the trainer to run."""
    minutes: float = 12.0
    """Minutes of training for each."""
    turn_s: float = 60.0
    num_images: int = 500
    preset: str = "fashion-mnist"
    flags: str = ""
    """More flags for jobs/train.py."""
    shards: str | None = None
    """The data set, if it is prepared already."""
    folder: Path = Path("runs/quality")

    @property
    def uri(self) -> str:
        return self.shards or str(self.folder.absolute() / "data")

    def of(self, name: Name) -> Path:
        return self.folder.absolute() / name


class Snapshot(NamedTuple):
    """Averaged weights during training."""

    path: Path
    images_seen: int
    written: float
    """Seconds since the epoch."""


def contestants() -> list[Name]:
    """Ours, and the peers whose packages are installed."""
    return [name for name in NAMES if name not in peers.PACKAGE or find_spec(peers.PACKAGE[name])]


def race(arguments: Arguments, names: Sequence[Name]) -> None:
    """Train in turns until each trainer has had its minutes; a trainer that has stays suspended."""
    prepare(arguments)
    waiting = {
        name: Contestant(command(name, arguments), arguments.of(name), environment(arguments))
        for name in names
        if read_turns(arguments.of(name)) is None
    }
    with ended_after(list(waiting.values())):
        while waiting:
            for name, contestant in list(waiting.items()):
                wall_s = trained(name, arguments, contestant.turns, time.time()).wall_s
                contestant.turn(min(arguments.turn_s, 60 * arguments.minutes - wall_s))
                wall_s = trained(name, arguments, contestant.turns, time.time()).wall_s
                print(f"{name:10} trained {wall_s / 60:5.2f} minutes", flush=True)
                if contestant.ended or wall_s > 60 * arguments.minutes - 1:
                    del waiting[name]


def command(name: Name, arguments: Arguments) -> list[str]:
    """The command that starts a trainer."""
    folder = str(arguments.of(name))
    if name != "ours":
        return [sys.executable, peers.__file__, name, folder]
    train = train_command(arguments.preset, Path(folder), "run", CHECKPOINT_IMAGES)
    return [*train, "--data.shards", arguments.uri, *shlex.split(arguments.flags)]


def environment(arguments: Arguments) -> dict[str, str]:
    """The environment of a trainer: that of a terminal, with no number of threads set."""
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{arguments.folder.absolute()}/mlflow.db"}
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | tracking


def trained(name: Name, arguments: Arguments, turns: Sequence[Turn], until: float) -> Spent:
    """Training time until `until`: of ours from the start, of a peer from its first step."""
    if name == "ours":
        return spent(turns, until)
    first = arguments.of(name) / peers.FIRST_STEP
    return spent(turns, until) - spent(turns, first.stat().st_mtime if first.exists() else until)


def prepare(arguments: Arguments) -> None:
    """Prepare the data set, the peers' images, and the config that sets the size of their nets."""
    place = locations.resolve(arguments.uri)
    if not place.child(MANIFEST).exists():
        job = [sys.executable, str(REPO / "jobs/prepare.py"), arguments.preset, arguments.uri]
        subprocess.run(job, check=True)
    config = PRESETS[arguments.preset]
    arguments.of("ours").mkdir(parents=True, exist_ok=True)
    for name in contestants()[1:]:
        folder = arguments.of(name)
        folder.mkdir(exist_ok=True)
        if read_turns(folder) is None:
            (folder / peers.CONFIG).write_text(to_json(config))
        weights = parameter_count(peers.NET[name](config))
        print(f"{name:10} {weights:,} weights", flush=True)
        if not (folder / peers.IMAGES).exists():
            (folder / peers.IMAGES).symlink_to(_pictures(arguments))


def _pictures(arguments: Arguments) -> Path:
    """A folder with an image file for every image to train on."""
    folder = arguments.folder.absolute() / "images"
    if not folder.exists():
        part, train = folder.with_suffix(".part"), open_data(arguments)
        part.mkdir(parents=True, exist_ok=True)
        for start in range(0, train.rows.num_rows, 4096):
            pixels = images_of(train, start, min(start + 4096, train.rows.num_rows)).image
            for i, image in enumerate(pixels, start):
                (part / f"{i:06d}.png").write_bytes(images.png_bytes(image))
        part.rename(folder)
    return folder


def open_data(arguments: Arguments) -> DataSet:
    place = locations.resolve(arguments.uri)
    return DataSet(place, read_manifest(place), "train")


def snapshots(name: Name, arguments: Arguments) -> Iterator[Snapshot]:
    """Snapshots of a trainer, oldest first."""
    if name == "ours":
        for file in sorted(arguments.of(name).glob(f"run/{checkpoint.PREFIX}*/{checkpoint.CHECKSUMS}")):
            seen = checkpoint.read_state(file.parent)["images_seen"]
            yield Snapshot(file.parent, seen, file.stat().st_mtime)
        return
    for file in sorted(arguments.of(name).glob("*.safetensors")):
        yield Snapshot(file, int(file.stem), file.stat().st_mtime)


def load(name: Name, path: Path, arguments: Arguments) -> tuple[Model, Objective, Schedule]:
    """The net of a snapshot, the meaning of its output, and its schedule."""
    if name != "ours":
        return peers.LOAD[name](path, peers.read_config(arguments.of(name)), False)
    trained = checkpoint.load_net(path)
    trained.net.autocast_dtype = None  # all nets sample in float32
    return trained.net, trained.objective, schedules.build(trained.config.schedule)


@torch.no_grad()
def draw(
    net: Model, objective: Objective, schedule: Schedule, shape: tuple[int, int, int], n: int
) -> torch.Tensor:
    """Images uint8 [N, H, W, C], drawn from the same noise for every net."""
    sampler, drawn = samplers.build(SAMPLER, schedule, math.prod(shape)), []
    for start in range(0, n, BATCH_SIZE):
        generators = [PhiloxGenerator(0, Purpose.SAMPLE, i) for i in range(start, min(start + BATCH_SIZE, n))]
        noise = PerImageNoise(generators, shape)
        x_0 = sampler(lambda x_t, t: objective.denoise(net, x_t, t, None), noise)
        drawn.append(images.to_uint8(x_0))
    return torch.cat(drawn)


def judge(arguments: Arguments) -> None:
    """Compute KID of the snapshots at the marks that have none yet."""
    train = open_data(arguments)
    held_out = train.held_out()
    assert held_out is not None, "Fashion-MNIST has a split test"
    place = locations.resolve(arguments.uri)
    cache, cpu = Cache(place.child("evaluation")), torch.device("cpu")
    by = nets.build("classifier", train, cache)
    real = real_features(held_out, by, cache, NUM_REAL, cpu)
    manifest = train.manifest
    shape = manifest.channels, manifest.height, manifest.width
    judged = read_judged(arguments.folder / JUDGED)
    known = {(j.name, j.images_seen) for j in judged if j.num_images == arguments.num_images}
    for name, snapshot, had in chosen(arguments):
        if (name, snapshot.images_seen) in known:
            continue
        drawn = draw(*load(name, snapshot.path, arguments), shape, arguments.num_images)
        value, error = kid(features_of(by, drawn), real)
        minutes = had.wall_s / 60, had.cpu_s / 60
        judged.append(Judged(name, snapshot.images_seen, *minutes, value, error, arguments.num_images))
        print(f"{name:10} {judged[-1].minutes:5.2f} minutes: KID {value:.4f} +- {error:.4f}", flush=True)
        write_judged(arguments.folder / JUDGED, judged)
        grid = images.png_bytes(images.grid(drawn[:64].numpy()))
        (arguments.of(name) / f"{snapshot.images_seen:012d}.png").write_bytes(grid)


def chosen(arguments: Arguments) -> list[tuple[Name, Snapshot, Spent]]:
    """The snapshots nearest to the marks, early marks first, with the time their trainer had had."""
    found: list[tuple[float, Name, Snapshot, Spent]] = []
    for name in NAMES:
        turns = read_turns(arguments.of(name)) or []
        every = [(s, trained(name, arguments, turns, s.written)) for s in snapshots(name, arguments)]
        for mark in (share * arguments.minutes for share in MARKS) if turns and every else ():
            snapshot, had = min(every, key=lambda one: abs(one[1].wall_s / 60 - mark))
            if (name, snapshot, had) not in [one[1:] for one in found]:
                found.append((mark, name, snapshot, had))
    return [(name, snapshot, had) for _, name, snapshot, had in sorted(found, key=lambda one: one[0])]


def plot(arguments: Arguments) -> None:
    """The table, as Markdown, and the plot."""
    judged = [j for j in read_judged(arguments.folder / JUDGED) if j.num_images == arguments.num_images]
    curves = {name: sorted((j for j in judged if j.name == name), key=lambda j: j.minutes) for name in NAMES}
    curves = {name: curve for name, curve in curves.items() if curve}
    config = PRESETS[arguments.preset]
    counts = {name: f"{parameter_count(peers.NET[name](config)):,}" for name in curves if name != "ours"}
    counts["ours"] = f"{parameter_count(peers.build_net(config)):,}"
    how = (
        f"KID-classifier of {arguments.num_images} images (20 steps of `dpmpp_2m` with eta 1, as for all) against "
        f"{NUM_REAL} held-out ones of {config.data.source}, over the time trained, in turns of {arguments.turn_s:g} s "
        f"(`python benchmarks/quality.py race --minutes {arguments.minutes:g}`). "
        f"{tables.machine()}."
    )
    rows: list[list[object]] = []
    for name, curve in curves.items():
        cells = [span(curve, value) for value in THRESHOLDS]
        speed = curve[-1].images_seen / curve[-1].minutes / 60
        rows.append([name, counts[name], *cells, f"{speed:.0f}"])
    for name in curves:
        if name != "ours" and "ours" in curves:
            cells = [_ratio(curves["ours"], curves[name], value) for value in THRESHOLDS]
            rows.append([f"{name} / ours", "", *cells, ""])
    reached = tables.table(
        ["trainer", "weights", *(f"minutes to KID {value:g}" for value in THRESHOLDS), "images/s"], rows
    )
    points: list[list[object]] = []
    for j in (j for curve in curves.values() for j in curve):
        minutes = f"{j.minutes:.2f}", f"{j.processor_minutes:.2f}"
        points.append([j.name, *minutes, f"{j.images_seen:,}", f"{j.value:.4f} ± {j.error:.4f}"])
    tables.write(
        __file__,
        "Time to quality",
        how,
        "",
        *reached,
        "",
        "In brackets: one standard error of KID to each side.",
        "",
        "![KID over minutes](quality.png)",
        "",
        *tables.table(["trainer", "minutes", "CPU minutes", "images seen", "KID"], points),
    )
    picture(__file__, "KID-classifier", curves, [VALUE])


def _ratio(ours: Sequence[Judged], theirs: Sequence[Judged], value: float) -> str:
    a, b = crossing(ours, value), crossing(theirs, value)
    if math.isinf(a):
        return ""
    return f"> {theirs[-1].minutes / a:.1f}" if math.isinf(b) else f"{b / a:.1f}"


def main() -> None:
    arguments = read(
        Arguments,
        __doc__,
        minutes=0.7,
        turn_s=15.0,
        num_images=20,
        preset="digits",
        flags="--train.batch-size 32",
    )
    if arguments.what in ("race", "train"):
        race(arguments, [arguments.who] if arguments.who else contestants())
    if arguments.what in ("race", "judge"):
        judge(arguments)
    if arguments.what in ("race", "plot"):
        plot(arguments)


if __name__ == "__main__":
    main()
