"""The state that training carries from step to step.

No random state is ever saved: every draw comes from a generator keyed by (seed, purpose, step, micro-batch), so a
resumed run, on any number of workers, draws what the uninterrupted one would have drawn.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpm.build import build_net
from ddpm.config.json import to_json
from ddpm.config.tree import Config
from ddpm.models.ema import EMA
from ddpm.runs import checkpoint
from ddpm.runs.checkpoint import Snapshot
from ddpm.training import optimizers
from ddpm.training.transfers import DeviceToHost
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import GENERATOR


def lr_at(config: Config, images_seen: int) -> float:
    """The learning rate of the step that begins after `images_seen` images: warm-up, then the schedule."""
    optim = config.optim
    warmup = config.optim.lr_warmup_images
    batch_size = config.train.batch_size
    if images_seen < warmup:
        return optim.lr * (images_seen + batch_size) / (warmup + batch_size)
    if optim.lr_schedule == "constant":
        return optim.lr
    progress = min((images_seen - warmup) / max(config.train.total_images - warmup, 1), 1.0)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Interval:
    """What the recorder has summed since its last log, over all ranks."""

    sums: list[float]
    """`Recorder._sums`."""
    grad_norm: float
    """The gradient norm of the last step that was not skipped."""


@dataclass
class State:
    """Net, averaged weights, optimizers and position; the same on every rank."""

    net: nn.Module
    ema: EMA
    optimizers: list[Optimizer]
    """Each weight of the net has one."""
    to_host: DeviceToHost
    step: int = 0
    """Optimizer steps taken."""
    images_seen: int = 0
    """Position in the plan."""
    skipped_steps: int = 0
    """Steps without an update, since their loss or gradient was not finite."""
    best_held_out_loss: float = math.inf
    interval: Interval | None = None
    """None: nothing has been saved yet."""
    precision: str = "float32"
    """Precision inside the net."""

    @classmethod
    def create(cls, config: Config, device: torch.device) -> "State":
        """The state before the first step."""
        net = build_net(config).to(device)
        ema = EMA(net, config.optim.ema_decay)
        built = optimizers.build(config, net)
        return cls(net, ema, built, DeviceToHost(device), precision=config.train.precision)

    def descend(self, lr: float, bad: Tensor) -> None:
        """Take an optimizer step, and update the averaged weights; a `bad` step leaves the net's weights unchanged.

        Args:
            bad: [] bool on the weights' device; the optimizers read it there, so that the host need not wait.
        """
        self.to_host.wait_to_write()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # As torch.amp.GradScaler does it: fused optimizers read this flag on the device.
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
        self.ema.update(self.net, self.step)

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
        """Name, weight and optimizer of every weight."""
        owner = dict[nn.Parameter, Optimizer]()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    owner[weight] = optimizer
        for name, weight in self.net.named_parameters():
            yield name, weight, owner[weight]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizers' state by weight: {"input.weight.exp_avg": ..., ".exp_avg_sq", ".step", or ".momentum"}."""
        return {
            f"{name}.{key}": value
            for name, weight, optimizer in self._owned()
            for key, value in optimizer.state.get(weight, {}).items()
        }

    def optimizer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `optimizer_tensors` after a step."""
        return {
            f"{name}.{key}": () if key == "step" else tuple(weight.shape)
            for name, weight, optimizer in self._owned()
            for key in optimizers.STATE[type(optimizer)]
        }

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `optimizer_tensors`."""
        if not tensors:
            return
        for name, weight, optimizer in self._owned():
            for key in optimizers.STATE[type(optimizer)]:
                value = tensors[f"{name}.{key}"].to(weight.device, copy=True)
                if key != "step":
                    # Averages have the memory format of their weight (channels-last). A resumed step must run the
                    # same kernels as an uninterrupted one.
                    value = torch.empty_like(weight, requires_grad=False).copy_(value)
                optimizer.state[weight][key] = value

    def snapshot(self, config: Config, extra: dict[str, Any]) -> Snapshot:
        """Copy the whole state; `extra` goes into state.json.

        On an accelerator the copy is made beside the next step, up to its `descend`; on a CPU training waits for it.
        """
        best = self.best_held_out_loss
        saved = {
            "step": self.step,
            "images_seen": self.images_seen,
            "skipped_steps": self.skipped_steps,
            "best_held_out_loss": best if math.isfinite(best) else None,
            "interval": [*self.interval.sums, self.interval.grad_norm] if self.interval else None,
            "generator": GENERATOR,
        }
        tensors = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer_tensors() if self.step > self.skipped_steps else {},
        }
        copies, wait = self.to_host(tensors)
        return Snapshot(
            images_seen=self.images_seen,
            tensors=copies,
            state={**extra, **saved},
            config=to_json(config),
            wait=wait,
        )

    def restore(self, folder: Path, config: Config) -> None:
        """Restore the checkpoint in `folder`."""
        checkpoint.verify(folder)
        checkpoint.check_same_run(checkpoint.read_config(folder), config, str(folder))
        saved = checkpoint.read_state(folder)
        drawn_with = saved.get("generator", "PyTorch's, with 32 bits of a seed")
        if drawn_with != GENERATOR:
            raise UserError(
                f"{folder} was trained with another random generator ({drawn_with}; now {GENERATOR}), so a resumed "
                f"run would not be the same; start a new run from its weights: --train.init-from {folder}"
            )
        device = next(self.net.parameters()).device
        checkpoint.load_weights(self.net, folder / "net.safetensors")
        checkpoint.load_weights(self.ema.net, folder / "ema.safetensors")
        self.load_optimizer_tensors(self._read_moments(folder, saved, device))
        self.step = saved["step"]
        self.images_seen = saved["images_seen"]
        self.skipped_steps = saved.get("skipped_steps", 0)
        interval = saved.get("interval")
        self.interval = None if interval is None else Interval(interval[:-1], interval[-1])
        best = saved["best_held_out_loss"]
        self.best_held_out_loss = math.inf if best is None else best

    def init_from(self, folder: Path, config: Config) -> None:
        """Load the averaged weights of the checkpoint in `folder`, of any run, before the first image.

        An augmentation-conditioned net can begin with the weights of one that is not, and the reverse.
        """
        checkpoint.verify(folder)
        checkpoint.check_same_net(checkpoint.read_config(folder), config, folder)
        for net in (self.net, self.ema.net):
            checkpoint.load_weights(net, folder / "ema.safetensors", optional="augment_embedding.weight")

    def _read_moments(
        self, folder: Path, saved: Mapping[str, Any], device: torch.device
    ) -> dict[str, Tensor]:
        """The optimizers' state; empty before the first step that was not skipped."""
        path = folder / "optimizer.safetensors"
        tensors = checkpoint.read_tensors(path, device)
        has_learned = saved["step"] > saved.get("skipped_steps", 0)
        if has_learned and not tensors:
            raise UserError(
                f"{path} is empty, as in a registered model, but state.json says images_seen "
                f"{saved['images_seen']}, so its run cannot be resumed; start a new one from its weights: "
                f"--train.init-from {folder}"
            )
        checkpoint.check_fit(checkpoint.shapes(tensors), self.optimizer_shapes() if has_learned else {}, path)
        return tensors


def parameter_count(net: nn.Module) -> int:
    """Number of trainable parameters of `net`."""
    return sum(p.numel() for p in net.parameters())
