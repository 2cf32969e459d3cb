"""Sample images from a checkpoint: ddpm sample CHECKPOINT --num-images 64 --seed 0 --out DIR

CHECKPOINT is the folder or s3:// URI of a checkpoint or of a run (its newest checkpoint), models:/NAME@ALIAS in
MLflow's registry, or builtin:NAME. Writes grid.png and images/000000.png, ... into DIR, a folder or s3:// URI. Image i
depends on the seed and i alone. Other settings default to those of training. The same command makes missing images.
"""

import re
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import NonEmptyStr, NumImages, PositiveInt, SampleFlags, SamplerName, Seed
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments(SampleFlags):
    """Arguments of a sampling job."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder or URI of a checkpoint or run, a registered model, or a built-in net."""
    num_images: NumImages = 64
    """Total number of images at `out`."""
    out: NonEmptyStr | None = None
    """Folder or s3:// URI for the images. None: samples/RUN-seedN or samples/RUN-LABEL-seedN."""
    num_workers: Annotated[PositiveInt | None, tyro.conf.arg(aliases=["--workers"])] = None
    """Number of workers, each on a GPU, or on a core if there are no GPUs. None: all GPUs or cores of the cluster at
    RAY_ADDRESS; without it those of this machine, where Ray is started only for several GPUs."""
    batch_size: PositiveInt | None = None
    """Images per batch of a worker. None: 256 on a GPU, 32 on a core."""
    sampler: SamplerName | None = None
    """ddpm: Algorithm 2. ddim: few steps. dpmpp_2m, heun: fewer steps. mix: nets of uniform_mix."""
    num_sample_steps: PositiveInt | None = None
    """Number of sampling steps. None: those of training; all T if --sampler ddpm takes the place of another one."""
    label: NonEmptyStr | None = None
    """Class to sample, its name or number (conditional nets). None: all classes in turn."""
    seed: Seed = 0
    """Image i is a function of this seed and i."""
    trajectory: bool = False
    """Also write trajectory.png and trajectory.gif: the first images, from noise to the finished image."""


def main() -> None:
    if any(word.partition("=")[0] == "--inpaint" for word in sys.argv):
        raise UserError("--inpaint is an example now: python examples/inpainting/inpaint.py RUN")
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.build import with_sampler
    from ddpm.cluster import job_folder
    from ddpm.config.json import flatten
    from ddpm.data import latents  # after parsing, so that --help and errors come at once
    from ddpm.runs.names import local_checkpoint, name_of
    from ddpm.runs.storage import resolve
    from ddpm.sampling import generate, workers
    from ddpm.tracking import run_params
    from ddpm.utils.progress import Display

    job_folder.set_home()
    with local_checkpoint(arguments.checkpoint) as folder:
        trained = latents.load_net(folder)
        sample = arguments.changed(
            with_sampler(trained.config.sample, arguments.sampler, trained.config.objective),
            num_sample_steps=arguments.num_sample_steps,
            seed=arguments.seed,
        )
        trained = trained.sampled_with(sample)
    given = [name for name in flatten(sample) if getattr(arguments, name, None) is not None]
    run_params.check_effect([trained.config], given, run_params.flag)
    label = generate.class_of(trained, arguments.label)
    job = workers.SampleJob(trained, label, batch_size=arguments.batch_size)
    name = name_of(arguments.checkpoint)
    if arguments.label is not None:
        name += "-" + re.sub(r"[^\w.-]+", "-", arguments.label)
    out = resolve(arguments.out or f"samples/{name}-seed{arguments.seed}")
    with Display("images", arguments.num_images) as display:
        workers.draw(
            job,
            out,
            arguments.num_images,
            num_workers=arguments.num_workers,
            with_trajectory=arguments.trajectory,
            show=display.update,
        )
    print(f"images      {out.uri}/images")
    print(f"grid        {out.uri}/grid.png")
    if arguments.trajectory:
        print(f"trajectory  {out.uri}/trajectory.gif")
