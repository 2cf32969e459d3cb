"""The leaderboard of a search: KID of the finalists, a table with ranks and ties, the best config.

Both rankings are shown, since likelihood and sample quality may disagree; the best config is that of the search's
metric.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddpm.config import Affects, Config, SamplerName
from ddpm.config_io import flatten, keys_that_affect, override
from ddpm.diffusion import schedules
from ddpm.evaluation import context, evaluate
from ddpm.evaluation.ranking import Rank, paired_ranks, ranks
from ddpm.evaluation.settings import Settings
from ddpm.search.config import Metric
from ddpm.search.evaluator import Evaluation
from ddpm.search.event_log import EventLog, Scored, Trial, best
from ddpm.search.setup import Setup
from ddpm.search.trial_manager import short
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.tables import Table, estimate

SAMPLER: SamplerName = "dpmpp_2m"
STEPS = 20
"""The sampler of finalists: fast, and the same for all."""
LEFTOVER = 0.5
"""A trial with sqrt(D alpha_bar_T) above this is flagged.

By this much the mean of an image of D numbers stands out of the noise of x_T. Samples start without it, so that means
from N(m, s^2) come out up to m s sqrt(D alpha_bar_T) too small: at 0.5, for N(0.6, 0.1^2), by 0.03, four grey levels.
The linear schedule of Ho et al. 2020 has 0.05 at 8x8 in grey, 0.35 at 32x32 in colour, 0.70 at 64x64, 2.8 at 256x256.
"""


@dataclass(frozen=True)
class Row:
    """A trial's line in the table."""

    trial: Trial
    leftover: float
    """sqrt(D alpha_bar_T)."""
    by_bits: Rank | None
    """Rank among the trials with the most images seen; None: this trial has fewer, or failed."""
    by_kid: Rank | None
    """Rank among the finalists."""

    @property
    def is_flagged(self) -> bool:
        return self.leftover > LEFTOVER


def score_finalists(setup: Setup, events: EventLog) -> None:
    """Compute KID of the best few trials, and append it to the event log; known values are not computed again."""
    chosen = setup.arguments
    finalists = best(events.trials(), chosen.metric)[: chosen.finalists]
    todo = [trial for trial in finalists if not trial.score or trial.score.n != chosen.drawn_images]
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
    candidates = context.read([setup.folder.child(trial.name).uri for trial in todo])
    report = evaluate.evaluate(candidates, settings)
    for trial, result in zip(todo, report.results, strict=True):
        (score,) = (score for score in result.drawn[0].scores if score.name.startswith("KID"))
        events.add(Scored(trial.number, score))


def ranked(setup: Setup, events: EventLog) -> list[Row]:
    """All trials: the finished ones by the metric, then the others by images seen."""
    trials, metric, base = events.trials(), setup.arguments.metric, setup.base
    order = best(trials, metric)
    bits = [bits_of(trial, setup.folder, base.run.storage_timeout_s) for trial in order]
    of_bits = paired_ranks(bits) if bits else []
    by_bits = dict(zip([trial.number for trial in order], of_bits, strict=True))
    scores = {trial.number: trial.score for trial in order if trial.score}
    of_kid = ranks([score.value for score in scores.values()], [score.error for score in scores.values()])
    by_kid = dict(zip(scores, of_kid, strict=True))
    rest = [trial for trial in trials if trial.number not in by_bits]
    rest.sort(key=lambda trial: (-trial.images_seen, trial.value(metric)))
    return [
        Row(trial, _leftover(base, trial), by_bits.get(trial.number), by_kid.get(trial.number))
        for trial in (*order, *rest)
    ]


