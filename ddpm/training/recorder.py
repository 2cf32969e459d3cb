"""The records of training, each at its interval: curves, pictures, checkpoints, progress.

Every rank has a recorder and calls it in the same steps: means and grids are computed by all ranks together
(collective operations). Only rank 0 has a store.
"""

import time
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ddpm.build import TrainedNet
from ddpm.config.tree import Config
from ddpm.data.reading import MicroBatch
from ddpm.diffusion.objectives import Loss
from ddpm.evaluation.rung import Evaluation, file_name
from ddpm.runs import run_folder
from ddpm.sampling import generate
from ddpm.training import held_out
from ddpm.training.mfu import flops_per_image, peak_flops
from ddpm.training.runtime import Runtime
from ddpm.training.state import Interval, State, lr_at
from ddpm.utils import devices, images
from ddpm.utils.images import Pixels
from ddpm.utils.progress import Progress

PROGRESS_INTERVAL_S = 0.5
STRIP_IMAGES = 4
"""Images of the denoising strip, and of the pictures of the finished run."""
OVERFITTED = 1.02
"""A warning is shown when the held-out loss exceeds its minimum by this factor; its noise is the same each time."""
UNIT = 2.0**-30
"""Losses are summed in multiples of this, exactly in float64, so that a stop between two logs changes no value."""
CONSTANT = {"train/goodput": 1.0, "train/skipped_steps": 0.0}
"""Metrics that are not logged while they have these values."""


