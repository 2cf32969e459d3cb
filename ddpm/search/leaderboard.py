"""The leaderboard of a search: KID of the finalists, a table with ranks and ties, the best config.

Both rankings are shown, since likelihood and sample quality may disagree; the best config is that of the search's
metric. A trial is one net: its ranks say nothing about other trainings of its configuration, whose rank needs several.

Axes: K trainings of a configuration, M held-out images.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ddpm.config import Affects, Config, SamplerName
from ddpm.config_io import flatten, keys_that_affect, override
from ddpm.diffusion import schedules
from ddpm.evaluation import evaluate, inputs
from ddpm.evaluation.feature_scores import MAX_PAIRWISE
from ddpm.evaluation.metrics import Estimate
from ddpm.evaluation.ranking import Rank, configuration_ranks, paired_ranks, ranks
from ddpm.evaluation.results import Score
from ddpm.evaluation.rung import RANKING, REPORTING
from ddpm.evaluation.settings import Settings
from ddpm.search.setup import Setup
from ddpm.search.trials import Trial, Trials, best, short, shown
from ddpm.utils.tables import Table, estimate

SAMPLER: SamplerName = "dpmpp_2m"
STEPS = 20
"""The sampler of finalists: fast, and the same for all."""
TIMESTEPS = "schedule.num_timesteps"
LEFTOVER = 0.5
"""A trial with sqrt(D alpha_bar_T) above this is flagged.

By this much the mean of an image of D numbers stands out of the noise of x_T. Samples start without it, so that means
from N(m, s^2) come out up to m s sqrt(D alpha_bar_T) too small: at 0.5, for N(0.6, 0.1^2), by 0.03, four grey levels.
The linear schedule of Ho et al. 2020 has 0.05 at 8x8 in grey, 0.35 at 32x32 in colour, 0.70 at 64x64, 2.8 at 256x256.
"""
FEWER_TIMESTEPS = "by 0.09 bits/dim at 300, 0.18 at 200 and 0.36 at 100 of 500"
"""How much fewer timesteps raise the bound of a net of the digits, with measured variances; benchmarks/honesty.md."""


@dataclass(frozen=True)
class Row:
    """A trial's line in the table."""

    trial: Trial
    leftover: float
    """sqrt(D alpha_bar_T)."""
    by_bits: Rank | None
    """Rank of this net among the search's own with the most images seen; None: it has fewer, failed, or repeats one."""
    by_kid: Rank | None
    """Rank of this net among those whose KID is known, of the feature net that was asked for."""
    bits: NDArray[np.float64] | None
    """[K, M]: bits/dim of the trainings of its configuration, its own first; None where by_bits is."""
    by_trainings: Rank | None
    """Rank of its configuration among those trained several times."""

    @property
    def is_flagged(self) -> bool:
        return self.leftover > LEFTOVER

    @property
    def mean(self) -> Estimate | None:
        """Mean bits/dim of several trainings, on the images that rank."""
        return self._estimate(RANKING, 0) if self.by_trainings else None

    @property
    def reported(self) -> Estimate | None:
        """Mean bits/dim on images that ranked nothing, of the trainings after the search, if there are any."""
        return self._estimate(REPORTING, 1 if self.by_trainings else 0)

    def _estimate(self, images: slice, first: int) -> Estimate | None:
        """Mean bits/dim of the trainings from `first` on; the error includes the spread of all trainings."""
        if self.bits is None:
            return None
        chosen = self.bits[first:, images]
        variance = chosen.mean(0).var(ddof=1) / chosen.shape[1] + self.spread**2 / len(chosen)
        return Estimate(float(chosen.mean()), float(variance**0.5))

    @property
    def spread(self) -> float:
        """Standard deviation between the trainings; 0: there is only one."""
        return 0.0 if self.bits is None or len(self.bits) < 2 else float(self.bits.mean(1).std(ddof=1))


def score_finalists(setup: Setup, trials: Trials) -> None:
    """Compute KID of the best few trials, and store it in their folders; known values are not computed again."""
    chosen = setup.arguments
    finalists = best(trials.all(), chosen.metric)[: chosen.finalists]
    todo = [
        trial
        for trial in finalists
        if _scored(trial, setup) is None and _num_timesteps(setup, trial) >= STEPS
    ]
    if not todo:
        return
    settings = Settings(
        num_images=chosen.drawn_images,
        features=chosen.features,
        sampler=(SAMPLER,),
        num_sample_steps=(STEPS,),
        num_train_images=0,
        seed=chosen.seed,
    )
    candidates = inputs.read_checkpoints([setup.folder.child(trial.name).uri for trial in todo])
    report = evaluate.evaluate(candidates, settings, bounds=False)
    for trial, result in zip(todo, report.results, strict=True):
        (score,) = (score for score in result.drawn[0].scores if score.name.startswith("KID"))
        trials.score(trial.name, score)


