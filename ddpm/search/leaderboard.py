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
from rich import box
from rich.table import Table

from ddpm.config import Config, flatten, override
from ddpm.diffusion import schedules
from ddpm.evaluation import context, evaluate
from ddpm.evaluation.ranking import Rank, paired_ranks, ranks
from ddpm.search.config import Arguments
from ddpm.search.evaluator import Evaluation
from ddpm.search.event_log import EventLog, Metric, Trial, best
from ddpm.search.runner import EVALUATIONS
from ddpm.search.trial_manager import short
from ddpm.storage.locations import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import retry_io

SAMPLER, STEPS = "dpmpp_2m", 20
"""The sampler of finalists: fast, and the same for all."""
LEFTOVER = 0.5
"""A trial with sqrt(D alpha_bar_T) above this is flagged.

By this much the mean of an image of D numbers stands out of the noise of x_T. Samples start without it, so that means
from N(m, s^2) come out up to m s sqrt(D alpha_bar_T) too small: at 0.5, for N(0.6, 0.1^2), by 0.03, four grey levels.
The linear schedule of Ho et al. 2020 has 0.05 at 8x8 in grey, 0.35 at 32x32 in colour, 0.70 at 64x64, 2.8 at 256x256.
"""
TRIAL_KEYS = ("train.checkpoint_every_images", "train.keep_checkpoints")
"""Settings that a search sets itself; best.json leaves them out."""


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


def draw_finalists(events: EventLog, place: Location, chosen: Arguments) -> None:
    """Compute KID of the best few trials, and append it to the event log; known values are not computed again."""
    finalists = best(events.trials(), chosen.metric)[: chosen.finalists]
    todo = [trial for trial in finalists if not trial.drawn or trial.drawn["n"] != chosen.drawn_images]
    if not todo:
        return
    settings = context.Settings(
        num_images=chosen.drawn_images,
        features=chosen.features,
        samplers=(SAMPLER,),
        num_sample_steps=(STEPS,),
        num_train_images=0,
        seed=chosen.seed,
    )
    candidates = context.read([place.child(trial.name).uri for trial in todo])
    report = evaluate.evaluate(candidates, settings)
    for trial, result in zip(todo, report.results, strict=True):
        (score,) = (score for score in result.drawn[0].scores if score.name.startswith("KID"))
        events.add("drawn", trial.number, **vars(score))


def ranked(trials: Sequence[Trial], place: Location, metric: Metric, base: Config) -> list[Row]:
    """All trials: the finished ones by the metric, then the others by images seen."""
    order = best(trials, metric)
    bits = [bits_of(trial, place, base.run.storage_timeout_s) for trial in order]
    of_bits = paired_ranks(bits) if bits else []
    by_bits = dict(zip([trial.number for trial in order], of_bits, strict=True))
    drawn = [trial for trial in order if trial.drawn]
    of_kid = ranks([trial.drawn["value"] for trial in drawn], [trial.drawn["error"] for trial in drawn])
    by_kid = dict(zip([trial.number for trial in drawn], of_kid, strict=True))
    rest = [trial for trial in trials if trial.number not in by_bits]
    rest.sort(key=lambda trial: (-trial.images_seen, trial.value(metric)))
    return [
        Row(trial, _leftover(base, trial), by_bits.get(trial.number), by_kid.get(trial.number))
        for trial in (*order, *rest)
    ]


def columns(found: Sequence[Row]) -> dict[str, list[Any]]:
    """The table, column by column; None for missing values."""
    keys = list(dict.fromkeys(key for s in found for key in s.trial.changes))
    lasts, drawn = [s.trial.last for s in found], [s.trial.drawn for s in found]
    return {
        "trial": [s.trial.name for s in found],
        "status": [s.trial.status for s in found],
        "images_seen": [s.trial.images_seen for s in found],
        **{key: [s.trial.changes.get(key) for s in found] for key in keys},
        "sqrt_D_alpha_bar_T": [s.leftover for s in found],
        "train_loss": [last.train_loss if last else None for last in lasts],
        "held_out_loss": [last.held_out_loss if last else None for last in lasts],
        "bits_per_dim": [last.bits_per_dim if last else None for last in lasts],
        "bits_per_dim_error": [last.bits_per_dim_error if last else None for last in lasts],
        "rank_by_bits": [s.by_bits and str(s.by_bits) for s in found],
        "kid": [d.get("value") for d in drawn],
        "kid_error": [d.get("error") for d in drawn],
        "rank_by_kid": [s.by_kid and str(s.by_kid) for s in found],
        "reason": [s.trial.reason or None for s in found],
    }


