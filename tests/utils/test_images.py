"""Images: exact round trips, grids with known pixels, files that other programs can read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.utils import images
from ddpm.utils.images import PADDING

ALL_VALUES = torch.arange(256, dtype=torch.uint8)


def some(n, side=8, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (4, 8, 8, 1), (4, 4, 4, 4), (256, 1, 1, 1)])
def test_round_trip_is_exact_for_all_256_values(shape):
    image = ALL_VALUES.view(shape)
    assert torch.equal(images.to_uint8(images.to_model(image)), image)


def test_to_model():
    image = torch.from_numpy(some(5, 6, 3))
    x = images.to_model(image)
    assert x.shape == (5, 3, 6, 6) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x[2, 1, 3, 4] == image[2, 3, 4, 1].item() / 127.5 - 1
    ends = images.to_model(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert ends.flatten().tolist() == [-1, 1]


def test_to_model_in_another_range():
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    torch.testing.assert_close(images.to_model(image, 1.75), 1.75 * images.to_model(image))


def test_to_uint8_rounds_and_then_clips():
    levels = torch.tensor([-0.4, 0.4, 0.6, 99.4, 99.6, 254.4, 254.6, 255.4, 256.0, -1.0, 1e6, -1e6])
    x = (levels / 127.5 - 1).view(-1, 1, 1, 1)
    expected = [0, 0, 1, 99, 100, 254, 255, 255, 255, 0, 255, 0]
    assert images.to_uint8(x).flatten().tolist() == expected
    assert images.to_uint8(x.double()).flatten().tolist() == expected
    assert images.to_uint8(x).dtype == torch.uint8


@pytest.mark.parametrize("image", [torch.zeros(2, 4, 4, 1), torch.zeros(4, 4, 1, dtype=torch.uint8)])
def test_to_model_rejects_invalid_images(image):
    with pytest.raises(ValueError, match=r"it must be uint8 \[B, H, W, C\]"):
        images.to_model(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns", "rows_cols"), [(5, None, (2, 3)), (6, 2, (3, 2)), (1, 4, (1, 4))])
def test_grid_puts_every_image_in_its_place(n, columns, rows_cols, channels):
    tiles = some(n, 8, channels)
    canvas = images.grid(tiles, columns)
    rows, cols = rows_cols
    step = 48 + PADDING  # 8 pixels, enlarged 6 times
    assert canvas.shape == (rows * step + PADDING, cols * step + PADDING, 3) and canvas.dtype == np.uint8
    rest = canvas.copy()
    for i in range(n):
        top = i // cols * step + PADDING
        left = i % cols * step + PADDING
        tile = canvas[top : top + 48, left : left + 48]
        # Each pixel became a square of 6 x 6, in all three channels.
        blocks = tile.reshape(8, 6, 8, 6, 3)
        assert (blocks == tiles[i][:, None, :, None, :]).all()
        rest[top : top + 48, left : left + 48] = 255
    assert (rest == 255).all()


def test_grid_enlarges_by_whole_factors():
    for side, tile in ((28, 56), (32, 64), (64, 64)):
        assert images.grid(some(1, side)).shape == (tile + 2 * PADDING, tile + 2 * PADDING, 3)
    oblong = images.grid(np.zeros((2, 10, 20, 3), np.uint8), columns=1)
    assert oblong.shape == (2 * (50 + PADDING) + PADDING, 100 + 2 * PADDING, 3)


def test_strip_has_a_row_per_image_and_captions_above():
    rows = [some(4, seed=1), some(4, seed=2)]
    bare = images.strip(rows)
    assert np.array_equal(bare, images.grid(np.concatenate(rows), columns=4))
    captioned = images.strip(rows, captions=["t=999", "t=500", "", "t=0"])
    header = captioned[: -len(bare)]
    assert np.array_equal(captioned[-len(bare) :], bare)
    step = 48 + PADDING
    ink = [(header[:, i * step + PADDING : (i + 1) * step] < 128).any() for i in range(4)]
    assert ink == [True, True, False, True]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(channels):
    canvas = some(1, 20, channels)[0]
    read = np.asarray(Image.open(io.BytesIO(images.png_bytes(canvas))))
    assert np.array_equal(read.reshape(canvas.shape), canvas)
    assert np.array_equal(images.from_png(images.png_bytes(canvas)), canvas)
    assert images.from_png(images.png_bytes(canvas)).shape == canvas.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_all_frames_and_their_time(channels):
    frames = [np.full((16, 16, channels), 60 * i, np.uint8) for i in range(4)]
    with Image.open(io.BytesIO(images.gif_bytes(frames))) as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0
        for i in range(4):
            gif.seek(i)
            assert gif.info["duration"] == 80
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - 60 * i).max() <= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: images.grid(some(0)), "N at least 1"),
        (lambda: images.grid(some(2, channels=2)), "C 1 or 3"),
        (lambda: images.grid(some(2).astype(np.float32)), "images are float32"),
    ],
)
def test_invalid_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
