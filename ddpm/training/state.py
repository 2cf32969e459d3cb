"""What training carries from step to step.

No random state is ever saved: every draw comes from a generator keyed by (seed, purpose, step, micro-batch), so a
resumed run, on any number of workers, draws what the uninterrupted one would have drawn.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm.config import Config
from ddpm.models import unet
from ddpm.models.ema import EMA
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import Purpose, torch_seed


def build_net(config: Config) -> unet.UNet:
    """The net that `config` describes, its weights drawn from the run's seed.

    Raises:
        UserError: the config describes no net that can be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.train.seed, Purpose.INIT))
        try:
            return unet.build(
                config.model,
                time_conditional=config.objective.process != "uniform_mix",
                autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
                num_timesteps=config.schedule.num_timesteps,
                out_channels=config.model.channels * (2 if config.objective.variance == "learned" else 1),
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from None


def lr_at(config: Config, images_seen: int) -> float:
    """The learning rate of the step that begins after `images_seen` images: warm-up, then the schedule."""
    optim = config.optim
    if images_seen < optim.lr_warmup_images:
        return (
            optim.lr
            * (images_seen + config.train.batch_size)
            / (optim.lr_warmup_images + config.train.batch_size)
        )
    if optim.lr_schedule == "constant":
        return optim.lr
    length = max(config.train.total_images - optim.lr_warmup_images, 1)
    progress = min((images_seen - optim.lr_warmup_images) / length, 1.0)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class State:
    """Net, averaged weights, optimizer and position; the same on every rank."""

    net: unet.UNet
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0
    """Optimizer steps taken."""
    images_seen: int = 0
    """Position in the plan."""
    skipped_steps: int = 0
    """Steps of which nothing was learned, since their loss or gradient was not finite."""
    best_held_out_loss: float = math.inf

    @classmethod
    def create(cls, config: Config, device: torch.device) -> "State":
        """The state before the first step."""
        net = build_net(config).to(device)
        optimizer = torch.optim.AdamW(
            net.parameters(),
            lr=config.optim.lr,
            betas=(config.optim.beta_1, config.optim.beta_2),
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        return cls(net, EMA(net, config.optim.ema_decay), optimizer)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's state by weight: {"input.weight.exp_avg": ..., ".exp_avg_sq", ".step"}."""
        tensors = {}
        for name, weight in self.net.named_parameters():
            for key, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def optimizer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `optimizer_tensors` after a step."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, weight in self.net.named_parameters():
            shape = tuple(weight.shape)
            shapes |= {f"{name}.step": (), f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape}
        return shapes

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`."""
        for name, weight in self.net.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.step" in tensors:
                state = {key: tensors[f"{name}.{key}"].to(weight.device, copy=True) for key in keys}
                # As AdamW lays its averages out: like the weight they belong to (channels-last), so that a
                # resumed step runs the very kernels of an uninterrupted one.
                for key in keys[1:]:
                    state[key] = torch.empty_like(weight, requires_grad=False).copy_(state[key])
                self.optimizer.state[weight] = state


def parameter_count(net: nn.Module) -> int:
    """Trainable numbers in `net`."""
    return sum(p.numel() for p in net.parameters())
