"""The preset `folder` for a folder of images: its net has their size, colours and classes; few images are augmented."""

from dataclasses import replace
from pathlib import Path

from ddpm.config.presets import FOLDER
from ddpm.config.tree import Config
from ddpm.utils.errors import UserError

SIZES = (8, 16, 32)
"""Image sizes that the preset chooses from; --model.image-size sets a larger one, which is slow on two cores."""
NUM_PROBED = 64
"""Images whose size and colours are read."""
FEW = 1_000
"""With fewer training images, the preset augments them. It sees each more than 160 times, and without augmentation the
held-out loss of 500 images was lowest after 173 passes, that of 100 after 128 (benchmarks/few_images.md)."""
AUGMENT = 0.12
"""The probability for CIFAR-10 of Karras et al. 2022, Appendix F.2."""


def preset(path: str) -> Config:
    """The preset for the images in a folder.

    The net's size is the smallest of SIZES that is at least the median of the images' shorter sides, else the largest.
    It is grey if all images are. Several subfolders with images are its classes. Fewer than FEW training images are
    augmented.
    """
    from ddpm.data.sources.image_folder import Folder  # half a second, and for this preset alone

    if not Path(path).is_dir():
        raise UserError(
            f"{path} is not a folder on this machine; `folder PATH` trains on the images in a folder"
        )
    images = Folder(path=Path(path), size=SIZES[-1])
    side, channels = images.probe(NUM_PROBED)
    size = min((size for size in SIZES if size >= side), default=SIZES[-1])
    # One subfolder alone is no class.
    num_classes = len(images.class_names) if len(images.class_names) > 1 else 0
    model = replace(FOLDER.model, image_size=size, channels=channels, num_classes=num_classes)
    augment = AUGMENT if images.splits["train"] < FEW else 0.0
    return replace(FOLDER, data=replace(FOLDER.data, images=path, augment=augment), model=model)
