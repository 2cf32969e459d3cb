"""Write docs/five-minutes.png: python docs/five_minutes.py

The rows of benchmarks/quality-emoji.png, which benchmarks/quality.py wrote, with a label beside each.
"""

from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

REPO = Path(__file__).resolve().parent.parent
ROWS = REPO / "benchmarks/quality-emoji.png"
OUT = REPO / "docs/five-minutes.png"
TITLE = "Emoji drawn by three nets of the same size, each trained for five minutes on two CPU cores"
LABELS = [
    ("Real emoji", "held out from training"),
    ("diffusers", "its default settings"),
    ("diffusers", "our settings, best rate"),
    ("ddpm-on-ray", "preset folder, defaults"),
]
"""The rows of the picture, from the top."""
TILE = 66
"""Pixels of an image with its padding."""
COLUMNS = 11
LEFT = 216
TOP = 40
MARGIN = 12


def main() -> None:
    with Image.open(ROWS) as opened:
        rows = opened.convert("RGB")
    assert rows.height // TILE == len(LABELS), "a label for each row"
    width = LEFT + COLUMNS * TILE + MARGIN
    picture = Image.new("RGB", (width, TOP + rows.height + MARGIN), "white")
    picture.paste(rows.crop((0, 0, COLUMNS * TILE + 2, rows.height)), (LEFT, TOP))
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), TITLE, fill="black", font=font(16, "bold"))
    for i, (name, settings) in enumerate(LABELS):
        y = TOP + i * TILE + 15
        draw.text((MARGIN, y), name, fill="black", font=font(16, "bold"))
        draw.text((MARGIN, y + 21), settings, fill="#505050", font=font(14, "normal"))
    picture.save(OUT, optimize=True)
    print(f"picture     {OUT}")


def font(size: int, weight: str) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(file, size)


if __name__ == "__main__":
    main()
