"""Make a data set: python jobs/prepare.py SOURCE URI [options]

URI is a folder or s3://bucket/prefix. Run the same command again to continue where it stopped; it does nothing if the
data set is complete. `python jobs/prepare.py SOURCE --help` lists a source's options.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

import tyro

from ddpm import cli
from ddpm.data import catalog

S = TypeVar("S")


@dataclass(frozen=True)
class Arguments(Generic[S]):
    uri: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URI")]
    """Folder or s3://bucket/prefix of the data set."""
    source: Annotated[S, tyro.conf.arg(name="")]
    parallel: bool | None = None
    """Write shards in parallel, as tasks of the Ray cluster (RAY_ADDRESS, or a local one). None: only if the source
    is large."""


def main() -> None:
    kinds = {
        name: Annotated[Arguments[kind], tyro.conf.subcommand(name)]  # type: ignore[valid-type]
        for name, kind in catalog.sources().items()
    }
    arguments: Any = cli.parse(Union[tuple(kinds.values())], __doc__, "SOURCE", list(kinds))  # noqa: UP007
    from ddpm.data import prepare  # after parsing, so that --help and errors come at once
    from ddpm.storage.locations import resolve
    from ddpm.utils.progress import Display, printable

    source, location = arguments.source, resolve(arguments.uri)
    manifest = prepare.find(source, location)
    print(f"data set    {printable(location.uri)}{' exists already' if manifest else ''}")
    if skipped := getattr(source, "skipped", ""):
        print(f"skipped     {skipped}")
    if manifest is None:
        parallel = prepare.is_large(source) if arguments.parallel is None else arguments.parallel
        if parallel:
            from ddpm.cluster.ray_init import connect

            connect()
        with Display("preparing", sum(source.splits.values())) as display:
            manifest = prepare.prepare(
                source,
                location,
                on_progress=lambda done, _: display.update(done),
                on_restart=lambda: print(
                    "restarted   the source's files have changed since preparation began"
                ),
                parallel=parallel,
            )
    for name, split in manifest.splits.items():
        print(f"{name:<11} {split.num_rows:,} images")
    print(f"fingerprint {manifest.fingerprint}")
    print(f"preview     {printable(prepare.write_preview(location, manifest).uri)}")


if __name__ == "__main__":
    cli.run(main)
