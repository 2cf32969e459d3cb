"""The records of training, each at its interval: curves, pictures, checkpoints, progress.

Every rank runs the same code, since means and grids need all ranks; only rank 0 has a store.
"""

import time
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ddpm.build import TrainedNet
from ddpm.checkpoints import checkpoint, runs
from ddpm.config import Config
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.objectives import Loss
from ddpm.evaluation import bits_per_dim
from ddpm.evaluation.rung import Evaluation, file_name
from ddpm.sampling import generate
from ddpm.training.mfu import flops_per_image, peak_flops
from ddpm.training.runtime import Runtime
from ddpm.training.state import State, lr_at
from ddpm.utils import devices, images
from ddpm.utils.progress import Progress

PROGRESS_INTERVAL_S = 0.5
STRIP_IMAGES = 4
HELD_OUT_BATCH = 64
"""Held-out images measured at once; their noise depends on it."""
PILOT_IMAGES, BOUND_IMAGES, BOUND_DRAWS = 8, 64, 4
"""Held-out images for the errors of x_0_hat, the next ones for bits/dim, and timesteps of each of the latter."""
TURNED = 1.02
"""A held-out loss this many times its lowest has turned: it is measured with the same noise each time."""
UNIT = 2.0**-30
"""Losses are summed in multiples of this, exactly in float64, so that a stop between two logs changes no value."""
CONSTANT = {"train/goodput": 1.0, "train/skipped_steps": 0.0}
"""Metrics that are not logged while they have these values."""


