"""The two trainers that quality.py compares with ours, each as its authors run it, and at our settings.

    python benchmarks/peers/quality.py lucidrains|diffusers FOLDER [LR SEED]      # trains until it is stopped

Both train on FOLDER/images, one PNG per image (diffusers also on FOLDER/latents, safetensors), a net with about as many
weights as ours, at their own defaults: batch 16, learning rate 1e-4, their schedule, prediction, optimizer and average
of the weights. Only settings that would handicap them are changed: no mirrored images (a shoe points left), no samples
or FID during training, and bfloat16 on a CPU with instructions for it, where it is faster for both. Averaged and online
weights are saved every few seconds.

With a learning rate they have our settings, as far as their flags go: batch 32, the cosine schedule, an average with
decay 0.999; lucidrains v and min-SNR, diffusers a warm-up of 100 steps and as many epochs as our preset has, over which
its learning rate falls to 0.

lucidrains   denoising-diffusion-pytorch: its Unet, GaussianDiffusion and Trainer.
diffusers    the recipe of examples/unconditional_image_generation/train_unconditional.py, with diffusers' own
             UNet2DModel, DDPMScheduler, get_scheduler and EMAModel, and accelerate.

Axes: B batch, C channels, H W.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.build import build_net
from ddpm.config.json import from_json
from ddpm.config.tree import Config
from ddpm.diffusion import schedules
from ddpm.diffusion.objectives import Eps, Model, Objective, V
from ddpm.diffusion.schedules import Schedule
from ddpm.export.diffusers_config import unet_config
from ddpm.models.precision import has_bfloat16
from ddpm.training.state import parameter_count

EVERY_S = 10.0
"""Seconds between two snapshots."""
HALF = "bf16" if has_bfloat16(torch.device("cpu")) else "no"
"""accelerate's word for the precision."""
FOR_EVER = 10**9
CONFIG = "config.json"
IMAGES = "images"
LATENTS = "latents"
"""Names in FOLDER: our config, which sets the size of the net; the images, or a file with the tensor x_0."""
AVERAGED = ".safetensors"
ONLINE = "online"
"""End of the name of averaged weights, which begins with the images seen; name of the newest online ones."""


@dataclass(frozen=True)
class Settings:
    """How a peer trains; the defaults are its own."""

    lr: float = 1e-4
    seed: int = 0
    batch_size: int = 16
    warmup_steps: int = 500
    """diffusers' alone, like the next one: lucidrains' learning rate is constant."""
    total_images: int | None = None
    """Images until the learning rate is 0, as whole epochs; None: 100 epochs."""
    schedule: Mapping[str, str] = field(default_factory=lambda: DEFAULT_SCHEDULES)
    objective: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of lucidrains' GaussianDiffusion."""
    ema: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of lucidrains' Trainer."""
    ema_decay: float = 0.9999

    @classmethod
    def equal(cls, lr: float, seed: int, total_images: int) -> "Settings":
        """Ours, as far as the peers' flags go."""
        return cls(
            lr,
            seed,
            batch_size=32,
            warmup_steps=100,
            total_images=total_images,
            schedule=COSINE,
            objective={"objective": "pred_v", "min_snr_loss_weight": True, "min_snr_gamma": 25.0},
            ema={"ema_decay": 0.999, "ema_update_every": 1},
            ema_decay=0.999,
        )


class Snapshots:
    """Saves the averaged weights as FOLDER/{images seen}.safetensors, and the newest online ones as FOLDER/online."""

    def __init__(self, folder: Path, batch_size: int, net: nn.Module) -> None:
        self._folder = folder
        self._batch_size = batch_size
        self._steps = 0
        self._due = 0.0
        self._net = net

    def after_step(self, averaged: Callable[[], Mapping[str, Tensor]]) -> None:
        if self._steps == 0:
            self._due = time.monotonic() + EVERY_S
        self._steps += 1
        if time.monotonic() >= self._due:
            self._due += EVERY_S
            self._save(self._net.state_dict(), self._folder / ONLINE)
            self._save(averaged(), self._folder / f"{self._steps * self._batch_size:012d}{AVERAGED}")

    def _save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        save_file({name: w.contiguous() for name, w in weights.items()}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def lucidrains_net(config: Config) -> nn.Module:
    """lucidrains' Unet, with the width and multipliers whose number of weights is closest to ours."""
    from denoising_diffusion_pytorch import Unet

    wanted = parameter_count(build_net(config))
    channels = config.model.channels
    nets = [
        Unet(width, dim_mults=multipliers, channels=channels)
        for multipliers in ((1, 2, 4, 8), (1, 2, 2, 4))  # its own, and some for small nets
        for width in range(6, 33, 2)
    ]
    return min(nets, key=lambda net: abs(parameter_count(net) - wanted))


def diffusers_net(config: Config) -> nn.Module:
    """A UNet2DModel with the same layers as our net."""
    from diffusers import UNet2DModel

    return UNet2DModel(**unet_config(config))


def train_lucidrains(folder: Path, config: Config, settings: Settings) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    diffusion = GaussianDiffusion(
        lucidrains_net(config),
        image_size=config.model.image_size,
        beta_schedule=settings.schedule["lucidrains"],
        **settings.objective,
    )
    trainer = Trainer(
        diffusion,
        str((folder / IMAGES).resolve()),
        train_batch_size=settings.batch_size,
        train_lr=settings.lr,
        train_num_steps=FOR_EVER,
        save_and_sample_every=FOR_EVER,
        augment_horizontal_flip=False,
        calculate_fid=False,
        amp=HALF != "no",
        mixed_precision_type=HALF,
        results_folder=str(folder / "results"),
        **settings.ema,
    )
    snapshots = Snapshots(folder, settings.batch_size, diffusion.model)
    update = trainer.ema.update

    def update_and_keep() -> None:
        update()
        snapshots.after_step(trainer.ema.ema_model.model.state_dict)

    trainer.ema.update = update_and_keep
    trainer.train()


def images_of(folder: Path, config: Config) -> Any:
    """FOLDER/images as the script reads images: rows {"input": x_0}."""
    from datasets import load_dataset
    from torchvision import transforms as T

    size = config.model.image_size
    to_model = T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.5], [0.5])])
    mode = "L" if config.model.channels == 1 else "RGB"
    data = load_dataset(
        "imagefolder",
        data_dir=str((folder / IMAGES).resolve()),
        cache_dir=str(folder / "cache"),
        split="train",
    )
    data.set_transform(lambda rows: {"input": [to_model(image.convert(mode)) for image in rows["image"]]})
    return data


