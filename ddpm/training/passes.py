"""The forward and backward passes of a step: which images each takes, and their noise.

Noise is drawn for whole micro-batches, whatever part of them a pass takes, so the size of a pass changes no number.

Axes: B images of a pass, C channels, H W.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.config.tree import Config
from ddpm.data.plan import ReadOrder
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.augmentation import LossOf
from ddpm.diffusion.rng import Rng
from ddpm.models import dropout
from ddpm.models.dropout import Dropout
from ddpm.training.runtime import Runtime
from ddpm.training.state import State
from ddpm.training.transfers import HostToDevice
from ddpm.utils import devices, images
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PerMicroBatch, PhiloxGenerator, generator
from ddpm.utils.seeding import Purpose


@dataclass(frozen=True)
class Pass:
    """The images of a forward and backward pass."""

    micro_batches: Sequence[MicroBatch]
    rows: slice
    """The images of the pass, among those of its micro-batches."""
    is_last: bool
    """Whether it is the last pass of a step on this worker."""


def largest(config: Config, world_size: int) -> int:
    """The images of the largest pass of any worker."""
    share = ReadOrder.from_config(config).share(0, world_size)  # rank 0 takes the most
    num_images = len(share) * config.train.micro_batch_size
    return min(num_images, config.train.forward_images or num_images)


def split(micro_batches: Sequence[MicroBatch], max_images: int) -> Iterator[Pass]:
    """The passes of a step, of at most `max_images` images each."""
    size = len(micro_batches[0].image)
    num_images = size * len(micro_batches)
    for start in range(0, num_images, max_images):
        stop = min(start + max_images, num_images)
        first = start // size
        held = micro_batches[first : -(-stop // size)]
        yield Pass(held, slice(start - first * size, stop - first * size), is_last=stop == num_images)


def draws(part: Pass, config: Config, step: int, device: torch.device) -> Rng:
    """The generator of flips, other augmentation, t, eps and dropped labels, in this order."""
    seed = config.train.seed
    own = [generator(device, seed, Purpose.TRAIN, step, each.index) for each in part.micro_batches]
    return PerMicroBatch(own, config.train.micro_batch_size, part.rows)


def masks(
    part: Pass, config: Config, step: int, layers: Sequence[Dropout], to_device: HostToDevice
) -> AbstractContextManager[None]:
    """A context for one pass: dropout's masks. Their keys are drawn on the CPU, the same for every device."""
    if not layers:
        return nullcontext()
    seed = config.train.seed
    shape = (len(layers), config.train.micro_batch_size, 2)
    own = [
        PhiloxGenerator(seed, Purpose.DROPOUT, step, each.index).integers(2**32, shape)
        for each in part.micro_batches
    ]
    keys = (torch.cat(own, dim=1)[:, part.rows] - 2**31).int()
    return dropout.keyed(layers, to_device(keys.numpy()))


def inputs(part: Pass, config: Config, noise: Rng, to_device: HostToDevice) -> tuple[Tensor, Tensor | None]:
    """x_0 [B, C, H, W], flipped at random if configured, and the labels if the net takes them."""
    stored = to_device(np.concatenate([each.image for each in part.micro_batches])[part.rows])
    x_0 = images.to_model(stored, config.data.x_0_max)
    if config.data.horizontal_flip:
        mirrored = noise.uniform([len(x_0)]) < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    if not config.model.num_classes:
        return x_0, None
    return x_0, to_device(np.concatenate([each.label for each in part.micro_batches])[part.rows])


@contextmanager
def forward(model: nn.Module, num_images: int, is_last: bool) -> Iterator[None]:
    """A context for one pass: gradients add up on this worker; the last pass of a step averages them over workers."""
    without_sync: AbstractContextManager = nullcontext()
    if isinstance(model, nn.parallel.DistributedDataParallel) and not is_last:
        without_sync = model.no_sync()
    try:
        with without_sync:
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a forward pass of {num_images} images does not fit into the GPU's memory; --train.forward-images "
            "sets how many it takes"
        ) from error


def images_that_fit(
    state: State, loss_of: LossOf, config: Config, layers: Sequence[Dropout], runtime: Runtime
) -> int:
    """The images of a pass that fits into the memory of every worker's GPU: `largest`, or that halved several times.

    Each worker tries a pass of empty images, on the bare net: a pass that fails half-way would leave the other workers
    waiting for its gradients. On a CPU the largest is not tried.
    """
    limit = largest(config, runtime.world_size)
    if runtime.device == devices.CPU:
        return limit
    num_images = limit
    while not _fits(num_images, state, loss_of, config, layers):
        if num_images == 1:
            raise UserError(
                "a forward and backward pass of one image does not fit into the GPU's memory beside the weights; use a "
                "smaller net (--model.base-width), or --train.precision bfloat16"
            )
        num_images = -(-num_images // 2)
    num_images = int(runtime.gather(torch.tensor([num_images], device=runtime.device)).min())
    if num_images < limit and runtime.store is not None:
        runtime.store.warn(
            f"a pass of {limit} images does not fit into the memory of every GPU, so passes take {num_images}; the "
            "images and the noise of every step are the same"
        )
    return num_images


def _fits(num_images: int, state: State, loss_of: LossOf, config: Config, layers: Sequence[Dropout]) -> bool:
    """Whether a pass fits beside the optimizers' state, which the first step allocates."""
    net = state.net
    try:
        state_of_optimizers = []
        if not state.optimizer_tensors():
            shapes = state.optimizer_shapes().values()
            device = next(net.parameters()).device
            state_of_optimizers = [torch.empty(shape, device=device) for shape in shapes]
        _empty_pass(net, num_images, loss_of, config, layers)
        del state_of_optimizers
    except torch.OutOfMemoryError:
        return False
    finally:
        net.zero_grad(set_to_none=True)
    return True


def fix_buckets(
    model: nn.Module,
    num_images: int,
    loss_of: LossOf,
    config: Config,
    layers: Sequence[Dropout],
    world_size: int,
) -> None:
    """Fix DDP's buckets before the first step, by a pass of empty images, with more than two workers.

    DDP rebuilds its buckets after the first backward pass, in the order in which that computed the gradients. The
    buckets decide in which order the gradients of the workers are summed, so a resumed run must have the final ones
    from its first step on. With two workers every order gives the same sum.
    """
    if world_size <= 2:
        return
    with forward(model, num_images, is_last=True):
        _empty_pass(model, num_images, loss_of, config, layers)
    model.zero_grad(set_to_none=True)


def _empty_pass(
    model: nn.Module, num_images: int, loss_of: LossOf, config: Config, layers: Sequence[Dropout]
) -> None:
    """A forward and backward pass of empty images."""
    net = config.model
    device = next(model.parameters()).device
    x_0 = torch.zeros(num_images, net.channels, net.image_size, net.image_size, device=device)
    label = torch.zeros(num_images, dtype=torch.int64, device=device) if net.num_classes else None
    keys = torch.zeros(len(layers), num_images, 2, dtype=torch.int32, device=device)
    noise = generator(device, config.train.seed, Purpose.TRAIN)
    with dropout.keyed(layers, keys):
        loss_of(model, x_0, label, noise, 1.0).value.backward()