def parquet(found: Sequence[Row]) -> bytes:
    made = {
        name: [str(v) if isinstance(v, tuple | list) else v for v in values]
        for name, values in columns(found).items()
    }
    file = io.BytesIO()
    pq.write_table(pa.table(made), file)
    return file.getvalue()


def table(found: Sequence[Row]) -> Table:
    """The table for a terminal."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names, rows = _shown(found)
    for name in names:
        made.add_column(name, justify="left" if name in ("trial", "status") else "right")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(found: Sequence[Row], remarks: Sequence[str]) -> str:
    names, rows = _shown(found)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks)]) + "\n"


def remarks(found: Sequence[Row], metric: Metric) -> list[str]:
    """Remarks for reading the table."""
    lines = [
        "Ranks are ranges: two that overlap are a tie. bits/dim are compared image by image, KID by its errors, "
        "both corrected for the number of pairs (Holm): at most 5 % of searches find a difference between equal trials."
    ]
    if any(s.is_flagged for s in found):
        lines.append(
            f"!: sqrt(D alpha_bar_T), with D numbers per image, is above {LEFTOVER}: x_T still shows an image's mean. "
            "The bound includes this, but samples are biased by it, since they start from pure noise."
        )
    tied = [s for s in found if s.by_bits and s.by_bits.best == 1]
    if len(tied) > 1:
        lines.append(
            f"{len(tied)} trials are tied for the best bits/dim: {', '.join(s.trial.name for s in tied)}."
        )
    drawn = [s for s in found if s.by_kid]
    if len(drawn) > 1 and metric == "bits_per_dim":
        first = min(drawn, key=lambda s: s.trial.drawn["value"])
        same = first.trial is found[0].trial
        tie = "" if same else (", though in a tie" if found[0].by_kid and found[0].by_kid.best == 1 else "")
        lines.append(
            f"The best by bits/dim, {found[0].trial.name}, is "
            + ("also the best by KID." if same else f"not the best by KID, which is {first.trial.name}{tie}.")
        )
    return lines


def best_config(found: Sequence[Row], base: Config) -> str | None:
    """The best trial's config for `jobs/train.py PRESET --config FILE`, without run and cluster; None: there is
    none."""
    if not found or found[0].by_bits is None:
        return None
    nested: dict[str, Any] = {}
    for key, value in flatten(override(base, found[0].trial.changes)).items():
        group, name = key.split(".")
        if group not in ("run", "cluster") and key != "data.shards" and key not in TRIAL_KEYS:
            nested.setdefault(group, {})[name] = value
    return json.dumps(nested, indent=2) + "\n"


def _shown(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Names and cells of the table for display: estimates with errors, settings in short form."""
    keys = list(dict.fromkeys(key for s in found for key in s.trial.changes))
    with_kid = next((s.trial.drawn["name"] for s in found if s.trial.drawn), None)
    titles = [key.rpartition(".")[2] for key in keys]
    names = ["trial", "status", "images", *titles, "train loss", "bits/dim", "rank"]
    names += [with_kid, "rank"] if with_kid else []
    rows = []
    for s in found:
        last, drawn = s.trial.last, s.trial.drawn
        status = s.trial.status + (f": {s.trial.reason[:80]}" if s.trial.reason else "")
        row = [s.trial.name + (" !" if s.is_flagged else ""), status, f"{s.trial.images_seen:,}"]
        row += ["" if (v := s.trial.changes.get(key)) is None else short(v) for key in keys]
        row += [f"{last.train_loss:.4f}", last.shown] if last else ["", ""]
        row.append(str(s.by_bits or ""))
        if with_kid:
            row += [f"{drawn['value']:.4f} ± {drawn['error']:.4f}" if drawn else "", str(s.by_kid or "")]
        rows.append(row)
    return names, rows


def bits_of(trial: Trial, place: Location, timeout_s: float = 0.0) -> tuple[float, ...]:
    """Bits/dim of each held-out image at the trial's last rung; storage may fail for `timeout_s`."""
    assert trial.last is not None
    file = place.child(trial.name).child(EVALUATIONS).child(f"{trial.images_seen:012d}.json")
    try:
        text = retry_io(file.read, where=file.uri, timeout_s=timeout_s)
        return Evaluation.from_json(text, file.uri).bits
    except OSError as error:
        raise UserError(f"cannot read {file.uri}: {error}") from None


def _leftover(base: Config, trial: Trial) -> float:
    """sqrt(D alpha_bar_T) of the trial's config."""
    config = override(base, trial.changes)
    return float((config.model.num_dims * schedules.build(config.schedule).alpha_bar[-1]).sqrt())
