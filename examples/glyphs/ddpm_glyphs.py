"""Letters and digits rendered from fonts: tens of thousands of real shapes, nothing downloaded.

The fonts are matplotlib's DejaVu faces. Image i depends on (seed, i) alone, so any range can be rendered anywhere.

Axes: N images, H W, C channels.
"""

import string
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Interval
from numpy.random import RandomState
from PIL import Image, ImageDraw, ImageFont

from ddpm.config.kinds import Kind
from ddpm.data.row_group import Labels, Pixels
from ddpm.data.sources.sources import DataSeed, Square, held_out

KIND = Kind("ddpm_glyphs:Glyphs")
"""What the entry point returns."""

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
FACES = tuple(
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
)

# Rendered at twice the size and reduced, so that a rotated edge is as smooth as an upright one.
OVERSAMPLING = 2
# Fractions of the image's side: the font's size, and the maximum shift of the glyph from the image's centre.
FONT_SIZES = (0.6, 0.85)
MAX_SHIFT = 0.06
MAX_ROTATION_DEGREES = 15.0


@dataclass(frozen=True)
class Glyphs(Square):
    """Letters and digits (A-Z a-z 0-9) in 12 typefaces, rendered with random size, position and slant; no download."""

    class_names: ClassVar = tuple(CHARACTERS)
    channels: ClassVar = 1
    num_images: Annotated[int, Interval(ge=2, le=10**9)] = 31_000
    """Images of all 62 classes together; 5 % of them are held out."""
    size: Annotated[int, Interval(ge=16, le=256)] = 32
    """Height and width."""
    seed: DataSeed = 0
    name: str = field(default="glyphs", init=False)
    encoding: Literal["raw"] = field(default="raw", init=False)

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(rows) for split, rows in self._rows.items()}

    def identity(self) -> dict[str, Any]:
        return asdict(self)

    def read(self, split: str, start: int, stop: int) -> tuple[Pixels, Labels]:
        rows = self._rows[split][start:stop]
        images = [draw(self.seed, i, self.size) for i in rows.tolist()]
        return np.stack(images), rows % len(CHARACTERS)

    @cached_property
    def _rows(self) -> dict[str, Labels]:
        return held_out(self.num_images, self.seed)


def draw(seed: int, index: int, size: int) -> Pixels:
    """Image `index`, of class index mod 62: uint8 [size, size, 1]."""
    random = RandomState([seed, index])  # numpy promises this stream for all its versions
    side = size * OVERSAMPLING
    face = FACES[random.randint(len(FACES))]
    points = random.randint(int(FONT_SIZES[0] * side), int(FONT_SIZES[1] * side) + 1)
    center = side / 2 + random.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * side
    angle = random.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)

    font = _font(face, points)
    character = CHARACTERS[index % len(CHARACTERS)]
    # Centre the ink, not the baseline: a "p" reaches below it, a "T" does not.
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    canvas = Image.new("L", (side, side))
    origin = (center[0] - (left + right) / 2, center[1] - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(origin, character, fill=255, font=font, anchor="ls")
    canvas = canvas.rotate(angle, Image.Resampling.BICUBIC).reduce(OVERSAMPLING)
    return np.asarray(canvas, np.uint8)[..., None]


@cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # half a second, and only where images are rendered

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    # Raqm, the other engine, is missing on some machines, and may place a letter differently.
    return ImageFont.truetype(str(path), points, layout_engine=ImageFont.Layout.BASIC)
