"""Features of a small classifier trained on the data set itself, suited to digits and clothes.

ImageNet nets were not trained on 8x8 digits. This net has a fixed seed, trains in the order of the plan, and is cached
by the fingerprint of its training data.

Axes: N images, H W, C channels, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.data.reading import DataSet, PlanReader
from ddpm.evaluation.features import Cache, normalised
from ddpm.utils import images
from ddpm.utils.digests import digest_of
from ddpm.utils.errors import UserError
from ddpm.utils.progress import Display

RECIPE = "classifier/1"
"""Cache version: bump when net, training or features change."""
SIZE = 128
SEED = 0
TRAIN_IMAGES = 128_000
MAX_EPOCHS = 100
"""Limits training on a few hundred images."""
BATCH_SIZE = 128
CHUNK_IMAGES = 8192
LR = 2e-3


class Classifier:
    """The input of the last layer of a trained net from `build_net`, scaled to the length sqrt(F)."""

    name = "classifier"
    size = SIZE

    def __init__(self, net: nn.Sequential) -> None:
        self.net = net.eval().requires_grad_(False)
        self.digest = digest_of(net.state_dict(), RECIPE)

    def features(self, image: Tensor) -> Tensor:
        return normalised(self.net[:-1].to(image.device)(images.to_model(image)))


def build(train: DataSet, cache: Cache, train_images: int = TRAIN_IMAGES) -> Classifier:
    """The classifier of the data set, from the cache or trained on the split `train`.

    The same split gives the same weights on the same machine. On another machine weights may differ in rounding, so
    comparisons use one cache.

    Args:
        train_images: images seen in training, over all epochs, of which there are at most MAX_EPOCHS.
    """
    manifest = train.manifest
    if len(manifest.class_names) < 2:
        raise UserError(
            f"{train.location.uri} has no classes to train a classifier on; use the feature net lite0, inception or "
            "pixels"
        )
    net = build_net(manifest.channels, len(manifest.class_names))
    train_images = min(train_images, MAX_EPOCHS * train.rows.num_rows)
    name = f"{RECIPE.replace('/', '-')}-{train_images}-{train.key}"
    net.load_state_dict(cache.get(name, lambda: _train(net, train, train_images)))
    return Classifier(net)


def build_net(channels: int, num_classes: int) -> nn.Sequential:
    """Three convolutions, the mean over the image, and a hidden layer of F; the last module is the output layer."""

    def block(width_in: int, width_out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(width_in, width_out, 3, stride, padding=1), nn.BatchNorm2d(width_out), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(
            *block(channels, 32, 1),
            *block(32, 64, 2),
            *block(64, 128, 2),
            nn.AdaptiveAvgPool2d(2),  # mean of each quarter: the position of a stroke matters
            nn.Flatten(),
            nn.Linear(512, SIZE),
            nn.ReLU(),
            nn.Linear(SIZE, num_classes),
        )


def _train(net: nn.Sequential, train: DataSet, train_images: int) -> dict[str, Tensor]:
    """Adam with a one-cycle learning rate, in the order of the plan."""
    net.train()
    reader = PlanReader(train, train.plan(SEED, CHUNK_IMAGES))
    steps = -(-train_images // BATCH_SIZE)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1)
    with Display("training a classifier", train_images) as display:
        for start in range(0, steps * BATCH_SIZE, CHUNK_IMAGES):
            chunk = reader.read(start, min(start + CHUNK_IMAGES, steps * BATCH_SIZE))
            batches = (torch.from_numpy(array).split(BATCH_SIZE) for array in (chunk.image, chunk.label))
            for image, label in zip(*batches, strict=True):
                loss = F.cross_entropy(net(images.to_model(image)), label)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            display.update(min(start + CHUNK_IMAGES, train_images))
    return net.state_dict()
