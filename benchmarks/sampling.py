"""How fast images are drawn: ours beside diffusers' pipelines, with the same weights and as many steps.

    python benchmarks/sampling.py [--presets digits fashion-mnist] [--repeats 3]

Ours is a pool as jobs/sample.py has it. diffusers' pipeline gets all threads, and the batch size that suits it best
of some. The two take turns, so that a machine that grows busy slows both. Speed does not depend on what a net has
learned: its weights are the first ones of a training run. The table goes to benchmarks/sampling.md.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import tables, turns

from ddpm.build import build_net
from ddpm.cluster.worker_pool import WorkerPool
from ddpm.config import Config, override
from ddpm.hub import export
from ddpm.models.unet import UNet
from ddpm.presets import PRESETS
from ddpm.sampling.workers import BATCH_SIZE_CPU, BATCH_SIZE_GPU, SampleJob, SampleWorker


@dataclass(frozen=True)
class Arguments:
    """What to draw."""

    presets: tuple[str, ...] = ("digits", "fashion-mnist")
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


def pipeline(config: Config, net: UNet, device: torch.device) -> Any:
    """diffusers' pipeline of the same net and sampler."""
    import diffusers

    with tempfile.TemporaryDirectory() as folder:
        export.to_diffusers(net, config, Path(folder, "pipeline"))
        made = diffusers.DDPMPipeline.from_pretrained(Path(folder, "pipeline"))
    if config.sample.sampler == "ddim":
        scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
        made = diffusers.DDIMPipeline(made.unet, scheduler)
    made.set_progress_bar_config(disable=True)
    return made.to(device)


def measure(arguments: Arguments, preset: str, sampler: str) -> list[tuple[float, float]]:
    """Images/s of diffusers and of ours, a pair a repeat."""
    values = {"sample.sampler": sampler, "sample.num_sample_steps": arguments.num_sample_steps}
    config, n = override(PRESETS[preset], values), arguments.num_images
    net = build_net(config).eval().requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawer = pipeline(config, net, device)

    def theirs(batch_size: int) -> None:
        for _ in range(0, n, batch_size):
            drawer(batch_size=batch_size, num_inference_steps=arguments.num_sample_steps, output_type="np")

    with WorkerPool(partial(SampleWorker, SampleJob(net.state_dict(), config))) as pool:
        size = BATCH_SIZE_GPU if pool.has_gpus else BATCH_SIZE_CPU
        pieces = [range(i, min(i + size, n)) for i in range(0, n, size)]

        def ours() -> None:
            for _ in pool.map(SampleWorker.draw, pieces):
                pass

        ours()
        theirs(arguments.batch_sizes[0])  # each once, to warm up
        best = min(arguments.batch_sizes, key=lambda size: seconds(lambda: theirs(size)))
        print(f"{preset} {sampler}: diffusers in batches of {best}; images/s:", flush=True)
        calls = {"diffusers": lambda: theirs(best), "ours": ours}
        found = turns.in_turns(list(calls), arguments.repeats, lambda name: n / seconds(calls[name]))
    return list(zip(*found.values(), strict=True))


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = (
        f"Images/s of {arguments.num_images} images, {arguments.num_sample_steps} steps, same weights: diffusers in "
        f"the best batch size of {arguments.batch_sizes}, this project as jobs/sample.py draws; medians of "
        f"{arguments.repeats} that took turns (`python benchmarks/sampling.py`). "
        f"{tables.machine('diffusers', device=device)}."
    )
    rows = []
    for preset in arguments.presets:
        for sampler in ("ancestral", "ddim"):
            found = measure(arguments, preset, sampler)
            a, b = (statistics.median(values) for values in zip(*found, strict=True))
            ratios = [ours / theirs for theirs, ours in found]
            every = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
            rows.append([preset, sampler, f"{a:.2f}", f"{b:.2f}", f"{statistics.median(ratios):.2f}", every])
    names = ["net", "sampler", "diffusers' pipeline", "this project", "ratio", "ratios"]
    tables.write(__file__, "How fast images are drawn", how, "", *tables.table(names, rows))


if __name__ == "__main__":
    main()
