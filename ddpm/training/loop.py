"""Algorithm 1 of Ho et al. 2020 (arXiv:2006.11239), on any number of workers.

The micro-batch is the unit of order and noise. A forward pass takes as many images as memory allows (passes.py).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import nn

from ddpm.build import build_net, build_objective, build_sampler
from ddpm.config.json import check_values
from ddpm.config.tree import Config
from ddpm.data.plan import ReadOrder, check_batches
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.augmentation import augmented
from ddpm.models import dropout
from ddpm.models.compile import compile_blocks
from ddpm.models.precision import has_bfloat16
from ddpm.runs import checkpoint
from ddpm.training import passes
from ddpm.training.recorder import Recorder
from ddpm.training.runtime import Runtime
from ddpm.training.state import State, lr_at
from ddpm.training.transfers import HostToDevice
from ddpm.utils import devices
from ddpm.utils.errors import UserError

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
    max_images = passes.images_that_fit(state, loss_of, config, dropouts, runtime)
    passes.fix_buckets(model, max_images, loss_of, config, dropouts, runtime.world_size)
    recorder = Recorder(config, runtime, state)
    batches = _wait_for_first(recorder.timed(batches))
    to_device = HostToDevice(runtime.device)
    stop = not runtime.may_begin()

    while state.images_seen < config.train.total_images and not stop:
        losses = []
        micro_batches = [next(batches) for _ in range(share)]
        for part in passes.split(micro_batches, max_images):
            noise = passes.draws(part, config, state.step, runtime.device)
            x_0, label = passes.inputs(part, config, noise, to_device)
            with (
                passes.forward(model, len(x_0), part.is_last),
                passes.masks(part, config, state.step, dropouts, to_device),
            ):
                # The objective draws t and eps from `noise`: diffusion/objectives.py, Gaussian.loss.
                loss = loss_of(model, x_0, label, noise, state.images_seen / config.train.total_images)
                # Averaged over the workers, this is the mean over the global batch, whatever their shares.
                (loss.value * (len(x_0) * runtime.world_size / batch_size)).backward()
            losses.append(loss._replace(value=loss.value.detach()))
        grad_norm = nn.utils.clip_grad_norm_(weights, config.optim.grad_clip)
        finite = grad_norm.isfinite() & torch.stack([loss.value for loss in losses]).isfinite().all()
        bad, num_bad, stop = runtime.agree(~finite, at_once=recorder.is_due())
        _count_skipped(state, config, num_bad)
        state.descend(lr_at(config, state.images_seen), bad=bad)
        recorder.add(losses, grad_norm, bad=bad)
        state.net.zero_grad(set_to_none=True)
        state.step += 1
        state.images_seen += batch_size
        recorder.after_step(stop)
    return state


def check(config: Config) -> None:
    """Raise UserError for a config that would fail at the first step, before anything is started."""
    check_values(config)
    check_batches(config)
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
    """Raise UserError for a ValueError or TypeError of the set-up: a restart would fail, too."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(
            f"training cannot begin: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _wait_for_first(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Wait until the first of `batches` has arrived, which may take long; returns all of them."""
    first = list(islice(batches, 1))
    return chain(first, batches)


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
