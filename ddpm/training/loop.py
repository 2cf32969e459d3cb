"""Algorithm 1 of Ho et al. 2020 (arXiv:2006.11239), on any number of workers.

Axes: B micro-batch, C channels, H W.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ddpm import config as configs
from ddpm.build import build_net, build_objective, build_sampler
from ddpm.checkpoints import checkpoint
from ddpm.config import Config
from ddpm.data.plan import check_batches, micro_batches_per_step
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.generator import Generator
from ddpm.training.recorder import Recorder
from ddpm.training.runtime import Runtime, Tracker
from ddpm.training.state import State, lr_at
from ddpm.utils import images
from ddpm.utils.errors import UserError
from ddpm.utils.generators import generator
from ddpm.utils.seeding import Purpose, torch_seed


class NonFinite(UserError):
    """The loss or the gradient became infinite or not a number; the weights were not touched by it."""

    exit_code = 1


def train(config: Config, runtime: Runtime, tracker: Tracker) -> State:
    """Train from the newest checkpoint, or from nothing, to config.train.total_images.

    When the runtime asks to stop, it ends with the step it is in, and a checkpoint of it.

    Raises:
        NonFinite: at the first step beyond optim.skip_non_finite whose loss or gradient is not finite; the
            checkpoint before it stands.
        UserError: the checkpoint belongs to another configuration, data cannot be read, or storage fails.
    """
    with runtime.latest_checkpoint() as folder:
        batches = runtime.batches(checkpoint.position(folder))
        state = State.create(config, runtime.device)
        if folder is not None:
            state.restore(folder, config)
    objective = build_objective(config)
    if config.train.compile:
        state.net.compile()
    model = runtime.wrap(state.net)
    weights = list(state.net.parameters())
    batch_size = config.train.batch_size
    share = micro_batches_per_step(batch_size, config.train.micro_batch_size, runtime.world_size)
    share //= runtime.world_size
    recorder = Recorder(config, runtime, tracker, state, objective)
    batches = recorder.timed(batches)
    stop = False

    while state.images_seen < config.train.total_images and not stop:
        losses = []
        for k in range(share):
            micro_batch = next(batches)
            noise = _generator(config, runtime, state.step, micro_batch)
            x_0, label = _to_device(micro_batch, config, runtime.device, noise)
            with nullcontext() if k == share - 1 else _without_sync(model):
                loss = objective.loss(model, x_0, label, noise)  # t and eps are drawn in there, from `noise`
                (loss.value / share).backward()
            losses.append(loss._replace(value=loss.value.detach()))
        grad_norm = nn.utils.clip_grad_norm_(weights, config.optim.grad_clip)
        finite = grad_norm.isfinite() & torch.stack([loss.value for loss in losses]).isfinite().all()
        bad, stop = runtime.any_of(~finite, runtime.wants_stop())
        if bad:
            _skip(state, config)
        else:
            for group in state.optimizer.param_groups:
                group["lr"] = lr_at(config, state.images_seen)
            state.optimizer.step()
            state.ema.update(state.net, state.step)
            recorder.add(losses, grad_norm)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.images_seen += batch_size
        recorder.after_step(stop)
    runtime.flush()
    return state


def check(config: Config) -> None:
    """Raise UserError for what would stop the run on its first step, before anything is started."""
    configs.from_json(configs.to_json(config), "the command line")  # as the checkpoints will be read
    check_batches(config)
    build_objective(config)
    build_sampler(config)
    with torch.device("meta"):
        build_net(config)


def _skip(state: State, config: Config) -> None:
    """Count a step that teaches nothing; every rank comes here in the same step.

    Raises:
        NonFinite: there have been more of them than optim.skip_non_finite.
    """
    if state.skipped_steps >= config.optim.skip_non_finite:
        skipped = f" after {state.skipped_steps} that were skipped" if state.skipped_steps else ""
        raise NonFinite(
            f"step {state.step} ({state.images_seen} images): the loss or the gradient is not finite; stopped"
            f"{skipped}, before it touched the weights. Lower optim.lr or optim.grad_clip, or lengthen "
            "optim.lr_warmup_images; --optim.skip-non-finite N passes over N such steps"
        )
    state.skipped_steps += 1


def _generator(config: Config, runtime: Runtime, step: int, micro_batch: MicroBatch) -> Generator:
    """The generator of flips, t, eps and dropped labels; dropout has a stream of its own."""
    seed, where = config.train.seed, (step, micro_batch.index)
    if (
        config.model.dropout > 0
    ):  # nn.Dropout knows PyTorch's global generator only: 32 bits on CPUs, 64 on GPUs
        torch.manual_seed(torch_seed(seed, Purpose.DROPOUT, *where))
    return generator(runtime.device, seed, Purpose.TRAIN, *where)


def _to_device(
    micro_batch: MicroBatch, config: Config, device: torch.device, noise: Generator
) -> tuple[Tensor, Tensor | None]:
    """x_0 [B, C, H, W] in [-1, 1], some mirrored if the config says so, and the labels if the net wants them."""
    x_0 = images.to_model(torch.from_numpy(micro_batch.image).to(device, non_blocking=True))
    if config.data.horizontal_flip:
        mirrored = noise.uniform([len(x_0)]) < 0.5
        x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
    if not config.model.num_classes:
        return x_0, None
    return x_0, torch.from_numpy(micro_batch.label).to(device, non_blocking=True)


def _without_sync(model: nn.Module) -> AbstractContextManager:
    """Let gradients of all but the last micro-batch add up here, before they are averaged over the workers."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
