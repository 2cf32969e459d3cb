"""Sampling with a net and its config: seeds, labels, guidance and sampler together.

Training (for its grids) and ddpm sample sample with `draw`: image i is a function of the seed and i only.

Axes: N images, C channels, H W.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.build import TrainedNet, build_sampler, build_schedule
from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.diffusion import guidance
from ddpm.diffusion.guidance import Denoise
from ddpm.diffusion.objectives import Denoised
from ddpm.diffusion.samplers import OnStep, PerImageNoise, Sampler
from ddpm.sampling.pool import check_cancelled
from ddpm.utils import images
from ddpm.utils.errors import UserError
from ddpm.utils.generators import PhiloxGenerator
from ddpm.utils.images import Pixels
from ddpm.utils.seeding import Purpose

MAX_COLUMNS = 16
"""Classes of which a grid has a column each."""
MAX_LISTED = 20
"""Classes that an error names."""
NOISING_COLUMNS = 10
DENOISING_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
TRAJECTORY_COLUMNS = 10


def class_of(trained: TrainedNet, label: int | str | None) -> int | None:
    """The number of a class that is given by its name or its number; UserError if the net has no such class.

    If the name of any class is a number, a text is a name: the class "7" need not be number 7.
    """
    classes = trained.config.model.num_classes
    names = trained.class_names
    if label is None:
        return None
    if not classes:
        raise UserError(f"label is {label}; this net was trained without labels")
    if isinstance(label, str) and label in names:
        return names.index(label)
    number = int(label) if isinstance(label, int) or label.isdecimal() else None
    if isinstance(label, str) and any(name.isdecimal() for name in names):
        number = None
    if number is not None and 0 <= number < classes:
        return number
    raise UserError(f"label is {label}; {_right_labels(classes, names)}")


def _right_labels(classes: int, names: Sequence[str]) -> str:
    """What a label must be."""
    if not names:
        return f"it must be in 0..{classes - 1}"
    listed = ", ".join(names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        listed += f", ... ({len(names)} classes)"
    return f"it must be one of {listed}"


Label = int | NDArray[np.int64] | None
"""One class for all images, the class of each, or i mod num_classes."""


def labels(config: Config, indices: Sequence[int], label: Label = None) -> NDArray[np.int64] | None:
    """The classes of images, int64 [N]; None: an unconditional net."""
    if not config.model.num_classes:
        return None
    equally = np.array(indices, np.int64) % config.model.num_classes
    return equally if label is None else np.full(equally.shape, label)


def grid(trained: TrainedNet, drawn: Pixels, label: Label = None) -> Pixels:
    """Images 0..N-1 that `draw` drew with `label`, uint8 [N, H, W, C], as one RGB image.

    If the classes take turns, each has a column under its name.
    """
    classes = trained.config.model.num_classes
    if label is not None or not 1 < classes <= MAX_COLUMNS:
        return images.grid(drawn)
    return images.grid(drawn, classes, trained.class_names)


@torch.no_grad()
def draw(
    trained: TrainedNet,
    indices: Sequence[int],
    *,
    label: Label = None,
    sampler: Sampler | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw the images with these indices, in one batch.

    Args:
        indices: image i depends on the seed, i, and its label alone.
        label: as in `labels`.
        sampler: used in place of the one that the configuration describes.
        on_step: called at every step of the sampler.

    Returns:
        uint8 [N, H, W, C] on the net's device.
    """
    config = trained.config
    device = trained.device
    classes = labels(config, indices, label)
    denoise = _denoise(trained, None if classes is None else torch.from_numpy(classes).to(device))
    if sampler is None:
        sampler = build_sampler(config)
    return trained.images(sampler(denoise, _noise(config, indices, device), on_step))


def denoising(trained: TrainedNet, indices: Sequence[int], every: int = 1, **how: Any) -> Iterator[Pixels]:
    """`draw` as a generator: x_t before steps 0, every, 2 every, ..., and its result, each uint8 [N, H, W, C].

    The sampler runs in a thread of its own, until the generator is closed. `how` is as in `draw`.
    """
    frames = SimpleQueue[Pixels | None]()
    closed = False

    def keep(step: int, x_t: Tensor, x_0_hat: Tensor) -> None:
        if closed:
            raise CancelledError
        if step % every == 0:
            frames.put(trained.images(x_t).cpu().numpy())

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw, trained, indices, on_step=keep, **how)
        drawn.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := frames.get()) is not None:
                yield frame
            yield drawn.result().cpu().numpy()
        finally:
            closed = True


