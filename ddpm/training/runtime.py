"""One worker of a training run, as the loop sees it, in plain torch; `worker.RayRuntime` is a worker of Ray Train."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn

from ddpm.config.tree import Config
from ddpm.data import latents
from ddpm.data.plan import ReadOrder, last_position
from ddpm.data.reading import DataSet, LabelledImages, MicroBatch, cut
from ddpm.evaluation.rung import Evaluation, Rungs
from ddpm.latents.scaling import Decoder
from ddpm.training.store import RunStore
from ddpm.training.transfers import LateFlags
from ddpm.utils import devices


class Runtime:
    """A worker's access to the other workers, in torch's process group, and to the data; by default the only worker.

    Attributes:
        store: the run's store, on rank 0.
        rungs: where the loop measures what ranks the trials of a search; None: the run is no trial.
    """

    rank = 0
    world_size = 1
    rungs: Rungs | None = None

    def __init__(
        self, config: Config, train: DataSet, held_out: DataSet | None, store: RunStore | None
    ) -> None:
        self.device = devices.default()
        self.store = store
        self._config = config
        self._train = train
        self._held_out = held_out
        self._flags = LateFlags()

    def wrap(self, net: nn.Module) -> nn.Module:
        """`net` with its gradients averaged over the workers."""
        if self.world_size == 1:
            return net
        ids = None if self.device == devices.CPU else [self.device]
        return nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)

    def batches(self, images_seen: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches, from the global batch at `images_seen` to the end of training.

        Every rank calls it; reading may begin at once.
        """
        order = ReadOrder.from_config(self._config)
        return cut(self._batches(images_seen), order.share(0, 1), order.micro_batch_size)

    def _batches(self, images_seen: int) -> Iterator[LabelledImages]:
        order = ReadOrder.from_config(self._config)
        plan = self._train.plan(order.seed, order.window_rows)
        stop = last_position(images_seen, order.total_images, order.batch_size)
        parts = self._train.parts(plan, images_seen, stop)
        with ThreadPoolExecutor(1) as reader:  # reads the next part while this one is trained on
            ahead = reader.submit(next, parts, None)
            while images := ahead.result():
                ahead = reader.submit(next, parts, None)
                yield images

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the images; empty: they have no labels."""
        return self._train.manifest.class_names

    def decoder(self) -> Decoder | None:
        """What makes images of latents; None: the net sees images."""
        return latents.decoder_of(self._train.location, self._train.manifest)

    def held_out(self) -> LabelledImages | None:
        """The first config.train.held_out_images held-out images, the same for every run; None: there are none."""
        if self._held_out is None or self._config.train.held_out_images == 0:
            return None
        stop = min(self._config.train.held_out_images, self._held_out.rows.num_rows)
        return self._held_out.fixed_order().read(0, stop)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the workers, elementwise."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
            values = values / self.world_size
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of every rank as [world_size * n, ...], rank after rank."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def agree(self, bad: Tensor, *, at_once: bool) -> tuple[Tensor, int, bool]:
        """Agree with all ranks on what follows a step. Every rank calls it, in every step.

        Args:
            bad: whether this rank's loss or gradient is not finite, [] bool on the device.
            at_once: wait for the device, so that this step is counted.

        Returns:
            Whether the step is bad on any rank, [] bool on the device; the number of bad steps not counted before; and
            whether training ends after this step, of which then none is left to count.
        """
        flags, (num_bad, stop) = self.any_of(bad, self.wants_stop(), at_once=at_once)
        if stop:
            num_bad += self._flags.rest()[0]
        return flags[0], num_bad, stop > 0

    def any_of(self, *flags: Tensor | bool, at_once: bool) -> tuple[Tensor, list[int]]:
        """Whether each flag is set on any rank. Every rank calls it, in every step.

        Returns:
            [n] bool on the device, and the counts of `LateFlags.read` for this step and those before.
        """
        # Filled on the device: the host does not wait for it.
        tensors = [
            flag if isinstance(flag, Tensor) else torch.full((), flag, device=self.device) for flag in flags
        ]
        agreed = torch.stack(tensors)
        if self.world_size > 1:
            counts = agreed.float()
            torch.distributed.all_reduce(counts)
            agreed = counts > 0
        return agreed, self._flags.read(agreed, at_once)

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest stored checkpoint as a local folder, the same on every rank."""
        return self.store.latest_checkpoint() if self.store is not None else nullcontext()

    def may_begin(self) -> bool:
        """Whether to take steps; every rank calls it, before the first one."""
        return True

    def reached(self, rung: Evaluation) -> None:
        """Called by every rank after a rung, whose results and checkpoint will be stored."""

    def wants_stop(self) -> bool:
        """Whether this rank has been asked to end training after the current step."""
        return False
