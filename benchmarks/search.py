"""Results of a search, and of the naive choice by training loss, read from a real search.

    python tune/search.py digits --name honest --num-trials 12 --num-rungs 1 --finalists 12 ...
    python benchmarks/search.py runs/honest [--preset digits] [--seeds 1 2 3]

The same trials are ranked by the training loss, by bits/dim and by KID, and the rankings compared. The best config and
the preset's own are then trained with other seeds and compared as configurations, on the held-out images that did not
rank the trials. The tables go to benchmarks/search.md, the search's plots are beside it.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from harness import tables
from harness.arguments import read
from harness.rankings import agreement
from numpy.typing import NDArray
from scipy import stats

from ddpm.config.json import flatten
from ddpm.data import ray_stream
from ddpm.evaluation import inputs
from ddpm.evaluation.ranking import configuration_difference
from ddpm.evaluation.rung import REPORTING, Evaluator
from ddpm.runs import curves, storage
from ddpm.runs.run_folder import RunStatus
from ddpm.search.trials import Trial, Trials, changes_text, shown

REPO = Path(__file__).resolve().parent.parent
PICTURES = ("parallel.png", "bits-and-kid.png")


@dataclass(frozen=True)
class Arguments:
    """The search to read."""

    search: tyro.conf.Positional[str]
    preset: str = "digits"
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of training, at least two, for the comparison of the best config with the preset's."""
    command: str = ""
    """Command of the search, for the note."""
    overhead: bool = False
    """Print only the share of the trials' time that the steps of training took."""


def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of a - b over images on which both were evaluated, and its standard error."""
    return float((a - b).mean()), float((a - b).std(ddof=1) / len(a) ** 0.5)


def trained(
    place: storage.Location, preset: str, config: Path | None, values: dict[str, Any], name: str, seed: int
) -> str:
    """URI of the run `name`, trained as the preset (and `config`) says, as long as a trial with the config `values`."""
    flags = ["--config", str(config)] if config else []
    for key in ("data.shards", "train.total_images", "train.batch_size", "train.micro_batch_size"):
        flags += [f"--{key.replace('_', '-')}", str(values[key])]
    flags += ["--train.seed", str(seed), "--run.name", name, "--run.storage", place.uri]
    subprocess.run([sys.executable, str(REPO / "jobs" / "train.py"), preset, *flags], check=True)
    return place.child(name).uri


def rankings(trials: list[Trial]) -> list[str]:
    lasts = [trial.last for trial in trials if trial.last]
    values = {
        "train loss": np.array([last.train_loss for last in lasts]),
        "bits/dim": np.array([last.bits_per_dim.value for last in lasts]),
        "KID": np.array([trial.score.value for trial in trials if trial.score]),
    }
    places = {name: v.argsort().argsort() + 1 for name, v in values.items()}
    rows: list[list[object]] = []
    for i in values["bits/dim"].argsort():
        trial = trials[i]
        last = lasts[i]
        cells = {
            "train loss": f"{last.train_loss:.4f}",
            "bits/dim": shown(last.bits_per_dim),
            "KID": f"{trial.score.value:.4f} ± {trial.score.error:.4f}",
        }
        ranked = [cell for name in values for cell in (cells[name], places[name][i])]
        rows.append([trial.name, *ranked, changes_text(trial.changes)])
    lines = tables.table(["trial", *(cell for name in values for cell in (name, "its rank")), ""], rows)
    pairs = {(a, b): agreement(values[a], values[b]) for a, b in itertools.combinations(values, 2)}
    agreements = [[f"{a} and {b}", f"{r.spearman:+.2f}", f"{r.kendall:+.2f}"] for (a, b), r in pairs.items()]
    return [*lines, "", *tables.table(["rankings", "Spearman's rho", "Kendall's tau"], agreements)]


def cost(trials: list[Trial]) -> str:
    """The cost of the naive choice."""
    naive = min(trials, key=lambda trial: trial.last.train_loss)
    honest = min(trials, key=lambda trial: trial.bits_per_dim)
    a, b = (np.array(trial.last.bits)[REPORTING] for trial in (naive, honest))
    bits, error = difference(a, b)
    kid = naive.score.value - honest.score.value
    kid_error = (naive.score.error**2 + honest.score.error**2) ** 0.5
    if naive is honest:
        return f"The lowest training loss and the lowest bound belong to the same trial, {naive.name}."
    by_loss, by_bound = (f"{trial.name} ({changes_text(trial.changes)})" for trial in (naive, honest))
    return (
        f"A search by the training loss would have chosen {by_loss}; by the bound it is {by_bound}. The naive choice "
        f"costs {bits:+.4f} ± {error:.4f} bits/dim (these two nets, image by image, on images that did not rank) and "
        f"{kid:+.4f} ± {kid_error:.4f} in {naive.score.name}."
    )


def beaten(arguments: Arguments, place: storage.Location, trials: list[Trial]) -> list[str]:
    """The best config beside the preset's, both trained with other seeds."""
    settings = json.loads(place.child("search.json").read())["settings"]
    best = Path(place.path, "best.json")
    (trial,) = inputs.read_checkpoints([place.child(trials[0].name).uri])
    values = flatten(trial.config)
    train = ray_stream.open_configured(trial.config)
    held_out = train.held_out()
    assert held_out is not None, "the search had one"
    evaluator = Evaluator(train, held_out, settings["num_images"], seed=settings["seed"])
    bits = []
    for name, config in (("best", best), ("default", None)):
        uris = [
            trained(place, arguments.preset, config, values, f"{name}-seed-{seed}", seed)
            for seed in arguments.seeds
        ]
        nets = inputs.read_checkpoints(uris)
        each = [evaluator.evaluate(net, net.state["images_seen"]).bits for net in nets]
        bits.append(np.array(each)[:, REPORTING])
    mean, error, dof = configuration_difference(*bits)
    t = stats.t.ppf(0.975, dof)
    names = ("best of the search", f"the preset {arguments.preset}")
    rows = [
        [
            name,
            *(f"{of_net.mean():.4f}" for of_net in of_nets),
            f"{of_nets.mean():.4f}",
            f"{of_nets.mean(1).std(ddof=1):.4f}",
        ]
        for name, of_nets in zip(names, bits, strict=True)
    ]
    beaten = "is beaten" if mean + t * error < 0 else "was not beaten"
    seeds = [f"seed {seed}" for seed in arguments.seeds]
    return [
        *tables.table(["bits/dim of a configuration", *seeds, "mean", "spread of trainings"], rows),
        "",
        f"Best minus default: {mean:+.4f} bits/dim, 95 % interval {mean - t * error:+.4f} to {mean + t * error:+.4f} "
        "(Welch, with the spread of trainings and images), on images that did not rank the trials. This is about the "
        f"two configurations: the default {beaten}.",
    ]