def ranked(setup: Setup, trials: Trials) -> list[Row]:
    """All trials: those trained several times by the mean of the metric, others by the metric, then by images seen."""
    everything, metric, base = trials.all(), setup.arguments.metric, setup.base
    order, bits, mean = best(everything, metric), dict[str, NDArray[np.float64]](), dict[str, float]()
    for own in order:
        again = (trial for trial in everything if trial.repeats == own.name and trial.status == "finished")
        trainings = [own, *again]
        bits[own.name] = np.array([trial.last.bits for trial in trainings if trial.last])
        mean[own.name] = float(np.mean([trial.value(metric) for trial in trainings]))
    of_bits = paired_ranks([each[0, RANKING] for each in bits.values()]) if bits else []
    by_bits = dict(zip(bits, of_bits, strict=True))
    several = {name: each[:, RANKING] for name, each in bits.items() if len(each) > 1}
    by_trainings = dict(zip(several, configuration_ranks(list(several.values())), strict=True))
    order.sort(key=lambda trial: (trial.name not in several, mean[trial.name]))
    scores = {trial.name: score for trial in order if (score := _scored(trial, setup))}
    of_kid = ranks([score.value for score in scores.values()], [score.error for score in scores.values()])
    by_kid = dict(zip(scores, of_kid, strict=True))
    rest = [trial for trial in everything if trial.name not in by_bits]
    rest.sort(key=lambda trial: (-trial.images_seen, trial.value(metric)))

    def row(trial: Trial) -> Row:
        name, leftover = trial.name, _leftover(base, trial)
        return Row(
            trial, leftover, by_bits.get(name), by_kid.get(name), bits.get(name), by_trainings.get(name)
        )

    return [row(trial) for trial in (*order, *rest)]


def _scored(trial: Trial, setup: Setup) -> Score | None:
    """The trial's KID, if it is as the command line asks: an earlier call may have had another feature net."""
    chosen, score = setup.arguments, trial.score
    name = f"KID-{inputs.feature_net_name(chosen.features, setup.rungs.evaluator.train)}"
    asked = name, min(chosen.drawn_images, MAX_PAIRWISE)
    return score if score and (score.name, score.n) == asked else None


def parquet(rows: Sequence[Row]) -> bytes:
    """The table as a Parquet file; null for missing values."""
    table = list[dict[str, Any]]()
    for row in rows:
        trial = row.trial
        last = trial.last
        mean = row.mean
        score = row.trial.score if row.by_kid else None
        reported = row.reported if row is rows[0] else None
        table.append(
            {
                "trial": trial.name,
                "status": trial.status,
                "repeats": trial.repeats,
                "images_seen": trial.images_seen,
                **{key: trial.changes.get(key) for key in _varied(rows)},
                "sqrt_D_alpha_bar_T": row.leftover,
                "train_loss": last.train_loss if last else None,
                "held_out_loss": last.held_out_loss if last else None,
                "bits_per_dim": last.bits_per_dim.value if last else None,
                "bits_per_dim_error": last.bits_per_dim.error if last else None,
                "rank_by_bits": row.by_bits and str(row.by_bits),
                "mean_bits_per_dim": mean and mean.value,
                "mean_bits_per_dim_error": mean and mean.error,
                "rank_by_trainings": row.by_trainings and str(row.by_trainings),
                "reported_bits_per_dim": reported and reported.value,
                "reported_bits_per_dim_error": reported and reported.error,
                "kid": score and score.value,
                "kid_error": score and score.error,
                "rank_by_kid": row.by_kid and str(row.by_kid),
                "reason": trial.reason or None,
            }
        )
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), file)
    return file.getvalue()


def markdown(rows: Sequence[Row], remarks: Sequence[str]) -> str:
    return "\n".join([table(rows).markdown(), "", *(f"- {line}" for line in remarks)]) + "\n"