def latents_of(folder: Path) -> list[dict[str, Tensor]]:
    """FOLDER/latents as rows {"input": x_0}."""
    return [{"input": x_0} for x_0 in load_file(folder / LATENTS)["x_0"]]


def train_diffusers(folder: Path, config: Config, settings: Settings) -> None:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision=HALF)
    net = diffusers_net(config)
    averaged = diffusers_net(config)
    noise_scheduler = DDPMScheduler(1000, beta_schedule=settings.schedule["diffusers"])
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    data = images_of(folder, config) if (folder / IMAGES).exists() else latents_of(folder)
    loader = torch.utils.data.DataLoader(data, batch_size=settings.batch_size, shuffle=True)
    num_epochs = max(1, round(settings.total_images / len(data))) if settings.total_images else 100
    lr_scheduler = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=len(loader) * num_epochs,
    )
    net, optimizer, loader, lr_scheduler = accelerator.prepare(net, optimizer, loader, lr_scheduler)
    ema = EMAModel(
        net.parameters(), decay=settings.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
    )
    snapshots = Snapshots(folder, settings.batch_size, net)

    def averaged_weights() -> Mapping[str, Tensor]:
        ema.copy_to(averaged.parameters())
        return averaged.state_dict()

    for _ in range(num_epochs):
        for batch in loader:
            x_0 = batch["input"]
            eps = torch.randn_like(x_0)
            t = torch.randint(noise_scheduler.config.num_train_timesteps, (len(x_0),))
            with accelerator.accumulate(net):
                eps_hat = net(noise_scheduler.add_noise(x_0, eps, t), t).sample
                accelerator.backward(F.mse_loss(eps_hat.float(), eps))
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema.step(net.parameters())
            snapshots.after_step(averaged_weights)


def lucidrains(path: Path, config: Config, equal: bool = False) -> tuple[Model, Objective, Schedule]:
    """The inputs of our samplers from a snapshot: its net, the meaning of its output, its training schedule."""
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as theirs

    net = lucidrains_net(config)
    net.load_state_dict(load_file(path))
    net.eval().requires_grad_(False)
    beta = theirs.cosine_beta_schedule if equal else theirs.sigmoid_beta_schedule
    schedule = Schedule(beta(1000))
    return lambda x_t, t, label: net(x_t, t), V(schedule), schedule


def diffusers(path: Path, config: Config, equal: bool = False) -> tuple[Model, Objective, Schedule]:
    """The same of a diffusers snapshot."""
    net = diffusers_net(config)
    net.load_state_dict(load_file(path))
    net.eval().requires_grad_(False)
    schedule = schedules.cosine(1000) if equal else schedules.linear(1000, 1e-4, 0.02)
    return lambda x_t, t, label: net(x_t, t).sample, Eps(schedule), schedule


DEFAULT_SCHEDULES = {"lucidrains": "sigmoid", "diffusers": "linear"}
COSINE = {"lucidrains": "cosine", "diffusers": "squaredcos_cap_v2"}
TRAIN: dict[str, Callable[[Path, Config, Settings], None]] = {
    "lucidrains": train_lucidrains,
    "diffusers": train_diffusers,
}
LOAD: dict[str, Callable[[Path, Config, bool], tuple[Model, Objective, Schedule]]] = {
    "lucidrains": lucidrains,
    "diffusers": diffusers,
}


if __name__ == "__main__":
    name = sys.argv[1]
    folder = Path(sys.argv[2])
    equal = sys.argv[3:]
    config = from_json((folder / CONFIG).read_text(), where=str(folder / CONFIG))
    ours = config.train.total_images
    settings = Settings.equal(float(equal[0]), int(equal[1]), ours) if equal else Settings()
    torch.manual_seed(settings.seed)
    TRAIN[name](folder, config, settings)
