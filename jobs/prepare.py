"""Make a data set: python jobs/prepare.py SOURCE URI [options]

URI is a folder or s3://bucket/prefix. Typing the same command again goes on where it was stopped, and does
nothing if the data set is there. `python jobs/prepare.py SOURCE --help` lists a source's options.
"""

from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import tyro

from ddpm import cli
from ddpm.data.downloaded import Torchvision
from ddpm.data.glyphs import Glyphs
from ddpm.data.huggingface import HuggingFace
from ddpm.data.pictures import Folder
from ddpm.data.sources import Digits, FashionMnist

S = TypeVar("S")


@dataclass(frozen=True)
class Arguments(Generic[S]):
    """A source and where its data set goes."""

    uri: tyro.conf.Positional[str]
    """Folder or s3://bucket/prefix."""
    source: Annotated[S, tyro.conf.arg(name="")]
    parallel: bool = False
    """Write shards at once as tasks of the Ray cluster (RAY_ADDRESS, or one started here)."""