def overhead(trials: list[Trial], place: storage.Location) -> str:
    """The share of steps in the time of trials, each of which was started once."""
    steps_s = 0.0
    wall_s = sum(trial.wall_s for trial in trials)
    for trial in trials:
        before = 0
        for point in curves.read(place.child(trial.name)).get("train/images_per_s", []):
            steps_s += (point.images_seen - before) / point.value
            before = point.images_seen
    return (
        f"{len(trials)} trials took {wall_s:.0f} s, each from its start to its end, of which the steps took "
        f"{steps_s:.0f} s: {steps_s / wall_s:.0%}."
    )


def main() -> None:
    arguments = read(Arguments, __doc__, seeds=(1, 2))
    place = storage.resolve(arguments.search)
    everything = Trials(place).all()
    if arguments.overhead:
        print(overhead(everything, place))
        return
    trials = [trial for trial in everything if trial.status == RunStatus.FINISHED and trial.score]
    lines = [
        f"{len(everything)} trials, {len(trials)} of them to their end ({arguments.command or 'tune/search.py'}; "
        f"`python benchmarks/search.py {arguments.search}`). {tables.machine()}. "
        "Ranks count from the best; intervals are standard errors, and ranks that overlap are a tie.",
        "",
        *rankings(trials),
        "",
        cost(trials),
        "",
        *beaten(arguments, place, trials),
        "",
        overhead(everything, place),
        "",
    ]
    for name in PICTURES:
        target = tables.result(Path(__file__).with_name(f"search-{name}"))
        target.write_bytes(place.child(name).read())
        lines.append(f"![{name.removesuffix('.png')}]({target.name})")
    tables.write(__file__, "What a search finds", *lines)


if __name__ == "__main__":
    main()
