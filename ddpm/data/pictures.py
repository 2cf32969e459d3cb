"""One picture of a source: a character drawn from a font, or a file's picture made to fit.

Its own room because it is all that sources.py and files.py share of Pillow.
"""

import io
import string
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ddpm.config import UserError

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
)
"""Of the fonts that matplotlib brings along."""
FORMATS = ("PNG", "JPEG", "WEBP")
"""The encodings that shards may hold (shards.py decodes no others)."""
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's names of pixels with at most 8 bits a channel."""
ORIENTATION = 0x0112
"""EXIF: how to turn the picture; 1 is upright."""


def glyph(seed: int, i: int, size: int, coloured: bool) -> tuple[NDArray[np.uint8], int]:
    """Character i of an endless list: a function of these arguments alone.

    Character, face, height (0.55 to 0.8 of the image), tilt (12 degrees at most), position (0.07 of the image
    at most off the centre) and colours are uniform, from a generator seeded by (seed, i).

    Args:
        size: side of the image, at least 8.
        coloured: one colour on another, one of them dark and the other bright; else white on black.

    Returns:
        uint8 [size, size, C], C 3 when coloured, else 1; and its label, the index in CHARACTERS.
    """
    generator = np.random.default_rng((seed, i))
    label = int(generator.integers(len(CHARACTERS)))
    face = FACES[generator.integers(len(FACES))]
    side = 2 * size  # drawn at twice the size: tilting blurs less
    font = _font(face, round(side * generator.uniform(0.55, 0.8)))
    centre = side * (0.5 + generator.uniform(-0.07, 0.07, 2))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text((centre[0], centre[1]), CHARACTERS[label], fill=255, font=font, anchor="mm")
    mask = mask.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC)
    ink = np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.uint8)[:, :, None]
    if not coloured:
        return ink, label
    colours = generator.integers([[0], [150]], [[106], [256]], (2, 3))  # a dark one and a bright one
    paper, pen = colours[generator.permutation(2)]
    mixed = paper + (pen - paper) * (ink / 255)
    return mixed.round().astype(np.uint8), label


@cache
def _font(face: str, height: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    # Not Raqm, which is there on some machines only and places letters otherwise.
    return ImageFont.truetype(str(path), height, layout_engine=ImageFont.Layout.BASIC)


def fitted(data: bytes, height: int, width: int, channels: int, where: str, crop: int | None = None) -> bytes:
    """An image file as one of the wanted size: itself where it fits already, else a PNG.

    The largest centred part with the wanted proportions is resized (Lanczos; smaller pictures grow). What is
    transparent becomes white. A picture that its EXIF data turns is turned.

    Args:
        data: the file, in any format that Pillow reads.
        where: what to call it in errors.
        crop: first cut out the central square with this side.

    Raises:
        UserError: it is no image, or has more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in PLAIN_MODES:
                raise UserError(f"{where} has pixels of mode {image.mode}; convert it to 8 bits a channel")
            # Fully decoded even where the file is kept as it is: a truncated one is found here, not in training.
            image.load()
            upright = image.getexif().get(ORIENTATION, 1) == 1
            fits = image.size == (width, height) and image.mode in ("L", "RGB") and crop is None
            if fits and upright and image.format in FORMATS:
                return data
            picture = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not an image that can be read: {error}") from None
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if crop is not None:
        left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    file = io.BytesIO()
    ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()
