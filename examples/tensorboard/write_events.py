"""Show runs in TensorBoard: python examples/tensorboard/write_events.py RUN [RUN ...] [--out events]

    tensorboard --logdir events

The curves and pictures of each run become event files in OUT/NAME; those of an earlier call are replaced. It needs
requirements.txt. A run's folder is the record: whatever shows a run reads only there, also while the run trains.
"""

from pathlib import Path
from typing import Annotated

import tyro
from torch.utils.tensorboard import SummaryWriter

from ddpm.cli import parsing
from ddpm.runs import curves, run_folder
from ddpm.utils import images


def write_events(run: run_folder.RunFolder, folder: Path) -> None:
    """Write all curves, and the pictures at each multiple of train.sample_every_images; a step is an image seen."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, points in curves.read(run.location).items():
            for point in points:
                writer.add_scalar(name, point.value, point.images_seen, walltime=point.timestamp_ms / 1000)
        for series in (run_folder.SAMPLES, run_folder.DENOISING):
            for images_seen, file in run_folder.pictures(run.location, series).items():
                png = file.read()
                time_ms = images.time_ms_of(png)
                writer.add_image(
                    series,
                    images.from_png(png),
                    images_seen,
                    walltime=None if time_ms is None else time_ms / 1000,
                    dataformats="HWC",
                )


def main(
    uris: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")],
    out: Path = Path("events"),
) -> None:
    """
    Args:
        uris: Folders or URIs of runs.
        out: Folder for the events.
    """
    for run in map(run_folder.existing_run, uris):
        write_events(run, out / run.name)
    print(f"shown by    tensorboard --logdir {out}")


if __name__ == "__main__":
    parsing.run(lambda: tyro.cli(main, description=__doc__))
