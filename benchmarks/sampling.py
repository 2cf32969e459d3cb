"""Sampling speed: ours against diffusers' pipelines, with the same weights.

    python benchmarks/sampling.py [--nets digits fashion-mnist cifar] [--repeats 3]

Ours is the worker pool of jobs/sample.py, with one worker (a thread) and with all. diffusers' pipeline gets all
threads, and the fastest of some batch sizes. All take turns, so that a machine that gets busy slows all. Speed does not
depend on training: the weights are the initial ones of a run. In one table all take the same number of steps, alone and
beside one process that computes all the time; in the other few steps of another sampler
(benchmarks/samplers.md): all for diffusers' pipeline, few for ours. The tables go to benchmarks/sampling.md, above the
text written by hand.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import tables, turns
from harness.arguments import read
from harness.processes import busy
from peers.step import CASES

from ddpm.build import TrainedNet, build_net, num_sample_steps, resolve_sample
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.export import export
from ddpm.models.unet import UNet
from ddpm.sampling.pool import WorkerPool
from ddpm.sampling.workers import BATCH_SIZE_CPU, BATCH_SIZE_GPU, SampleJob, SampleWorker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIFFUSERS = "diffusers"
ONE = "ours, one worker"
ALL = "ours"
NEIGHBOURS = (0, 1)
"""Busy processes beside the contestants."""
TRAINED = ("digits", "fashion-mnist")
"""The nets whose number of steps is measured in benchmarks/samplers.md."""


@dataclass(frozen=True)
class Arguments:
    """What to draw."""

    nets: tuple[str, ...] = ("digits", "fashion-mnist", "cifar")
    """Presets, or cifar: the net of benchmarks/step.py."""
    num_images: int = 128
    num_sample_steps: int = 20
    repeats: int = 3
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    """Batch sizes tried with diffusers."""


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def pipeline(config: Config, net: UNet, sampler: str) -> Any:
    """diffusers' pipeline of the same net: ddpm is its unchanged DDPMPipeline."""
    import diffusers

    with tempfile.TemporaryDirectory() as folder:
        export.to_diffusers(TrainedNet(net, config), Path(folder, "pipeline"))
        made = diffusers.DDPMPipeline.from_pretrained(Path(folder, "pipeline"))
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
        made = diffusers.DDIMPipeline(made.unet, scheduler)
    made.set_progress_bar_config(disable=True)
    return made.to(DEVICE)


def measure(
    arguments: Arguments, config: Config, sampler: str, num_steps: int, neighbours: Sequence[int] = (0,)
) -> list[dict[str, list[float]]]:
    """Images/s by contestant, in turns, beside each number of busy processes.

    Ours samples as `config` says, diffusers with `sampler` and `num_steps`.
    """
    net = build_net(config).eval().requires_grad_(False)
    n = arguments.num_images
    drawer = pipeline(config, net, sampler)
    few = min(num_steps, arguments.num_sample_steps)

    def theirs(num_steps: int, n: int, batch_size: int) -> None:
        for i in range(0, n, batch_size):
            some = min(batch_size, n - i)
            drawer(batch_size=some, num_inference_steps=num_steps, output_type="np")

    theirs(few, n, n)  # to warm up
    best = min(arguments.batch_sizes, key=lambda size: seconds(partial(theirs, few, n, size)))
    print(f"diffusers in batches of {best}; images/s:", flush=True)
    many = n if num_steps == few else best  # with many steps one batch is enough
    calls = {DIFFUSERS: (many, partial(theirs, num_steps, many, best))}
    with ExitStack() as stack:
        for name, num_workers in ((ONE, 1), (ALL, None)):
            job = SampleJob(TrainedNet(net, config))
            pool = stack.enter_context(WorkerPool(partial(SampleWorker, job), num_workers))
            size = BATCH_SIZE_GPU if pool.has_gpus else BATCH_SIZE_CPU
            pieces = [range(i, min(i + size, n)) for i in range(0, n, size)]
            calls[name] = (
                n,
                partial(lambda pool, pieces: [*pool.map(SampleWorker.draw, pieces)], pool, pieces),
            )
            calls[name][1]()  # to warm up

        def turn(cell: tuple[str, int]) -> float:
            name, number = cell
            with busy(number):
                return calls[name][0] / seconds(calls[name][1])

        cells = [(name, number) for number in neighbours for name in calls]
        found = turns.in_turns(cells, arguments.repeats, turn)
    return [{name: found[name, number] for name in calls} for number in neighbours]


def ratio(found: dict[str, list[float]], a: str, b: str) -> str:
    """The median of a / b over turns, and all ratios in brackets."""
    each = sorted(x / y for x, y in zip(found[a], found[b], strict=True))
    return f"{statistics.median(each):.2f} ({', '.join(f'{value:.2f}' for value in each)})"


def main() -> None:
    arguments = read(
        Arguments, __doc__, nets=("digits",), num_images=4, num_sample_steps=2, repeats=1, batch_sizes=(4,)
    )
    how = (
        f"Images/s of {arguments.num_images} images, same weights: diffusers in the best batch size of "
        f"{arguments.batch_sizes}, this project as jobs/sample.py draws, with one worker and with all, alone and "
        f"beside one busy process; medians of {arguments.repeats} that took turns, and ratios of turns "
        f"(`python benchmarks/sampling.py`). {tables.machine('diffusers', device=DEVICE.type)}."
    )
    equal = []
    good = []
    steps = arguments.num_sample_steps
    for net in arguments.nets:
        config = CASES[net]
        for sampler in ("ddpm", "ddim"):
            asked = override(config, {"sample.sampler": sampler, "sample.num_sample_steps": steps})
            beside = measure(arguments, asked, sampler, steps, NEIGHBOURS)
            for number, found in zip(NEIGHBOURS, beside, strict=True):
                speeds = [f"{statistics.median(values):.1f}" for values in found.values()]
                ratios = [ratio(found, ALL, DIFFUSERS), ratio(found, ALL, ONE)]
                equal.append([net, sampler, number, *speeds, *ratios])
        if net in TRAINED:
            sample = resolve_sample(config.sample, config.objective)
            num_timesteps = config.schedule.num_timesteps
            (found,) = measure(arguments, config, "ddpm", num_timesteps)
            ours = f"{sample.sampler}, {num_sample_steps(sample, num_timesteps)} steps"
            speeds = [f"{statistics.median(found[name]):.2f}" for name in (DIFFUSERS, ALL)]
            good.append([net, f"ddpm, {num_timesteps} steps", ours, *speeds, ratio(found, ALL, DIFFUSERS)])
    tables.write(
        __file__,
        "How fast images are drawn",
        how,
        "",
        f"## With as many steps: {steps}",
        "",
        *tables.table(
            ["net", "sampler", "busy", DIFFUSERS, ONE, ALL, "ours / diffusers", "all workers / one"], equal
        ),
        "",
        "## With few steps of another sampler, whose images have not been shown to be as good",
        "",
        *tables.table(
            ["net", "diffusers", "ours", "diffusers, images/s", "ours, images/s", "ours / diffusers"], good
        ),
    )


if __name__ == "__main__":
    main()
