"""Time to quality on latents: ours beside diffusers, on the same latents of the same photographs.

    python benchmarks/latents.py SHARDS [--minutes 15] [--seeds 3]

SHARDS is a data set of latents that `ddpm encode` wrote; encoding takes as long for both, and is not counted. Ours is
`jobs/train.py folder --data SHARDS --workers 2`, without labels, which train_unconditional.py does not have. diffusers
trains a UNet2DModel with the same layers on the same x_0, which it finds in memory (peers/quality.py). The rest is as
in quality.py: the choice of the peer's learning rate, the sampler of all nets, the two distances to held-out
photographs.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from harness import tables
from harness.arguments import read
from quality import Judge, Race, run_race, tables_of
from safetensors.torch import save_file

from ddpm.config.json import override
from ddpm.config.presets import Images
from ddpm.data import latents, ray_stream
from ddpm.data.reading import HELD_OUT, DataSet
from ddpm.data.sources import folder_preset
from ddpm.runs import storage
from ddpm.utils import images

NAME = "latents"
UNLABELLED = ("--model.num-classes", "0")


@dataclass(frozen=True)
class Arguments:
    """What to train on, and for how long."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder or URI of a data set of latents."""
    peers: tuple[str, ...] = ("diffusers",)
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates among which the peer's is chosen."""
    minutes: float = 15.0
    """Minutes of each training."""
    seeds: int = 3
    num_images: int = 500
    """Images to draw from each net."""


def on_latents(shards: str, top: Path, num_images: int) -> Race:
    """The race on a data set of latents; what the peer trains on is written to TOP."""
    config = folder_preset.preset(Images(shards=shards))
    config = override(config, {"data.shards": shards, "model.num_classes": 0})
    data_set = ray_stream.open_data_set(shards)
    config = latents.configured(config, data_set.manifest, shards)
    source = top / "x_0"
    stored = everything(data_set)
    save_file({"x_0": images.to_model(stored, config.data.x_0_max).contiguous()}, source)
    photographs = latents.pixels_of(ray_stream.open_data_set(shards, HELD_OUT))
    decoder = latents.decoder_of(data_set.location, data_set.manifest)
    return Race(
        name=NAME,
        words=["--data", shards, *UNLABELLED],
        config=config,
        source=source,
        judge=Judge(everything(photographs), config, num_images, decoder),
    )


def everything(data_set: DataSet) -> torch.Tensor:
    """All images of a data set, uint8 [N, H, W, C]."""
    return torch.from_numpy(data_set.fixed_order().read(0, data_set.rows.num_rows).image)


def main() -> None:
    arguments = read(Arguments, __doc__, seeds=1, lrs=(1e-3,), minutes=1.2, num_images=20)
    with tempfile.TemporaryDirectory() as folder:
        race = on_latents(storage.resolve(arguments.shards).uri, Path(folder), arguments.num_images)
        trainings = run_race(race, Path(folder), arguments)
    found = tables_of(trainings)
    how = (
        f"After {arguments.minutes:g} minutes of training: KID-lite2 of {arguments.num_images} images (20 steps of "
        f"`dpmpp_2m`, eta 1, sigma_min 0.08, for all) and Frechet distance of 4x4 pixels to held-out photographs; "
        f"seeds: {arguments.seeds}. {tables.machine('diffusers')}."
    )
    tables.write(
        __file__,
        "Time to quality on latents",
        how,
        "",
        *found.ends,
        "",
        "Minutes until ours is as good as the peer at its end in both, seed by seed; how many times later a peer was:",
        "",
        *found.times,
        "",
        f"![Held-out photographs, then what each training of seed 0 draws](quality-{NAME}.png)",
        raw=["## All trainings", "", *found.every],
    )


if __name__ == "__main__":
    main()
