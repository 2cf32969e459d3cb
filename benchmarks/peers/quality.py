"""The two trainers that benchmarks/quality.py compares with ours, each as its authors run it.

    python benchmarks/peers/quality.py lucidrains|diffusers FOLDER      # trains until it is stopped

Both train on FOLDER/images, one PNG per image, a net with about as many
weights as ours, at their own defaults: batch 16, learning rate 1e-4, their schedule, prediction, optimizer and average
of the weights. Only settings that would handicap them are changed: no mirrored images (a shoe points left), no samples
or FID during training, and bfloat16, which is faster for both on a CPU. Averaged weights are saved every few seconds.

lucidrains   denoising-diffusion-pytorch: its Unet, GaussianDiffusion and Trainer.
diffusers    the recipe of examples/unconditional_image_generation/train_unconditional.py, with diffusers' own
             UNet2DModel, DDPMScheduler, get_scheduler and EMAModel, and accelerate.

Axes: B batch, C channels, H W.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.build import build_net
from ddpm.config import Config
from ddpm.config_io import from_json
from ddpm.diffusion import schedules
from ddpm.diffusion.objectives import Eps, Model, Objective, V
from ddpm.diffusion.schedules import Schedule
from ddpm.hub.diffusers_config import unet_config
from ddpm.training.state import parameter_count

EVERY_S = 10.0
"""Seconds between two snapshots, on the clock of the loop's thread, which stops while the process is suspended."""
BATCH_SIZE, LR = 16, 1e-4
FOR_EVER = 10**9
CONFIG, IMAGES, FIRST_STEP = "config.json", "images", "first-step"
"""Names in FOLDER: our config, which sets the size of the net; the images; a file written at the first step."""


class Snapshots:
    """Saves the averaged weights as FOLDER/{images seen}.safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._steps, self._due = folder, 0, 0.0

    def after_step(self, averaged: Callable[[], Mapping[str, Tensor]]) -> None:
        if self._steps == 0:
            (self._folder / FIRST_STEP).touch()
            self._due = time.thread_time() + EVERY_S
        self._steps += 1
        if time.thread_time() >= self._due:
            self._due += EVERY_S
            path = self._folder / f"{self._steps * BATCH_SIZE:012d}.safetensors"
            save_file({name: w.contiguous() for name, w in averaged().items()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)


def lucidrains_net(config: Config) -> nn.Module:
    """lucidrains' Unet, with the width and multipliers whose number of weights is closest to ours."""
    from denoising_diffusion_pytorch import Unet

    wanted, channels = parameter_count(build_net(config)), config.model.channels
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


def train_lucidrains(folder: Path, config: Config) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    diffusion = GaussianDiffusion(lucidrains_net(config), image_size=config.model.image_size)
    trainer = Trainer(
        diffusion,
        str((folder / IMAGES).resolve()),
        train_batch_size=BATCH_SIZE,
        train_lr=LR,
        train_num_steps=FOR_EVER,
        save_and_sample_every=FOR_EVER,
        augment_horizontal_flip=False,
        calculate_fid=False,
        amp=True,
        mixed_precision_type="bf16",
        results_folder=str(folder / "results"),
    )
    snapshots, update = Snapshots(folder), trainer.ema.update

    def update_and_keep() -> None:
        update()
        snapshots.after_step(trainer.ema.ema_model.model.state_dict)

    trainer.ema.update = update_and_keep
    trainer.train()


def train_diffusers(folder: Path, config: Config) -> None:
    from accelerate import Accelerator
    from datasets import load_dataset
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torchvision import transforms as T

    num_epochs, size = 100, config.model.image_size
    accelerator = Accelerator(mixed_precision="bf16")
    net, averaged = diffusers_net(config), diffusers_net(config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    to_model = T.Compose([T.Resize(size), T.CenterCrop(size), T.ToTensor(), T.Normalize([0.5], [0.5])])
    mode = "L" if config.model.channels == 1 else "RGB"
    data = load_dataset(
        "imagefolder",
        data_dir=str((folder / IMAGES).resolve()),
        cache_dir=str(folder / "cache"),
        split="train",
    )
    data.set_transform(lambda rows: {"input": [to_model(image.convert(mode)) for image in rows["image"]]})
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=len(loader) * num_epochs
    )
    net, optimizer, loader, lr_scheduler = accelerator.prepare(net, optimizer, loader, lr_scheduler)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    snapshots = Snapshots(folder)

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


def lucidrains(path: Path, config: Config) -> tuple[Model, Objective, Schedule]:
    """The inputs of our samplers from a snapshot: its net, the meaning of its output, its training schedule."""
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as theirs

    net = lucidrains_net(config)
    net.load_state_dict(load_file(path))
    net.eval().requires_grad_(False)
    schedule = Schedule(theirs.sigmoid_beta_schedule(1000))
    return lambda x_t, t, label: net(x_t, t), V(schedule), schedule


def diffusers(path: Path, config: Config) -> tuple[Model, Objective, Schedule]:
    """The same of a diffusers snapshot."""
    net = diffusers_net(config)
    net.load_state_dict(load_file(path))
    net.eval().requires_grad_(False)
    schedule = schedules.linear(1000, 1e-4, 0.02)
    return lambda x_t, t, label: net(x_t, t).sample, Eps(schedule), schedule


PACKAGE = {"lucidrains": "denoising_diffusion_pytorch", "diffusers": "accelerate"}
"""What each needs beside torch and diffusers; the extra `benchmarks` has them."""
TRAIN: dict[str, Callable[[Path, Config], None]] = {
    "lucidrains": train_lucidrains,
    "diffusers": train_diffusers,
}
LOAD: dict[str, Callable[[Path, Config], tuple[Model, Objective, Schedule]]] = {
    "lucidrains": lucidrains,
    "diffusers": diffusers,
}
NET: dict[str, Callable[[Config], Any]] = {"lucidrains": lucidrains_net, "diffusers": diffusers_net}


def read_config(folder: Path) -> Config:
    """Our config, which sets the size of the peers' nets."""
    return from_json((folder / CONFIG).read_text(), where=str(folder / CONFIG))


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    TRAIN[name](folder, read_config(folder))
