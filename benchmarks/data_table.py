"""The results of benchmarks/data.py as Markdown."""

import math
import statistics
from typing import Any

from data_sets import CASES, FILES, PACE, STORED, TRAINED
from harness import tables
from peers.data import BATCH, WORKERS

NAMES = {
    "ours-1": "ours, 1 consumer",
    "ours-2": "ours, 2 consumers",
    "ours-8": "ours, 8 consumers",
    "mosaicml_streaming": "mosaicml-streaming, first epoch",
    "mosaicml_local": "mosaicml-streaming, from its local copy",
    "webdataset": "webdataset",
    "dataloader": "DataLoader, files",
}
EXACT = {
    "ours-1": ("yes", "yes"),
    "ours-2": ("yes, whatever the number of consumers", "yes"),
    "ours-8": ("yes, whatever the number of consumers", "yes"),
    "mosaicml_streaming": ("yes", "yes"),
    "mosaicml_local": ("yes", "yes"),
    "webdataset": ("no", "no"),
    "dataloader": ("with a seeded sampler", "no"),
}
"""Whether the order depends only on the seed, and whether reading resumes where it stopped, as documented."""
PACKAGES = ("ray", "pyarrow", "pillow", "simplejpeg", "mosaicml-streaming", "webdataset")
COLUMNS = (
    "|images/s|ours is faster by|images/s of CPU time|ours is faster by|first batch|neighbours|displacement|memory|"
    "exact order|exact resume"
).split("|")
TITLES = {
    "raw": "Raw, 32x32x3",
    "encoded": f"JPEG, {STORED}x{STORED} decoded to {TRAINED}x{TRAINED}",
}
HOW = f"""All hand out uint8 batches of {BATCH}; {WORKERS} loader workers or reading tasks, one a core; ours and
webdataset shuffle {CASES["raw"].window:,} images (JPEG: {CASES["encoded"].window:,}) among each other,
mosaicml-streaming (py1e, its default) and DataLoader all. Ours and webdataset read S3 always, mosaicml-streaming in its
first epoch, DataLoader (PNG or JPEG files, at most {FILES:,}) the local disk. CPU time is that of all processes of a
contestant, Ray's own included; the server's is not. Neighbours: mean distance of successive images in the original
order; displacement: mean distance of an image from its original place; 1 is a uniform permutation. Memory: what the
largest process shares with no other. First batch: ours starts its processes, with Ray running; the peers' library is
imported already. "Pillow and Resize" is what the peers' documentation does, "draft mode" decodes JPEGs at a fraction of
their size, and "our decoder" is `ddpm.data.row_group.decode`, which does that too.""".replace("\n", " ")
SEEKS = [
    "From the call to the first batch, raw images; Ray runs already, the peer's workers are started.",
    "",
]
STALLS = (
    f"{CASES['small'].num_images:,} raw images, two epochs, and a trainer that takes {PACE:,} a second: the longest "
    f"wait for a batch from the last one of the epoch to {CASES['small'].window:,} images later, and anywhere else."
)


def lines(figures: dict[str, list[Any]]) -> list[str]:
    """The tables, as Markdown."""

    def median(key: str, name: str) -> float:
        values = [run[name] for run in figures.get(key, []) if name in run]
        return statistics.median(values) if values else math.nan

    def titles(case: str) -> dict[str, str]:
        """The title of every key of the case."""
        how = {
            "documented": ", Pillow and Resize",
            "drafted": ", Pillow's draft mode",
            "decode_as_ours": ", our decoder",
        }
        found = {}
        for name in NAMES:
            for decoder in how:
                if (key := f"{case} {name} {decoder}") in figures:
                    suffix = how[decoder] if case == "encoded" and not name.startswith("ours") else ""
                    found[key] = NAMES[name] + suffix
        return found

    def table(case: str) -> list[str]:
        ours = [key for key in titles(case) if key.split()[1].startswith("ours")]
        best = {name: max(median(key, name) for key in ours) for name in ("per_s", "per_cpu_s")}
        rows = []
        for key, title in titles(case).items():
            cells = []
            for name in best:
                speed = median(key, name)
                cells += [f"{speed:,.0f}", f"{best[name] / speed:.2f}"]
            cells += [f"{median(key, 'first_s'):.1f} s", f"{median(key, 'neighbours'):.2f}"]
            cells += [f"{median(key, 'displacement'):.2f}", f"{median(key, 'memory') / 2**20:,.0f} MiB"]
            rows.append([title, *cells, *EXACT[key.split()[1]]])
        return tables.table(COLUMNS, rows)

    said = [
        f"`PYTHONPATH=tests python benchmarks/data.py`, {tables.machine(*PACKAGES)}; the S3 server (SeaweedFS) shares "
        f"the cores. {HOW}",
    ]
    for case, title in TITLES.items():
        if f"{case} ours-1 decode_as_ours" in figures:
            said += ["", f"## {title}", "", *table(case)]
    ours = next((runs for key, runs in figures.items() if key.startswith("raw ours-1")), None)
    if ours:
        seeks = [statistics.median(run["seeks_s"][i] for run in ours) for i in range(3)]
        peer = figures.get("raw mosaicml_streaming decode_as_ours", [{}])[-1].get("seeks_s")
        rows = [["ours", *(f"{s:.2f} s" for s in seeks)]]
        if peer:
            rows.append(["mosaicml-streaming", *(f"{s:.2f} s" for s in peer), "-"])
        rows.append(["webdataset, DataLoader", "-", "reads and drops what comes before", "-"])
        names = ["", "from the beginning", "from the middle of the epoch", "of the 101st"]
        said += ["", "## Seeking", "", *SEEKS, *tables.table(names, rows)]
    if any(key.startswith("small") for key in figures):
        rows = [
            [title, *(f"{1000 * median(key, name):.0f} ms" for name in ("boundary_s", "elsewhere_s"))]
            for key, title in titles("small").items()
        ]
        said += ["", "## The end of an epoch", "", STALLS, ""]
        said += tables.table(["", "longest wait at the boundary", "elsewhere"], rows)
    return said
