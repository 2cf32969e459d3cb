"""How fast images are drawn: ours beside diffusers' pipelines, with the same weights and as many steps.

    python benchmarks/sampling.py [--presets digits fashion-mnist] [--repeats 3]

The two take turns, so that a machine that grows busy slows both. Speed does not depend on what a net has learned:
its weights are the first ones of a training run. The table goes to benchmarks/sampling.md.
"""

import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from runtime import processor

from ddpm import export, generation
from ddpm.config import Config
from ddpm.presets import PRESETS
from ddpm.training.state import build_net


@dataclass(frozen=True)
class Arguments:
    """What to draw."""

    presets: tuple[str, ...] = ("digits", "fashion-mnist")
    num_images: int = 64
    """Of a batch."""
    num_sample_steps: int = 20
    repeats: int = 3
    threads: int = os.cpu_count() or 1


def ours(config: Config, net: Any, arguments: Arguments, device: torch.device) -> None:
    objective = generation.build_objective(config)
    generation.draw(net, config, objective, range(arguments.num_images), device=device)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(arguments: Arguments, preset: str, sampler: str) -> list[tuple[float, float]]:
    """Images/s of diffusers and of ours, a pair a repeat."""
    import diffusers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PRESETS[preset]
    sample = replace(config.sample, sampler=sampler, num_sample_steps=arguments.num_sample_steps)
    config = replace(config, sample=sample)
    net = build_net(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        export.to_diffusers(net, config, Path(folder, "pipeline"))
        pipeline = diffusers.DDPMPipeline.from_pretrained(Path(folder, "pipeline"))
    if sampler == "ddim":
        pipeline = diffusers.DDIMPipeline(
            pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline, net = pipeline.to(device), net.to(device)

    def theirs() -> None:
        pipeline(
            batch_size=arguments.num_images,
            num_inference_steps=arguments.num_sample_steps,
            output_type="np",
        )

    pair = (theirs, lambda: ours(config, net, arguments, device))
    for call in pair:
        call()
    found = []
    for _ in range(arguments.repeats):
        a, b = (arguments.num_images / seconds(call) for call in pair)
        print(f"{preset} {sampler}: diffusers {a:.1f}, ours {b:.1f} images/s", flush=True)
        found.append((a, b))
    return found


def main() -> None:
    import diffusers

    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    lines = [
        "# How fast images are drawn",
        "",
        f"Images/s in batches of {arguments.num_images}, {arguments.num_sample_steps} steps, same weights; medians "
        f"of {arguments.repeats} (`python benchmarks/sampling.py`). {datetime.date.today()}, {arguments.threads} "
        f"threads of {where}, torch {torch.__version__}, diffusers {diffusers.__version__}.",
        "",
        "| net | sampler | diffusers' pipeline | this project | ratio | ratios |",
        "|---|---|---|---|---|---|",
    ]
    for preset in arguments.presets:
        for sampler in ("ancestral", "ddim"):
            found = measure(arguments, preset, sampler)
            a, b = (statistics.median(values) for values in zip(*found, strict=True))
            ratios = [ours / theirs for theirs, ours in found]
            every = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
            lines.append(
                f"| {preset} | {sampler} | {a:.1f} | {b:.1f} | {statistics.median(ratios):.2f} | {every} |"
            )
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