def remarks(rows: Sequence[Row], grey_levels: int = 256) -> Iterator[str]:
    """Remarks for reading the table: what its ranks and the best trial's number say, and about what.

    Args:
        grey_levels: the number of different values in the held-out images.
    """
    if rows and (reported := rows[0].reported):
        again = ", trained again after the search, which ranked it, too" if rows[0].by_trainings else ""
        yield (
            f"The best, {rows[0].trial.name}, has {estimate(*reported)} bits/dim on the held-out images that ranked "
            f"nothing{again}. The table has the other half of the images, on which it is the best by chance, too."
        )
    yield (
        "Ranks are ranges: two that overlap are a tie. Ranks of trials are ranks of nets: bits/dim are compared image "
        "by image, KID by its errors, both corrected for the number of pairs (Holm), and at most 5 % of searches find "
        "a difference between equally good nets."
    )
    if spreads := [row.spread for row in rows if row.by_trainings]:
        yield (
            "Ranks beside a mean of trainings are ranks of configurations, by Welch's test, corrected alike: at most "
            "5 % of searches find a difference between equally good configurations. The standard deviation between "
            f"trainings of one is {np.mean(np.square(spreads)) ** 0.5:.4f} bits/dim."
        )
    else:
        yield "Another training of a configuration is another net: --finalist-seeds 3 ranks configurations."
    if TIMESTEPS in _varied(rows):
        yield (
            "Trials differ in T. Fewer timesteps raise the bound of one and the same net, of the digits "
            f"{FEWER_TIMESTEPS}, with a fixed --variance by more: T alone can explain that (benchmarks/honesty.md)."
        )
    if grey_levels < 256:
        yield (
            f"The held-out images have {grey_levels} grey levels, not 256, so that bits/dim rank how finely a schedule "
            f"resolves these; a uniform code for them costs log2({grey_levels}) = {math.log2(grey_levels):.2f}."
        )
    if any(row.is_flagged for row in rows):
        yield (
            f"!: sqrt(D alpha_bar_T), with D numbers per image, is above {LEFTOVER}: x_T still shows an image's mean. "
            "The bound includes this, but samples are biased by it, since they start from pure noise."
        )
    for what, of in (("bits/dim", "by_bits"), ("mean bits/dim", "by_trainings"), ("KID", "by_kid")):
        if first := [row.trial.name for row in rows if (rank := getattr(row, of)) and rank.best == 1]:
            yield f"The best by {what}: {', '.join(first)}{', which are tied' if len(first) > 1 else ''}."


def best_config(rows: Sequence[Row], config: Config) -> str | None:
    """The best trial's changes to `config`, for `jobs/train.py PRESET --config FILE`; None: there is none.

    What depends on the machine is left out: data.shards, data.images, run and cluster.
    """
    if not rows or rows[0].by_bits is None:
        return None
    locations, nested = keys_that_affect(config, Affects.LOCATION) | {"data.images"}, dict[str, Any]()
    for key, value in flatten(override(config, rows[0].trial.changes)).items():
        group, name = key.split(".")
        if group not in ("run", "cluster") and key not in locations:
            nested.setdefault(group, {})[name] = value
    return json.dumps(nested, indent=2) + "\n"


def table(rows: Sequence[Row]) -> Table:
    """The table for display: estimates with errors, settings in short form."""
    varied = _varied(rows)
    kid = next((row.trial.score.name for row in rows if row.trial.score and row.by_kid), None)
    names = ["trial", "status", "images", *(key.rpartition(".")[2] for key in varied)]
    means = [row.mean for row in rows]
    names += ["train loss", "bits/dim", "rank", *(["mean of trainings", "rank"] if any(means) else [])]
    names += [kid, "rank"] if kid else []
    lines = []
    for row, mean in zip(rows, means, strict=True):
        trial, last, score = row.trial, row.trial.last, row.trial.score
        status = trial.status + ("" if trial.repeats is None else f", {trial.repeats} again")
        status += f": {trial.reason[:80]}" if trial.reason else ""
        line = [trial.name + (" !" if row.is_flagged else ""), status, f"{trial.images_seen:,}"]
        line += [short(trial.changes[key]) if key in trial.changes else "" for key in varied]
        line += [f"{last.train_loss:.4f}", shown(last.bits_per_dim)] if last else ["", ""]
        line.append(str(row.by_bits or ""))
        line += [estimate(*mean) if mean else "", str(row.by_trainings or "")] if any(means) else []
        if kid:
            known = score if row.by_kid else None
            line += [estimate(known.value, known.error), str(row.by_kid)] if known else ["", ""]
        lines.append(line)
    return Table(names, lines, num_words=2)


def _varied(rows: Sequence[Row]) -> list[str]:
    """The keys that any trial changes."""
    return list(dict.fromkeys(key for row in rows for key in row.trial.changes))


def _num_timesteps(setup: Setup, trial: Trial) -> int:
    return override(setup.base, trial.changes).schedule.num_timesteps


def _leftover(base: Config, trial: Trial) -> float:
    """sqrt(D alpha_bar_T) of the trial's config."""
    config = override(base, trial.changes)
    return float((config.model.num_dims * schedules.build(config.schedule).alpha_bar[-1]).sqrt())
