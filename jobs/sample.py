"""Draw images from a checkpoint: python jobs/sample.py CHECKPOINT --num-images 64 --out DIR

CHECKPOINT is the folder or s3:// URI of a checkpoint, or of a run (its newest), or models:/NAME@ALIAS of MLflow's
registry. DIR gets grid.png and images/000000.png, ...; image i depends on the seed and i alone. What is not given
is as in training.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from ddpm import cli


@dataclass(frozen=True)
class Arguments:
    """What to draw, and how."""

    checkpoint: tyro.conf.Positional[str]
    num_images: int = 64
    out: Path = Path("samples")
    """Folder for the images."""
    sampler: Literal["ancestral", "ddim", "mix"] | None = None
    num_sample_steps: int | None = None
    """Steps of ddim and mix."""
    eta: float | None = None
    """ddim: 0 is deterministic, 1 as noisy as ancestral."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none."""
    label: int | None = None
    """The class to draw (conditional nets); None: all in turn."""
    seed: int = 0
    batch_size: int = 256
    """Images drawn at a time."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    import torch

    from ddpm import generation, runs
    from ddpm.progress import Display
    from ddpm.training import checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with runs.local_checkpoint(arguments.checkpoint) as folder:
        net, config = checkpoint.load_net(folder, device)
    given = {
        name: getattr(arguments, name) for name in ("sampler", "num_sample_steps", "eta", "guidance_scale")
    }
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(config, sample=replace(config.sample, seed=arguments.seed, **given))
    with Display("images", arguments.num_images) as display:
        grid = generation.write_images(
            net,
            config,
            arguments.num_images,
            arguments.out,
            device,
            arguments.label,
            arguments.batch_size,
            display.update,
        )
    print(f"images      {arguments.out.absolute()}/images")
    print(f"grid        {grid.absolute()}")


if __name__ == "__main__":
    cli.run(main)
