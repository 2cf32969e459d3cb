"""Algorithm 1 of Ho et al. 2020 (arXiv:2006.11239), on any number of workers.

The micro-batch is the unit of order and noise. A forward pass takes as many micro-batches as memory allows.

Axes: B images of a forward pass, C channels, H W.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.build import build_net, build_objective, build_sampler
from ddpm.config.json import check_values
from ddpm.config.tree import Config
from ddpm.data.plan import ReadOrder, check_batches
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.augmentation import LossOf, augmented
from ddpm.diffusion.rng import Rng
from ddpm.models import dropout
from ddpm.models.compile import compile_blocks
from ddpm.models.dropout import Dropout
from ddpm.models.precision import has_bfloat16
from ddpm.runs import checkpoint
from ddpm.training.recorder import Recorder
from ddpm.training.runtime import Runtime
from ddpm.training.state import State, lr_at
from ddpm.training.transfers import HostToDevice
from ddpm.utils import devices, images
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PerMicroBatch, PhiloxGenerator, generator
from ddpm.utils.seeding import Purpose

C_COMPILERS = ("gcc", "cc", "clang")
"""torch.compile needs one of these C compilers."""


class NonFinite(UserError):
    """The loss or the gradient is infinite or not a number; the weights are unchanged."""

    exit_code = 1


def train(config: Config, runtime: Runtime) -> State:
    """Train from the newest checkpoint, or from scratch, to config.train.total_images.

    When the runtime asks to stop, training ends after the current step, with a checkpoint.

    Raises:
        NonFinite: the loss or gradient was not finite in more than optim.skip_non_finite steps; the last
            checkpoint stays valid.
        UserError: the config cannot be trained, the checkpoint belongs to another one, data cannot be read, or
            storage fails.
    """
    devices.set_deterministic(runtime.device, config.train.deterministic)
    with runtime.latest_checkpoint() as folder, _as_user_error():
        batches = runtime.batches(checkpoint.images_seen_at(folder))
        state = State.create(_in_one_precision(config, runtime), runtime.device)
        if folder is not None:
            state.restore(folder, config)
        loss_of = augmented(build_objective(config).loss, config.data.augment)
        dropouts = dropout.layers(state.net)
        if compiles(config, runtime.device):
            compile_blocks(state.net)
        model = runtime.wrap(state.net)
    weights = list(state.net.parameters())
    batch_size = config.train.batch_size
    share = len(ReadOrder.from_config(config).share(runtime.rank, runtime.world_size))
    per_pass = min(share, _micro_batches_per_pass(config))
    _fix_buckets(model, loss_of, config, dropouts, per_pass, runtime)
    recorder = Recorder(config, runtime, state)
    batches = recorder.timed(batches)
    to_device = HostToDevice(runtime.device)
    stop = 0

    while state.images_seen < config.train.total_images and not stop:
        losses = []
        for first in range(0, share, per_pass):
            micro_batches = [next(batches) for _ in range(min(per_pass, share - first))]
            noise = _noise(config, runtime, state.step, micro_batches)
            x_0, label = _to_device(micro_batches, config, to_device, noise)
            with (
                _forward_pass(model, len(x_0), is_last=first + per_pass >= share),
                _masks(config, dropouts, state.step, micro_batches, to_device),
            ):
                # The objective draws t and eps from `noise`: diffusion/objectives.py, Gaussian.loss.
                loss = loss_of(model, x_0, label, noise, state.images_seen / config.train.total_images)
                # Averaged over the workers, this is the mean over the global batch, whatever their shares.
                (loss.value * (len(x_0) * runtime.world_size / batch_size)).backward()
            losses.append(loss._replace(value=loss.value.detach()))
        grad_norm = nn.utils.clip_grad_norm_(weights, config.optim.grad_clip)
        finite = grad_norm.isfinite() & torch.stack([loss.value for loss in losses]).isfinite().all()
        flags, (skipped, stop) = runtime.any_of(~finite, runtime.wants_stop(), at_once=recorder.is_due())
        _count_skipped(state, config, skipped)
        state.descend(lr_at(config, state.images_seen), bad=flags[0])
        recorder.add(losses, grad_norm, bad=flags[0])
        state.net.zero_grad(set_to_none=True)
        state.step += 1
        state.images_seen += batch_size
        recorder.after_step(stop > 0)
    return state


def check(config: Config) -> None:
    """Raise UserError for a config that would fail at the first step, before anything is started."""
    check_values(config)
    check_batches(config)
    most = config.train.forward_images
    grain = config.train.micro_batch_size
    if most is not None and most % grain:
        raise UserError(f"train.forward_images is {most}; it must be a multiple of micro_batch_size {grain}")
    build_objective(config)
    build_sampler(config)
    with torch.device("meta"), _as_user_error():
        dropout.layers(build_net(config))


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the net is compiled: as train.compile says, or on an accelerator if this machine has a C compiler."""
    if config.train.compile is None:
        return device != devices.CPU and any(shutil.which(name) for name in C_COMPILERS)
    return config.train.compile


