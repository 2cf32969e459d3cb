"""Make a data set: ddpm prepare SOURCE URI [options]

URI is a folder or s3://bucket/prefix. Run the same command again to continue where it stopped; it does nothing if the
data set is complete. `ddpm prepare SOURCE --help` lists a source's options.
"""

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from ddpm.cli import parsing
from ddpm.config import kinds

if TYPE_CHECKING:
    from ddpm.runs.storage import Location

S = TypeVar("S")


@dataclass(frozen=True)
class Arguments(Generic[S]):
    uri: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URI")]
    """Folder or s3://bucket/prefix of the data set."""
    source: Annotated[S, tyro.conf.arg(name="")]
    parallel: bool | None = None
    """Write shards in parallel, as tasks of the Ray cluster (RAY_ADDRESS, or a local one). None: only if the source
    is large, and on the cluster at RAY_ADDRESS only if it reads and writes no files of this machine."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read (5 % of them at most), and list them in unreadable.txt beside the shards."""
    drop_duplicates: bool = False
    """Leave out images that look like another one, training images before held-out ones; duplicates.txt lists them."""


def main() -> None:
    field = "data.source"
    name = parsing.chosen("SOURCE", dict.fromkeys(kinds.names(field), ""), __doc__, field)
    kind: Any = Arguments[kinds.find(field, name).load()]  # type: ignore[valid-type, misc]
    arguments: Any = parsing.parse(kind, __doc__, sys.argv[2:])
    from ddpm.cluster import job_folder  # after parsing, so that --help and errors come at once
    from ddpm.data import duplicates, prepare
    from ddpm.runs.storage import resolve
    from ddpm.utils.progress import printable

    job_folder.set_home()
    location = resolve(arguments.uri)
    drop = arguments.drop_duplicates
    source = arguments.source
    manifest = prepare.find(location, prepare.options_of(source, drop_duplicates=drop))
    print(f"data set    {printable(location.uri)}{' exists already' if manifest else ''}")
    skipped = getattr(source, "skipped", "")
    if skipped:
        print(f"skipped     {skipped}")
    if manifest is None:
        connect = None
        if _is_parallel(arguments, location):
            from ddpm.cluster import ray_init  # seconds: Ray

            connect = ray_init.connect
        manifest = prepare.prepare(
            source,
            location,
            connect=connect,
            skip_unreadable=arguments.skip_unreadable,
            drop_duplicates=drop,
        )
    if line := prepare.left_out(location):
        print(line)
    for name, split in manifest.splits.items():
        print(f"{name:<11} {split.num_rows:,} images")
    print(f"fingerprint {manifest.fingerprint}")
    for line in duplicates.report(source, location, manifest, drop):
        print(line)
    print(f"preview     {printable(prepare.write_preview(location, manifest).uri)}")


def _is_parallel(arguments: Any, location: "Location") -> bool:
    """Whether shards are written by tasks of a Ray cluster."""
    from ddpm.data import prepare

    if arguments.parallel is not None:
        return bool(arguments.parallel)
    if not prepare.is_large(arguments.source):
        return False
    uses_files = location.is_local or hasattr(arguments.source, "path") or hasattr(arguments.source, "root")
    if uses_files and "RAY_ADDRESS" in os.environ:
        print("local       prepared on this machine, which has the files; --parallel if all nodes share them")
        return False
    return True
