"""Sample images from a checkpoint: python jobs/sample.py CHECKPOINT --num-images 64 --out DIR

CHECKPOINT is the folder or s3:// URI of a checkpoint, or of a run (its newest checkpoint), or models:/NAME@ALIAS in
MLflow's registry. DIR, a folder or s3:// URI, gets grid.png and images/000000.png, ...; image i depends on the seed
and i alone. Settings that are not given default to those of training. Run the same command again to add missing images.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm import cli
from ddpm.config import SamplerName, Spacing, Variance
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Arguments of a sampling job."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder or URI of a checkpoint or run, or a registered model."""
    num_images: int = 64
    """Total number of images at `out`."""
    out: str = "samples"
    """Folder or s3:// URI for the images."""
    format: Literal["png", "parquet"] = "png"
    """png: one file per image. parquet: shards and a manifest, a data set for jobs/train.py --data.shards."""
    num_workers: Annotated[int | None, tyro.conf.arg(aliases=["--workers"])] = None
    """Number of workers, each on a GPU, or on a core if there are no GPUs. None: all GPUs or cores of the cluster at
    RAY_ADDRESS; without it those of this machine, where Ray is started only for several GPUs."""
    batch_size: int | None = None
    """Images per batch of a worker. None: 256 on a GPU, 32 on a core."""
    sampler: SamplerName | None = None
    """ddpm: Algorithm 2. ddim: few steps. dpmpp_2m, heun: fewer steps. mix: nets of uniform_mix."""
    num_sample_steps: int | None = None
    """Number of sampling steps."""
    spacing: Spacing | None = None
    """Which timesteps the steps visit: evenly in t, in sqrt(t), or in sigma^(1/7). auto: the sampler's default."""
    eta: float | None = None
    """ddim, dpmpp_2m: 0 is deterministic, 1 is as noisy as ddpm."""
    variance: Variance | None = None
    """ddpm: variance of the noise that a step adds. measured: as measured on training images by
    an earlier jobs/evaluate.py."""
    dynamic_threshold: float | None = None
    """Instead of clipping, dynamic thresholding at this quantile, such as 0.995."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guidance only where sigma is in (low, high]."""
    label: int | None = None
    """Class to sample (conditional nets). None: all classes in turn."""
    seed: int = 0
    """Image i is a function of this seed and i."""
    trajectory: bool = False
    """Also write trajectory.png and trajectory.gif: the first images, from noise to the finished image."""
    inpaint: Path | None = None
    """Image file; the part that --mask marks is kept in all images (RePaint, 250 steps with resampling)."""
    mask: Path | None = None
    """inpaint: image file, white where the image is kept."""
    num_resamples: int = 10
    """inpaint: RePaint resampling passes per jump; 1: no resampling."""
    jump_length: int = 10
    """inpaint: steps per jump back; less than the number of sampling steps."""


SETTINGS = (
    "sampler num_sample_steps spacing eta variance dynamic_threshold guidance_scale guidance_interval".split()
)


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    if (arguments.inpaint is None) != (arguments.mask is None):
        raise UserError("--inpaint and --mask belong together; give both or neither")
    if arguments.inpaint and arguments.sampler not in (None, "ddpm"):
        raise UserError(
            f"--inpaint works only with the sampler ddpm, not {arguments.sampler}; leave out --sampler"
        )
    import torch

    from ddpm.checkpoints import checkpoint, runs  # after parsing, so that --help and errors come at once
    from ddpm.hub.resolve import local_checkpoint
    from ddpm.sampling import generate, workers
    from ddpm.storage.locations import resolve
    from ddpm.utils.progress import Display

    with local_checkpoint(arguments.checkpoint) as folder:
        net, config = checkpoint.load_net(folder, torch.device("cpu"))
        measured = arguments.variance == "measured"
        x_0_error = runs.read_x_0_error(folder, config.schedule.num_timesteps) if measured else None
    given = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    config = replace(config, sample=replace(config.sample, seed=arguments.seed, **given))
    known = None
    if arguments.inpaint and arguments.mask:
        resampling = arguments.num_resamples, arguments.jump_length
        known = generate.read_known(arguments.inpaint, arguments.mask, config, *resampling)
    job = workers.SampleJob(net.state_dict(), config, arguments.label, known, x_0_error)
    out = resolve(arguments.out)
    with Display("images", arguments.num_images) as display:
        workers.draw(
            job,
            out,
            arguments.num_images,
            form=arguments.format,
            num_workers=arguments.num_workers,
            batch_size=arguments.batch_size,
            with_trajectory=arguments.trajectory,
            show=display.update,
        )
    print(f"images      {out.uri}/images" if arguments.format == "png" else f"data set    {out.uri}")
    print(f"grid        {out.uri}/grid.png")
    if arguments.trajectory:
        print(f"trajectory  {out.uri}/trajectory.gif")


if __name__ == "__main__":
    cli.run(main)