def _in_one_precision(config: Config, runtime: Runtime) -> Config:
    """`config`, in float32 if a worker's device has no bfloat16: Muon's updates must be the same on all workers."""
    lacking = torch.tensor(0.0 if has_bfloat16(runtime.device) else 1.0, device=runtime.device)
    if config.train.precision == "float32" or runtime.mean(lacking) == 0:
        return config
    if runtime.store is not None:
        runtime.store.warn("the net computes in float32: a worker's device has no instructions for bfloat16")
    return replace(config, train=replace(config.train, precision="float32"))


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Raise UserError for a ValueError or TypeError of the set-up: a restart would meet it again."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(
            f"training cannot begin: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _count_skipped(state: State, config: Config, skipped: int) -> None:
    """Count skipped steps, on every rank in the same step; on a GPU they are known one step late."""
    if skipped and state.skipped_steps + skipped > config.optim.skip_non_finite:
        before = f" after skipping {state.skipped_steps} such steps" if state.skipped_steps else ""
        raise NonFinite(
            f"step {state.step} ({state.images_seen} images): the loss or the gradient is not finite; stopped"
            f"{before}, before the weights changed. Lower optim.lr or optim.grad_clip, or lengthen "
            "optim.lr_warmup_images; --optim.skip-non-finite N skips up to N such steps"
        )
    state.skipped_steps += skipped


def _micro_batches_per_pass(config: Config) -> int:
    """The largest number of micro-batches in a forward pass."""
    train = config.train
    return (train.forward_images or train.batch_size) // train.micro_batch_size


def _noise(config: Config, runtime: Runtime, step: int, micro_batches: Sequence[MicroBatch]) -> Rng:
    """The generator of flips, other augmentation, t, eps and dropped labels, in this order."""
    seed = config.train.seed
    return PerMicroBatch(
        [generator(runtime.device, seed, Purpose.TRAIN, step, each.index) for each in micro_batches]
    )


def _masks(
    config: Config,
    layers: Sequence[Dropout],
    step: int,
    micro_batches: Sequence[MicroBatch],
    to_device: HostToDevice,
) -> AbstractContextManager[None]:
    """A context for one pass: dropout's masks. Their keys are drawn on the CPU, the same for every device."""
    if not layers:
        return nullcontext()
    seed = config.train.seed
    shape = (len(layers), config.train.micro_batch_size, 2)
    draws = [
        PhiloxGenerator(seed, Purpose.DROPOUT, step, each.index).integers(2**32, shape)
        for each in micro_batches
    ]
    keys = (torch.cat(draws, dim=1) - 2**31).int()
    return dropout.keyed(layers, to_device(keys.numpy()))


def _to_device(
    micro_batches: Sequence[MicroBatch], config: Config, to_device: HostToDevice, noise: Rng
) -> tuple[Tensor, Tensor | None]:
    """x_0 [B, C, H, W] in [-1, 1], flipped at random if configured, and the labels if the net takes them."""
    x_0 = images.to_model(to_device(np.concatenate([each.image for each in micro_batches])))
    if config.data.horizontal_flip:
        mirrored = noise.uniform([len(x_0)]) < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    if not config.model.num_classes:
        return x_0, None
    return x_0, to_device(np.concatenate([each.label for each in micro_batches]))


def _fix_buckets(
    model: nn.Module,
    loss_of: LossOf,
    config: Config,
    layers: Sequence[Dropout],
    per_pass: int,
    runtime: Runtime,
) -> None:
    """Fix DDP's buckets before the first step, by a pass of empty images, with more than two workers.

    DDP rebuilds its buckets after the first backward pass, in the order in which that computed the gradients. The
    buckets decide in which order the gradients of the workers are summed, so a resumed run must have the final ones
    from its first step on. With two workers every order gives the same sum.
    """
    if runtime.world_size <= 2:
        return
    num_images = per_pass * config.train.micro_batch_size
    net = config.model
    device = runtime.device
    x_0 = torch.zeros(num_images, net.channels, net.image_size, net.image_size, device=device)
    label = torch.zeros(num_images, dtype=torch.int64, device=device) if net.num_classes else None
    keys = torch.zeros(len(layers), num_images, 2, dtype=torch.int32, device=device)
    noise = generator(device, config.train.seed, Purpose.TRAIN)
    with _forward_pass(model, num_images, is_last=True), dropout.keyed(layers, keys):
        loss_of(model, x_0, label, noise, 1.0).value.backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def _forward_pass(model: nn.Module, num_images: int, is_last: bool) -> Iterator[None]:
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
            f"sets how many it takes, a multiple of --train.micro-batch-size"
        ) from error