@torch.no_grad()
def noising_strip(trained: TrainedNet, x_0: Tensor) -> Pixels:
    """The forward process on real images x_0 [N, C, H, W], from clean to noise: one row per image."""
    objective = trained.objective
    noise = _strip_noise(trained.config, x_0)
    columns = [objective.corrupt(x_0, i / (NOISING_COLUMNS - 1), noise) for i in range(1, NOISING_COLUMNS)]
    captions = ["x_0", *(_caption(t) for _, t in columns)]
    return images.strip(_rows(trained, [x_0, *(x_t for x_t, _ in columns)]), captions)


@torch.no_grad()
def denoising_strip(trained: TrainedNet, x_0: Tensor, label: Tensor | None = None) -> Pixels:
    """Denoising of real images x_0 [N, C, H, W] at rising noise levels: pairs of x_t and x_0_hat."""
    objective = trained.objective
    noise = _strip_noise(trained.config, x_0)
    frames = [x_0]
    captions = ["x_0"]
    for level in DENOISING_LEVELS:
        x_t, t = objective.corrupt(x_0, level, noise)
        frames += [x_t, objective.denoise(trained.net, x_t, t, label).x_0_hat]
        captions += [_caption(t), "x_0_hat"]
    return images.strip(_rows(trained, frames), captions)


def trajectory(trained: TrainedNet, indices: Sequence[int], **how: Any) -> tuple[Pixels, bytes]:
    """The reverse process, from noise to images: a strip (a row per image) and a GIF of a grid; `how` as in `draw`."""
    frames: list[Pixels] = []

    def keep(step: int, x_t: Tensor, x_0_hat: Tensor) -> None:
        frames.append(trained.images(x_t).cpu().numpy())

    drawn = draw(trained, indices, on_step=keep, **how)
    frames.append(drawn.cpu().numpy())
    picked = [round(i * (len(frames) - 1) / (TRAJECTORY_COLUMNS - 1)) for i in range(TRAJECTORY_COLUMNS)]
    rows = np.stack([frames[i] for i in picked], axis=1)
    moving = [images.grid(frames[i]) for i in range(0, len(frames), max(1, len(frames) // 50))]
    moving += [images.grid(frames[-1])] * 10  # hold the result for 10 frames
    captions = ["noise", *[f"step {i}" for i in picked[1:]]]
    return images.strip(list(rows), captions), images.gif_bytes(moving)


def noise_level(config: Config) -> Callable[[Tensor], Tensor]:
    """The function from t [B] to the noise level that sample.guidance_interval refers to: sigma, or t without one."""
    if not kinds.objective(config.objective.process).uses_time:
        return lambda t: t
    sigma = build_schedule(config.schedule).sigma.float()
    return lambda t: sigma.to(t.device, non_blocking=True)[t]


def _denoise(trained: TrainedNet, label: Tensor | None) -> Denoise:
    """The net as a function for samplers: with `label`, and guidance if it is configured."""

    def given(label: Tensor | None) -> Denoise:
        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            check_cancelled()
            return trained.objective.denoise(trained.net, x_t, t, label)

        return denoise

    if label is None:
        return given(None)
    sample = trained.config.sample
    return guidance.guided(
        given(label),
        given(None),
        scale=sample.guidance_scale,
        interval=sample.guidance_interval,
        level=noise_level(trained.config),
    )


def _noise(config: Config, indices: Sequence[int], device: torch.device) -> PerImageNoise:
    """Noise for the images with these indices, drawn on the CPU for any device."""
    side = config.model.image_size
    generators = [PhiloxGenerator(config.sample.seed, Purpose.SAMPLE, i) for i in indices]
    uniform = kinds.objective(config.objective.process).has_uniform_noise
    return PerImageNoise(generators, (config.model.channels, side, side), device, uniform)


def _strip_noise(config: Config, x_0: Tensor) -> Tensor:
    """Noise for real images x_0 [N, C, H, W]: the same in every column of a strip."""
    return _noise(config, range(len(x_0)), x_0.device)()


def _caption(t: Tensor) -> str:
    """The first of t [N], or of the amounts of noise of `UniformMix`."""
    return f"{t[0].item():.0%}" if t.is_floating_point() else f"t={t[0].item()}"


def _rows(trained: TrainedNet, frames: list[Tensor]) -> list[Pixels]:
    """F frames of [N, C, H, W] as N rows of uint8 [F, H, W, C]."""
    return list(torch.stack([trained.images(frame).cpu() for frame in frames], dim=1).numpy())
