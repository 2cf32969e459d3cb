"""What training records and when: curves, pictures, checkpoints, progress.

Every rank runs the same code, since means, grids and checkpoints are made together; rank 0 alone calls the tracker.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm.config import Config
from ddpm.data.reading import Images, MicroBatch
from ddpm.diffusion.objectives import Loss, Objective
from ddpm.sampling import generate
from ddpm.training.runtime import NoTracker, Runtime, Tracker
from ddpm.training.state import State, lr_at
from ddpm.utils import images
from ddpm.utils.generators import generator
from ddpm.utils.progress import Progress
from ddpm.utils.seeding import Purpose

PROGRESS_INTERVAL_S = 0.5
STRIP_IMAGES = 4


class Recorder:
    """Follows one worker's training; `after_step` does whatever has become due."""

    def __init__(
        self, config: Config, runtime: Runtime, tracker: Tracker, state: State, objective: Objective
    ) -> None:
        self._config, self._runtime, self._state, self._objective = config, runtime, state, objective
        self._tracker = tracker if runtime.rank == 0 else NoTracker()
        self._held_out = runtime.held_out()
        self._progress_at = 0.0
        self._images_per_s = 0.0
        self._grad_norm: Tensor | None = None
        self._start_interval()

    def timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """`batches`, with the time spent waiting for them counted."""
        while True:
            begin = time.perf_counter()
            micro_batch = next(batches, None)
            self._wait_s += time.perf_counter() - begin
            if micro_batch is None:
                return
            yield micro_batch

    def add(self, losses: list[Loss], grad_norm: Tensor) -> None:
        """Count a step's micro-batches; nothing is read back from the device here."""
        for loss in losses:
            self._loss_sum += loss.value
            self._quarter_sum.index_add_(0, loss.quarter, loss.per_image)
            self._quarter_count += torch.bincount(loss.quarter, minlength=4)
        self._micro_batches += len(losses)
        self._grad_norm = grad_norm

    def after_step(self, stopping: bool) -> None:
        """Do what has become due with the step just taken; one that is the last for now is kept."""
        config, images_seen = self._config.train, self._state.images_seen
        finished = images_seen >= config.total_images
        if self._due(config.log_every_images) or finished:
            self._log()
        if self._due(config.sample_every_images) or finished:
            grid = self._draw_grid()
            if finished:
                self._draw_final(grid)
        if self._due(config.checkpoint_every_images) or finished:
            self._judge_and_save()
        elif stopping and self._runtime.rank == 0:  # at once: somebody is about to be taken away
            self._save(best=False)
        if self._runtime.rank == 0 and (
            finished or time.perf_counter() - self._progress_at > PROGRESS_INTERVAL_S
        ):
            self._tell()

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` images."""
        before = self._state.images_seen - self._config.train.batch_size
        return every > 0 and self._state.images_seen // every > before // every

    def _start_interval(self) -> None:
        device = self._runtime.device
        self._began, self._wait_s = time.perf_counter(), 0.0
        self._began_at_images = self._state.images_seen
        self._loss_sum = torch.zeros((), device=device)
        self._micro_batches, self._grad_norm = 0, None
        self._quarter_sum = torch.zeros(4, device=device)
        self._quarter_count = torch.zeros(4, dtype=torch.int64, device=device)

    def _rate(self) -> float:
        """Images/s of the whole run since the last log."""
        return (self._state.images_seen - self._began_at_images) / (time.perf_counter() - self._began)

    def _log(self) -> None:
        elapsed = time.perf_counter() - self._began
        self._images_per_s = self._rate()
        local = torch.cat(
            [
                self._loss_sum[None],
                self._quarter_sum,
                self._quarter_count.to(self._quarter_sum.dtype),
                torch.tensor([self._wait_s / elapsed], device=self._runtime.device),
            ]
        )
        loss_sum, *quarters, wait = self._runtime.mean(local).tolist()
        values = {
            "train/lr": lr_at(self._config, self._state.images_seen - self._config.train.batch_size),
            "train/images_per_s": self._images_per_s,
            "train/data_wait_share": wait,
        }
        loss = None
        if self._grad_norm is not None:  # not every step was skipped
            loss = loss_sum / self._micro_batches
            values |= {"train/loss": loss, "train/grad_norm": self._grad_norm.item()}
        if self._config.optim.skip_non_finite:
            values["train/skipped_steps"] = self._state.skipped_steps
        for i, (total, count) in enumerate(zip(quarters[:4], quarters[4:], strict=True)):
            if count > 0:
                values[f"train/loss_t_quarter_{i + 1}"] = total / count
        self._tracker.metrics(values | self._runtime.facts(), self._state.images_seen)
        self._tell(loss)
        self._start_interval()

    def _tell(self, loss: float | None = None) -> None:
        if self._runtime.rank == 0:
            if loss is None and self._micro_batches:
                loss = (self._loss_sum / self._micro_batches).item()
            self._progress_at = time.perf_counter()
            rate = self._rate() if self._micro_batches else self._images_per_s
            total = self._config.train.total_images
            if loss is not None:
                self._runtime.progress(Progress(self._state.images_seen, total, rate, loss))

    def _held_out_batch(self, held_out: Images, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """x_0 [B, C, H, W], and the labels if the net wants them."""
        device = self._runtime.device
        x_0 = images.to_model(torch.tensor(held_out.image[start:stop]).to(device))
        wanted = self._config.model.num_classes > 0
        return x_0, torch.tensor(held_out.label[start:stop]).to(device) if wanted else None

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        """Mean loss of the averaged weights on held-out images: the same t and noise every time."""
        if self._held_out is None:
            return None
        runtime, size = self._runtime, self._config.train.micro_batch_size
        total = torch.zeros((), device=runtime.device)
        starts = range(0, len(self._held_out.image), size)
        for start in starts[runtime.rank :: runtime.world_size]:
            x_0, label = self._held_out_batch(self._held_out, start, start + size)
            noise = generator(runtime.device, 0, Purpose.HELD_OUT, start)
            total += self._objective.loss(self._state.ema.net, x_0, label, noise).value * len(x_0)
        return (runtime.mean(total) * runtime.world_size / len(self._held_out.image)).item()

    def _judge_and_save(self) -> None:
        loss = self._held_out_loss()
        best = loss is not None and loss < self._state.best_held_out_loss
        if loss is not None:
            self._tracker.metrics({"held_out/loss": loss}, self._state.images_seen)
            self._state.best_held_out_loss = min(loss, self._state.best_held_out_loss)
        if self._runtime.rank == 0:
            self._save(best)

    def _save(self, best: bool) -> None:
        self._runtime.save(self._state.snapshot(self._config, self._runtime.identity), best)

    def _draw_grid(self) -> images.Pixels:
        """A grid of the same seeds every time, drawn by all ranks together, and what the net sees in noise."""
        runtime, config = self._runtime, self._config
        per_rank = -(-config.sample.num_images // runtime.world_size)
        mine = range(runtime.rank, per_rank * runtime.world_size, runtime.world_size)
        drawn = runtime.gather(
            generate.draw(self._state.ema.net, config, self._objective, mine, device=runtime.device)
        )
        order = torch.arange(len(drawn)).reshape(runtime.world_size, per_rank).T.reshape(-1)
        grid = images.grid(drawn.cpu()[order][: config.sample.num_images].numpy())
        if runtime.rank != 0:
            return grid
        seen = self._state.images_seen
        self._tracker.image("samples", grid, seen)
        runtime.publish(f"samples/{seen:012d}.png", images.png_bytes(grid))
        runtime.publish("samples/latest.png", images.png_bytes(grid))
        if self._held_out is not None:
            x_0, label = self._held_out_batch(self._held_out, 0, STRIP_IMAGES)
            strip = generate.denoising_strip(self._state.ema.net, config, self._objective, x_0, label)
            self._tracker.image("denoising", strip, seen)
        return grid

    def _draw_final(self, grid: images.Pixels) -> None:
        """The pictures that tell what the run was about: noise in, noise out."""
        if self._runtime.rank != 0:
            return
        pictures = {"samples.png": images.png_bytes(grid)}
        if self._held_out is not None:
            x_0, _ = self._held_out_batch(self._held_out, 0, STRIP_IMAGES)
            pictures["forward_noising.png"] = images.png_bytes(generate.noising_strip(self._config, x_0))
        strip, gif = generate.trajectory(
            self._state.ema.net,
            self._config,
            self._objective,
            range(STRIP_IMAGES),
            device=self._runtime.device,
        )
        pictures |= {"reverse_trajectory.png": images.png_bytes(strip), "reverse_trajectory.gif": gif}
        for name, data in pictures.items():
            self._tracker.artifact(f"pictures/{name}", data)
            self._runtime.publish(f"pictures/{name}", data)
