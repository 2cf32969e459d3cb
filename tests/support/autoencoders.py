"""A small autoencoder of diffusers, and a data set of images for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 16
FACTOR = 2
CHANNELS = 4
CLASSES = ("bright", "dark")


def write_autoencoder(folder: Path, seed: int = 0) -> Path:
    """Write an AutoencoderKL with random weights; images of SIZE become latents of half that size in four channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=CHANNELS,
            norm_num_groups=4,
            sample_size=SIZE,
        )
    net.save_pretrained(folder, safe_serialization=True)
    return folder


def write_photos(folder: Path, num_images: int = 200) -> Path:
    """Write smooth random colour images of two classes as PNG files."""
    random = np.random.RandomState(0)
    for i in range(num_images):
        name = CLASSES[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        coarse = random.randint(0, 128, (4, 4, 3)) + (128 if name == "bright" else 0)
        image = Image.fromarray(coarse.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(folder / name / f"{i:03d}.png")
    return folder
