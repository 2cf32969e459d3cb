"""The preset `folder`: its net has the size, colours and classes of the images; few images are augmented.

The choice depends on the images and the flags --size, --net and --autoencoder alone, never on the hardware.
"""

from dataclasses import replace
from pathlib import Path

from ddpm.config.presets import FOLDER, SMALL_NET, Images, NetSize
from ddpm.config.tree import Config, UNetConfig
from ddpm.utils.errors import UserError

SIZES = (8, 16, 32)
"""Image sizes that the preset chooses from; --size sets another one."""
MAX_PIXELS_SIZE = 64
"""The largest size of a net that sees pixels; a larger image is for an autoencoder."""
MAX_SIZE = 256
ENCODED_SIZE = 128
"""The size of images that are encoded, unless --size says another one."""
NUM_PROBED = 64
"""Images whose size and colours are read."""
FEW = 1_000
"""With fewer training images, the preset augments them. It sees each more than 160 times, and without augmentation the
held-out loss of 500 images was lowest after 173 passes, that of 100 after 128 (benchmarks/few_images.md)."""
AUGMENT = 0.12
"""The probability for CIFAR-10 of Karras et al. 2022, Appendix F.2."""
MEDIUM_IMAGES = 12_800_000
"""Images that the medium net is trained on: 100,000 steps of 128."""
SMALL = replace(SMALL_NET, base_width=16, channels=3)
LATENT = UNetConfig(base_width=48, blocks_per_resolution=2, attention_resolutions=(8,), norm_groups=8)
"""For latents on two cores: few pixels in many channels, so a wide net."""
MEDIUM = UNetConfig(dropout=0.1)
"""Ho et al. 2020, Appendix B: 128 channels, two blocks a resolution, attention at 16."""
MEDIUM_MULTIPLIERS = {8: (1, 2), 16: (1, 2, 2), 32: (1, 2, 2, 2)}
"""By size; larger ones have those of CelebA 64x64."""


def preset(images: Images) -> Config:
    """The preset for a folder of images, or for a data set.

    Without --size, the net's size is the smallest of SIZES that is at least the median of the images' shorter sides,
    else the largest. It is grey if all images are. Several subfolders with images are its classes. Fewer than FEW
    training images are augmented, unless they are encoded.
    """
    if images.path is None:
        return _of_data_set(str(images.shards), images.net)
    from ddpm.data.sources.image_folder import Folder  # half a second, and for this preset alone

    if not Path(images.path).is_dir():
        raise UserError(
            f"{images.path} is not a folder on this machine; `folder PATH` trains on the images in a folder"
        )
    source = Folder(path=Path(images.path), size=SIZES[-1])
    # One subfolder alone is no class.
    num_classes = len(source.class_names) if len(source.class_names) > 1 else 0
    if images.autoencoder is not None:
        return _encoded(images, num_classes)
    side, channels = source.probe(NUM_PROBED)
    size = images.size or min((size for size in SIZES if size >= side), default=SIZES[-1])
    if size > MAX_PIXELS_SIZE:
        raise UserError(
            f"--size {size} is more than {MAX_PIXELS_SIZE}, the largest for a net that sees pixels; a larger one needs "
            "--autoencoder KIND:WEIGHTS"
        )
    few = source.splits["train"] < FEW
    config = _with_net(images.net, net_of(size, channels, num_classes, images.net))
    return replace(config, data=replace(config.data, images=images.path, augment=AUGMENT if few else 0.0))


def net_of(
    size: int, channels: int, num_classes: int, net: NetSize, *, is_latent: bool = False
) -> UNetConfig:
    """The net for x_0 of that side and that many channels."""
    if net == "medium":
        chosen = replace(MEDIUM, width_multipliers=MEDIUM_MULTIPLIERS.get(size, (1, 1, 2, 2, 4)))
    elif is_latent:
        chosen = replace(LATENT, width_multipliers=(1, 2) if size <= 16 else (1, 2, 2))
    else:
        chosen = SMALL
    return replace(chosen, image_size=size, channels=channels, num_classes=num_classes)


def _with_net(net: NetSize, model: UNetConfig) -> Config:
    """The preset with that net, and what belongs to its size."""
    if net == "small":
        return replace(FOLDER, model=model)
    train = replace(
        FOLDER.train,
        total_images=MEDIUM_IMAGES,
        batch_size=128,
        micro_batch_size=8,
        log_every_images=12_800,
        checkpoint_every_images=256_000,
        sample_every_images=1_280_000,
    )
    optim = replace(FOLDER.optim, lr_warmup_images=128_000, ema_decay=0.9999)
    return replace(FOLDER, model=model, train=train, optim=optim)


def _encoded(images: Images, num_classes: int) -> Config:
    """The preset for latents of a folder of images."""
    from ddpm.latents import autoencoder  # seconds: PyTorch

    size = images.size or ENCODED_SIZE
    if size > MAX_SIZE:
        raise UserError(f"--size {size} is more than {MAX_SIZE}, the largest")
    loaded = autoencoder.load(str(images.autoencoder))
    shape = autoencoder.shape_of(loaded)
    model = net_of(shape.side(size), shape.channels, num_classes, images.net, is_latent=True)
    config = _with_net(images.net, model)
    data = replace(
        config.data,
        images=images.path,
        image_size=size,
        autoencoder=images.autoencoder,
        latents=loaded.digest,
    )
    return replace(config, data=data, sample=replace(config.sample, num_images=16))


def _of_data_set(shards: str, net: NetSize) -> Config:
    """The preset for a data set of images or latents."""
    from ddpm.data.manifest import read_manifest  # a second: pyarrow
    from ddpm.runs import storage

    manifest = read_manifest(storage.resolve(shards))
    if manifest.height != manifest.width:
        raise UserError(
            f"{shards} holds images of {manifest.height}x{manifest.width}; the nets of folder are square"
        )
    is_latent = manifest.latents is not None
    model = net_of(manifest.height, manifest.channels, len(manifest.class_names), net, is_latent=is_latent)
    config = _with_net(net, model)
    few = manifest.splits["train"].num_rows < FEW if "train" in manifest.splits else False
    sample = replace(config.sample, num_images=16) if is_latent else config.sample
    augment = AUGMENT if few and not is_latent else 0.0
    return replace(config, data=replace(config.data, augment=augment), sample=sample)