class Recorder:
    """Records one worker's training; `after_step`, a collective operation, does what is due."""

    def __init__(self, config: Config, runtime: Runtime, state: State) -> None:
        self._config = config
        self._runtime = runtime
        self._store = runtime.store
        self._state = state
        self._averaged = TrainedNet(
            state.ema.net, config, class_names=runtime.class_names, decoder=runtime.decoder()
        )
        self._held_out = runtime.held_out()
        self._progress_at = 0.0
        self._images_per_s = 0.0
        self._has_warned = False
        self._grad_norm = torch.zeros((), device=runtime.device)
        self._start_interval()
        if state.interval is not None:
            self._grad_norm += state.interval.grad_norm
            if self._store is not None:
                self._sums += torch.tensor(state.interval.sums, dtype=torch.float64, device=runtime.device)

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
        config = self._config.train
        images_seen = self._state.images_seen
        finished = images_seen >= config.total_images
        if self._due(config.log_every_images) or finished:
            self._log()
        if self._due(config.sample_every_images) or finished:
            self._record_samples()
            if finished:
                self._publish_pictures()
        if self._due(config.checkpoint_every_images) or finished:
            self._evaluate_and_save()
        elif stopping:
            self._save(best=False)
        if finished or time.perf_counter() - self._progress_at > PROGRESS_INTERVAL_S:
            self._report_progress()

    def is_due(self) -> bool:
        """Whether something is due after the step in progress for which its flags must be known."""
        train = self._config.train
        after = self._state.images_seen + train.batch_size
        intervals = (train.log_every_images, train.sample_every_images, train.checkpoint_every_images)
        return after >= train.total_images or any(self._crosses(every, after) for every in intervals)

    def _due(self, every: int) -> bool:
        return self._crosses(every, self._state.images_seen)

    def _crosses(self, every: int, images_seen: int) -> bool:
        """Whether the step that ends at `images_seen` crosses a multiple of `every` images."""
        return every > 0 and images_seen // every > (images_seen - self._config.train.batch_size) // every

    def _start_interval(self) -> None:
        device = self._runtime.device
        self._began = time.perf_counter()
        self._wait_s = 0.0
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
            values = self._values(means)
            for name, usual in CONSTANT.items():
                if values.get(name) == usual:
                    del values[name]
            self._store.metrics(values, self._state.images_seen)
            self._report_progress(values.get("train/loss"))
        self._start_interval()

    def _values(self, means: list[float]) -> dict[str, float]:
        """The values that rank 0 logs of the interval; `means` over the ranks: `_sums`, and the share of waiting."""
        assert self._store is not None, "rank 0 logs"
        config = self._config
        runtime = self._runtime
        loss_sum = means[0]
        sums = means[1:5]
        counts = means[5:9]
        values = {
            "train/lr": lr_at(config, self._state.images_seen - config.train.batch_size),
            "train/images_per_s": self._images_per_s,
            "train/data_wait_share": means[9],
        }
        peak = peak_flops(runtime.device, self._state.precision)
        if peak is not None:
            flops = self._images_per_s * self._flops_per_image
            values["train/mfu"] = flops / (peak * runtime.world_size)
        share = devices.peak_memory_share()
        if share is not None:
            values["train/gpu_peak_memory_share"] = share
        if sum(counts) > 0:  # not every step was skipped
            values["train/loss"] = loss_sum / sum(counts)
            values["train/grad_norm"] = self._grad_norm.item()
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

    def _evaluate_and_save(self) -> None:
        best = self._measure_held_out()
        rung = self._measure_rung()
        self._save(best, rung)
        if rung is not None:
            self._runtime.reached(rung)

    def _measure_held_out(self) -> bool:
        """Record loss and bits/dim of held-out images, if there are any; returns whether the loss is the lowest."""
        if self._held_out is None:
            return False
        lowest = self._state.best_held_out_loss
        loss = held_out.mean_loss(self._averaged, self._held_out, self._runtime)
        bits = held_out.bits_per_dim(self._averaged, self._held_out, self._runtime)
        values = {"held_out/loss": loss, **bits}
        if self._store is not None:
            if loss > OVERFITTED * lowest and not self._has_warned:
                self._has_warned = True
                self._store.warn(self._overfitting(loss, lowest))
            self._store.metrics(values, self._state.images_seen)
        self._state.best_held_out_loss = min(loss, lowest)
        return loss < lowest

    def _measure_rung(self) -> Evaluation | None:
        """What ranks the trials of a search, if this is one of its rungs."""
        runtime = self._runtime
        images_seen = self._state.images_seen
        if runtime.rungs is None or images_seen not in runtime.rungs.at:
            return None

        def total(values: Tensor) -> Tensor:
            return runtime.mean(values) * runtime.world_size

        evaluator = runtime.rungs.evaluator
        return evaluator.evaluate(self._averaged, images_seen, runtime.rank, runtime.world_size, total)

    def _overfitting(self, loss: float, lowest: float) -> str:
        helps = "more images help" if self._config.data.augment else "more images or --data.augment 0.12 help"
        return (
            f"the held-out loss has risen to {loss:.4f} from {lowest:.4f}: if the training loss falls, the net begins "
            f"to repeat its training images, and {helps}. The checkpoint of the lowest loss is kept, "
            f"{run_folder.BEST_PREFIX}*"
        )

    def _save(self, best: bool, rung: Evaluation | None = None) -> None:
        """Save a checkpoint with the sums of all ranks, after the results of a rung; every rank calls it."""
        total = (self._runtime.mean(self._sums.clone()) * self._runtime.world_size).round()
        self._state.interval = Interval(total.tolist(), self._grad_norm.item())
        if self._store is not None:
            before = {} if rung is None else {file_name(rung.images_seen): rung.to_json()}
            self._store.save(self._state, best, before)

    def _record_samples(self) -> None:
        """Record the grid of samples, and a denoising strip."""
        grid = self._sample_grid()
        if self._store is None:
            return
        seen = self._state.images_seen
        every = self._config.train.sample_every_images
        self._store.publish(f"{run_folder.SAMPLES}/latest.png", images.png_bytes(grid))
        if not self._due(every):  # the last one, between two multiples
            self._store.picture(run_folder.SAMPLES, grid, seen)
            return
        seen = seen // every * every  # rounded: runs of any batch size are shown side by side
        self._store.picture(run_folder.SAMPLES, grid, seen)
        if self._held_out is not None:
            some = self._held_out[:STRIP_IMAGES]
            x_0, label = self._averaged.inputs(some.image, some.label)
            strip = generate.denoising_strip(self._averaged, x_0, label)
            self._store.picture(run_folder.DENOISING, strip, seen)

    def _sample_grid(self) -> Pixels:
        """Sample a grid of the same seeds every time, with a column for each class.

        Every rank calls it, and generates its share.
        """
        runtime = self._runtime
        num_images = self._config.sample.num_images
        per_rank = -(-num_images // runtime.world_size)
        mine = range(runtime.rank, per_rank * runtime.world_size, runtime.world_size)
        drawn = runtime.gather(generate.draw(self._averaged, mine))
        order = torch.arange(len(drawn)).reshape(runtime.world_size, per_rank).T.reshape(-1)
        return generate.grid(self._averaged, drawn.cpu()[order][:num_images].numpy())

    def _publish_pictures(self) -> None:
        """Publish the pictures of the finished run: forward noising, and the reverse trajectory."""
        if self._store is None:
            return
        if self._held_out is not None:
            some = self._held_out[:STRIP_IMAGES]
            x_0, _ = self._averaged.inputs(some.image, some.label)
            noising = generate.noising_strip(self._averaged, x_0)
            self._store.publish(f"{run_folder.PICTURES}/forward_noising.png", images.png_bytes(noising))
        strip, gif = generate.trajectory(self._averaged, range(STRIP_IMAGES))
        self._store.publish(f"{run_folder.PICTURES}/reverse_trajectory.png", images.png_bytes(strip))
        self._store.publish(f"{run_folder.PICTURES}/reverse_trajectory.gif", gif)
