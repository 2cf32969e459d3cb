"""What a run takes, computed before it starts: weights, passes, the size of a checkpoint, and memory.

The net is built and run on PyTorch's meta device, which computes shapes alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddpm.build import build_net
from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.diffusion.augmentation import CONDITIONS
from ddpm.models import dropout
from ddpm.training import optimizers, passes
from ddpm.training.state import parameter_count

FLOAT32 = 4
"""Bytes of a number."""
META = torch.device("meta")


@dataclass(frozen=True)
class Footprint:
    """The weights of a run, its passes, and the bytes that they take."""

    weights: int
    micro_batches: int
    """Micro-batches per step, over all workers."""
    checkpoint: int
    """Size of a checkpoint in bytes."""
    images: int
    """Images per forward pass."""
    memory: int | None
    """Bytes of a worker during a pass, in float32 and not compiled; None: the net cannot run on the meta device."""

    def __str__(self) -> str:
        parts = [
            f"{self.weights:,} weights",
            f"{self.micro_batches} micro-batches a step",
            f"checkpoints of {_size(self.checkpoint)}",
        ]
        if self.memory is not None:
            parts.append(f"a pass of {self.images} images takes about {_size(self.memory)} in float32")
        return ", ".join(parts)


def footprint(config: Config) -> Footprint:
    """What training takes with the largest number of images that a pass of `config` has."""
    with META:
        net = build_net(replace(config, train=replace(config.train, precision="float32")))
    weights = parameter_count(net)
    moments = 2 * weights
    if config.optim.kind == "muon":
        moments -= sum(weight.numel() for weight in optimizers.matrices(net))
    num_images = passes.largest(config, config.cluster.world_sizes()[0])
    saved = _saved_bytes(net, config, num_images)
    return Footprint(
        weights=weights,
        micro_batches=config.train.batch_size // config.train.micro_batch_size,
        checkpoint=FLOAT32 * (2 * weights + moments),  # the net and its EMA
        images=num_images,
        memory=None if saved is None else FLOAT32 * (3 * weights + moments) + saved,  # gradients, too
    )


def _saved_bytes(net: nn.Module, config: Config, num_images: int) -> int | None:
    """Bytes that a forward pass keeps for the backward pass, besides the weights."""
    own = {weight.untyped_storage() for weight in net.parameters()}
    saved = dict[torch.UntypedStorage, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in own:
            saved[storage] = storage.nbytes()
        return tensor

    shape = (num_images, config.model.channels, config.model.image_size, config.model.image_size)
    x_t = torch.zeros(shape, device=META)
    t = torch.zeros(num_images, dtype=torch.int64, device=META)
    given = {"augmented": torch.zeros(num_images, CONDITIONS, device=META)} if config.data.augment else {}
    layers = dropout.layers(net)
    keys = torch.zeros(len(layers), num_images, 2, dtype=torch.int32, device=META)
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            dropout.keyed(layers, keys),
        ):
            net(x_t, t if kinds.objective(config.objective.process).uses_time else None, None, **given)
    except (NotImplementedError, RuntimeError):  # a net with operations that need numbers
        return None
    return sum(saved.values())


def _size(num_bytes: int) -> str:
    """A number of bytes as text, such as 7.2 MB."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e9:,.1f} GB"