def parquet(rows: Sequence[Row]) -> bytes:
    """The table as a Parquet file; null for missing values."""
    trials = [row.trial for row in rows]
    lasts, scores = [trial.last for trial in trials], [trial.score for trial in trials]
    columns = {
        "trial": [trial.name for trial in trials],
        "status": [trial.status for trial in trials],
        "images_seen": [trial.images_seen for trial in trials],
        **{key: [trial.changes.get(key) for trial in trials] for key in _varied(rows)},
        "sqrt_D_alpha_bar_T": [row.leftover for row in rows],
        **{
            name: [last and getattr(last, name) for last in lasts]
            for name in ("train_loss", "held_out_loss", "bits_per_dim", "bits_per_dim_error")
        },
        "rank_by_bits": [row.by_bits and str(row.by_bits) for row in rows],
        "kid": [score and score.value for score in scores],
        "kid_error": [score and score.error for score in scores],
        "rank_by_kid": [row.by_kid and str(row.by_kid) for row in rows],
        "reason": [trial.reason or None for trial in trials],
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def markdown(rows: Sequence[Row], remarks: Sequence[str]) -> str:
    return "\n".join([table(rows).markdown(), "", *(f"- {line}" for line in remarks)]) + "\n"


def remarks(rows: Sequence[Row], metric: Metric) -> list[str]:
    """Remarks for reading the table."""
    lines = [
        "Ranks are ranges: two that overlap are a tie. bits/dim are compared image by image, KID by its errors, "
        "both corrected for the number of pairs (Holm): at most 5 % of searches find a difference between equal trials."
    ]
    if any(row.is_flagged for row in rows):
        lines.append(
            f"!: sqrt(D alpha_bar_T), with D numbers per image, is above {LEFTOVER}: x_T still shows an image's mean. "
            "The bound includes this, but samples are biased by it, since they start from pure noise."
        )
    tied = [row for row in rows if row.by_bits and row.by_bits.best == 1]
    if len(tied) > 1:
        lines.append(
            f"{len(tied)} trials are tied for the best bits/dim: {', '.join(row.trial.name for row in tied)}."
        )
    finalists = [(row.trial.score.value, row) for row in rows if row.trial.score and row.by_kid]
    if len(finalists) > 1 and metric == "bits_per_dim":
        _, first = min(finalists, key=lambda finalist: finalist[0])
        same = first.trial is rows[0].trial
        tie = "" if same else (", though in a tie" if rows[0].by_kid and rows[0].by_kid.best == 1 else "")
        lines.append(
            f"The best by bits/dim, {rows[0].trial.name}, is "
            + ("also the best by KID." if same else f"not the best by KID, which is {first.trial.name}{tie}.")
        )
    return lines


def best_config(rows: Sequence[Row], config: Config) -> str | None:
    """The best trial's changes to `config`, for `jobs/train.py PRESET --config FILE`; None: there is none.

    What names a place is left out: data.shards, run and cluster.
    """
    if not rows or rows[0].by_bits is None:
        return None
    locations, nested = keys_that_affect(config, Affects.LOCATION), dict[str, Any]()
    for key, value in flatten(override(config, rows[0].trial.changes)).items():
        group, name = key.split(".")
        if group not in ("run", "cluster") and key not in locations:
            nested.setdefault(group, {})[name] = value
    return json.dumps(nested, indent=2) + "\n"


def table(rows: Sequence[Row]) -> Table:
    """The table for display: estimates with errors, settings in short form."""
    varied = _varied(rows)
    kid = next((row.trial.score.name for row in rows if row.trial.score), None)
    names = ["trial", "status", "images", *(key.rpartition(".")[2] for key in varied)]
    names += ["train loss", "bits/dim", "rank", *([kid, "rank"] if kid else [])]
    lines = []
    for row in rows:
        trial, last, score = row.trial, row.trial.last, row.trial.score
        status = trial.status + (f": {trial.reason[:80]}" if trial.reason else "")
        line = [trial.name + (" !" if row.is_flagged else ""), status, f"{trial.images_seen:,}"]
        line += [short(trial.changes[key]) if key in trial.changes else "" for key in varied]
        line += [f"{last.train_loss:.4f}", last.shown] if last else ["", ""]
        line.append(str(row.by_bits or ""))
        if kid:
            line += [estimate(score.value, score.error) if score else "", str(row.by_kid or "")]
        lines.append(line)
    return Table(names, lines, num_words=2)


def bits_of(trial: Trial, folder: Location, timeout_s: float = 0.0) -> tuple[float, ...]:
    """Bits/dim of each held-out image at the trial's last rung; storage may fail for `timeout_s`."""
    try:
        return Evaluation.read(folder.child(trial.name), trial.images_seen, timeout_s).bits
    except OSError as error:
        raise UserError(f"cannot read the results of {trial.name}: {error}") from None


def _varied(rows: Sequence[Row]) -> list[str]:
    """The keys that any trial changes."""
    return list(dict.fromkeys(key for row in rows for key in row.trial.changes))


def _leftover(base: Config, trial: Trial) -> float:
    """sqrt(D alpha_bar_T) of the trial's config."""
    config = override(base, trial.changes)
    return float((config.model.num_dims * schedules.build(config.schedule).alpha_bar[-1]).sqrt())