class Recorder:
    """Records one worker's training; `after_step` does what is due."""

    def __init__(self, config: Config, runtime: Runtime, state: State) -> None:
        self._config, self._runtime, self._store, self._state = config, runtime, runtime.store, state
        self._averaged = TrainedNet(state.ema.net, config)
        self._held_out = runtime.held_out()
        self._progress_at, self._images_per_s, self._has_turned = 0.0, 0.0, False
        self._grad_norm = torch.zeros((), device=runtime.device)
        self._start_interval()
        if state.interval is not None:
            *sums, grad_norm = state.interval
            self._grad_norm += grad_norm
            if self._store is not None:
                self._sums += torch.tensor(sums, dtype=torch.float64, device=runtime.device)

    def timed(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield `batches`, and count the time spent waiting for them."""
        while True:
            begin = time.perf_counter()
            micro_batch = next(batches, None)
            self._wait_s += time.perf_counter() - begin
            if micro_batch is None:
                return
            yield micro_batch

    def add(self, losses: list[Loss], grad_norm: Tensor, bad: Tensor) -> None:
        """Add a step's losses, unless the step is `bad`; nothing is read back from the device here."""
        quarters = torch.arange(4, device=grad_norm.device)
        for loss in losses:
            of_quarter = (loss.quarter[:, None] == quarters).to(loss.per_image.dtype)  # [B, 4]
            counts = of_quarter.sum(0)
            of_pass = torch.cat([(loss.value * counts.sum())[None], loss.per_image @ of_quarter, counts])
            self._sums += torch.where(bad, 0, (of_pass.double() / UNIT).round())
        self._grad_norm = torch.where(bad, self._grad_norm, grad_norm)

    def after_step(self, stopping: bool) -> None:
        """Log, sample and save what is due after this step; when stopping, save a checkpoint at once."""
        config, images_seen = self._config.train, self._state.images_seen
        finished = images_seen >= config.total_images
        if self._due(config.log_every_images) or finished:
            self._log()
        if self._due(config.sample_every_images) or finished:
            self._draw_grid()
            if finished:
                self._draw_final()
        if self._due(config.checkpoint_every_images) or finished:
            self._evaluate_and_save()
        elif stopping:
            self._save(best=False)
        if finished or time.perf_counter() - self._progress_at > PROGRESS_INTERVAL_S:
            self._report_progress()

    def is_due(self) -> bool:
        """Whether something is due after the step in progress for which its flags must be known."""
        train, after = self._config.train, self._state.images_seen + self._config.train.batch_size
        intervals = (train.log_every_images, train.sample_every_images, train.checkpoint_every_images)
        return after >= train.total_images or any(self._crosses(every, after) for every in intervals)

    def _due(self, every: int) -> bool:
        return self._crosses(every, self._state.images_seen)

    def _crosses(self, every: int, images_seen: int) -> bool:
        """Whether the step that ends at `images_seen` crosses a multiple of `every` images."""
        return every > 0 and images_seen // every > (images_seen - self._config.train.batch_size) // every

    def _start_interval(self) -> None:
        device = self._runtime.device
        self._began, self._wait_s = time.perf_counter(), 0.0
        self._began_at_images = self._state.images_seen
        # Sum of the loss; then, by quarter of t, sums of the errors and numbers of images; all in UNITs.
        self._sums = torch.zeros(9, device=device, dtype=torch.float64)

    def _rate(self) -> float:
        """Images/s of the whole run since the last log."""
        return (self._state.images_seen - self._began_at_images) / (time.perf_counter() - self._began)

    @cached_property
    def _flops_per_image(self) -> float:
        return flops_per_image(self._state.ema.net, self._config)

    def _log(self) -> None:
        elapsed = time.perf_counter() - self._began
        self._images_per_s = self._rate()
        local = torch.cat([self._sums, torch.full((1,), self._wait_s / elapsed, device=self._sums.device)])
        means = self._runtime.mean(local).tolist()
        if self._store is not None:
            values = {
                name: value for name, value in self._values(means).items() if CONSTANT.get(name) != value
            }
            self._store.metrics(values, self._state.images_seen)
            self._report_progress(values.get("train/loss"))
        self._start_interval()

    def _values(self, means: list[float]) -> dict[str, float]:
        """The values that rank 0 logs of the interval; `means` over the ranks: `_sums`, and the share of waiting."""
        assert self._store is not None, "rank 0 logs"
        config, runtime = self._config, self._runtime
        loss_sum, *by_quarter, wait = means
        sums, counts = by_quarter[:4], by_quarter[4:]
        values = {
            "train/lr": lr_at(config, self._state.images_seen - config.train.batch_size),
            "train/images_per_s": self._images_per_s,
            "train/data_wait_share": wait,
        }
        if peak := peak_flops(runtime.device, self._state.precision):
            flops = self._images_per_s * self._flops_per_image
            values["train/mfu"] = flops / (peak * runtime.world_size)
        if (share := devices.peak_memory_share()) is not None:
            values["train/gpu_peak_memory_share"] = share
        if sum(counts) > 0:  # not every step was skipped
            values |= {"train/loss": loss_sum / sum(counts), "train/grad_norm": self._grad_norm.item()}
        if config.optim.skip_non_finite:
            values["train/skipped_steps"] = self._state.skipped_steps
        for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count > 0:
                values[f"train/loss_t_quarter_{i + 1}"] = total / count
        if len(config.cluster.world_sizes()) > 1:
            values["train/workers"] = float(runtime.world_size)
        values["train/goodput"] = self._store.goodput()
        return values

    def _report_progress(self, loss: float | None = None) -> None:
        if self._store is None:
            return
        num_images = self._sums[5:].sum()
        if loss is None and num_images > 0:
            loss = (self._sums[0] / num_images).item()
        self._progress_at = time.perf_counter()
        rate = self._rate() if num_images > 0 else self._images_per_s
        if loss is not None:
            total_images = self._config.train.total_images
            self._store.progress(Progress(self._state.images_seen, total_images, rate, loss))

    def _held_out_loss(self) -> float | None:
        """Mean loss of the averaged weights on held-out images: the same t and noise every time."""
        if self._held_out is None:
            return None
        runtime, size = self._runtime, HELD_OUT_BATCH
        total = torch.zeros((), device=runtime.device)
        starts = range(0, len(self._held_out.image), size)
        for start in starts[runtime.rank :: runtime.world_size]:
            batch = self._held_out[start : start + size]
            total += bits_per_dim.loss(self._averaged, batch, start) * len(batch.image)
        return (runtime.mean(total) * runtime.world_size / len(self._held_out.image)).item()

    def _held_out_bits(self) -> dict[str, float]:
        """Bits/dim of a few held-out images and the standard error; comparable between schedules of equal T."""
        config, runtime, held_out = self._config, self._runtime, self._held_out
        has_bound = self._averaged.objective.has_bound and config.schedule.num_timesteps > 1
        stop = min(PILOT_IMAGES + BOUND_IMAGES, len(held_out.image) if held_out and has_bound else 0)
        if held_out is None or stop < PILOT_IMAGES + 2:
            return {}
        measured = bits_per_dim.measure_errors(self._averaged, held_out[:PILOT_IMAGES])
        bits, size = torch.zeros(stop, device=runtime.device), HELD_OUT_BATCH
        for start in range(PILOT_IMAGES, stop, size)[runtime.rank :: runtime.world_size]:
            part = slice(start, min(start + size, stop))
            bound = bits_per_dim.bound_terms(self._averaged, measured, held_out[part], start, BOUND_DRAWS)
            bits[part] = torch.from_numpy(bound.sum(1)).to(bits)
        bits = (runtime.mean(bits) * runtime.world_size)[PILOT_IMAGES:]
        error = bits.std() / len(bits) ** 0.5
        return {"held_out/bits_per_dim": bits.mean().item(), "held_out_error/bits_per_dim": error.item()}

    def _evaluate_and_save(self) -> None:
        loss, lowest = self._held_out_loss(), self._state.best_held_out_loss
        best = loss is not None and loss < lowest
        if loss is not None:
            if loss > TURNED * lowest and self._store is not None and not self._has_turned:
                self._has_turned = True
                self._store.warn(self._turned(loss, lowest))
            values = {"held_out/loss": loss, **self._held_out_bits()}
            if self._store is not None:
                self._store.metrics(values, self._state.images_seen)
            self._state.best_held_out_loss = min(loss, lowest)
        rung = self._measure_rung()
        self._save(best, rung)
        if rung is not None:
            self._runtime.reached(rung)

    def _measure_rung(self) -> Evaluation | None:
        """What ranks the trials of a search, if this is one of its rungs."""
        runtime, images_seen = self._runtime, self._state.images_seen
        if runtime.rungs is None or images_seen not in runtime.rungs.at:
            return None

        def total(values: Tensor) -> Tensor:
            return runtime.mean(values) * runtime.world_size

        evaluator = runtime.rungs.evaluator
        return evaluator.evaluate(self._averaged, images_seen, runtime.rank, runtime.world_size, total)

    def _turned(self, loss: float, lowest: float) -> str:
        helps = "more images help" if self._config.data.augment else "more images or --data.augment 0.12 help"
        return (
            f"the held-out loss has risen to {loss:.4f} from {lowest:.4f}: if the training loss falls, the net begins "
            f"to repeat its training images, and {helps}. The checkpoint of the lowest loss is kept, "
            f"{checkpoint.BEST_PREFIX}*"
        )

    def _save(self, best: bool, rung: Evaluation | None = None) -> None:
        """Save a checkpoint with the sums of all ranks, after the results of a rung; every rank calls it."""
        total = (self._runtime.mean(self._sums.clone()) * self._runtime.world_size).round()
        self._state.interval = [*total.tolist(), self._grad_norm.item()]
        if self._store is not None:
            before = {} if rung is None else {file_name(rung.images_seen): rung.to_json()}
            self._store.save(self._state, best, before)

    def _draw_grid(self) -> None:
        """Sample a grid of the same seeds every time, on all ranks together, and a denoising strip."""
        runtime, config = self._runtime, self._config
        per_rank = -(-config.sample.num_images // runtime.world_size)
        mine = range(runtime.rank, per_rank * runtime.world_size, runtime.world_size)
        drawn = runtime.gather(generate.draw(self._averaged, mine))
        order = torch.arange(len(drawn)).reshape(runtime.world_size, per_rank).T.reshape(-1)
        grid = images.grid(drawn.cpu()[order][: config.sample.num_images].numpy())
        if self._store is None:
            return
        seen, every = self._state.images_seen, config.train.sample_every_images
        self._store.publish(f"{runs.SAMPLES}/latest.png", images.png_bytes(grid))
        if not self._due(every):  # the last one, between two multiples
            self._store.picture(runs.SAMPLES, grid, seen)
            return
        seen = seen // every * every  # rounded: runs of any batch size are shown side by side
        self._store.picture(runs.SAMPLES, grid, seen)
        if self._held_out is not None:
            some = self._held_out[:STRIP_IMAGES]
            x_0, label = self._averaged.inputs(some.image, some.label)
            strip = generate.denoising_strip(self._averaged, x_0, label)
            self._store.picture(runs.DENOISING, strip, seen)

    def _draw_final(self) -> None:
        """Publish the final images: forward noising, and the reverse trajectory."""
        if self._store is None:
            return
        pictures = {}
        if self._held_out is not None:
            some = self._held_out[:STRIP_IMAGES]
            x_0, _ = self._averaged.inputs(some.image, some.label)
            pictures["forward_noising.png"] = images.png_bytes(generate.noising_strip(self._config, x_0))
        strip, gif = generate.trajectory(self._averaged, range(STRIP_IMAGES))
        pictures |= {"reverse_trajectory.png": images.png_bytes(strip), "reverse_trajectory.gif": gif}
        for name, data in pictures.items():
            self._store.publish(f"{runs.PICTURES}/{name}", data)
