"""Encode a data set of images: ddpm encode PIXELS LATENTS --autoencoder KIND:WEIGHTS

PIXELS and LATENTS are folders or s3://bucket/prefix; `ddpm prepare` makes PIXELS. A net trains on the latents as on
images, and what shows or judges images decodes them. Run the same command again to continue where it stopped; it does
nothing if the data set is complete.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm.cli import parsing


@dataclass(frozen=True)
class Arguments:
    pixels: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PIXELS")]
    """Folder or s3://bucket/prefix of a data set of images."""
    latents: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LATENTS")]
    """Folder or s3://bucket/prefix of the data set to make."""
    autoencoder: str
    """KIND:WEIGHTS: diffusers:FOLDER, diffusers:NAME@REVISION on Hugging Face's hub, or a kind of an installed
    package."""
    mirror: bool = False
    """Encode mirror images of the training images, too, so that there are twice as many."""
    verbose: bool = False
    """Show Ray's messages, and tracebacks."""


def main() -> None:
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    from ddpm.cluster import job_folder, ray_init  # after parsing, so that --help and errors come at once
    from ddpm.data import encode
    from ddpm.data.manifest import read_manifest
    from ddpm.data.prepare import find
    from ddpm.latents import autoencoder
    from ddpm.runs.storage import resolve

    job_folder.set_home(arguments.verbose)
    pixels = resolve(arguments.pixels)
    location = resolve(arguments.latents)
    images = read_manifest(pixels)
    loaded = autoencoder.load(arguments.autoencoder)
    kind = arguments.autoencoder.partition(":")[0]
    manifest = find(location, encode.options_of(images, loaded, arguments.mirror))
    print(f"data set    {location.uri}{' exists already' if manifest else ''}")
    if manifest is None:
        ray_init.connect(arguments.verbose)
        manifest = encode.encode(pixels, images, location, loaded, kind, mirror=arguments.mirror)
    for line in encode.about(manifest):
        print(line)
