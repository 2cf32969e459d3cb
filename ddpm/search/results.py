"""The results of a search for display and as files: a table, remarks for reading it, and the best config."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm.config.json import flatten, keys_that_affect, override
from ddpm.config.tree import Affects, Config
from ddpm.search.leaderboard import LEFTOVER, Row
from ddpm.search.trials import short, shown
from ddpm.utils.tables import Table, estimate

TIMESTEPS = "schedule.num_timesteps"
FEWER_TIMESTEPS = "by 0.09 bits/dim at 300, 0.18 at 200 and 0.36 at 100 of 500"
"""How much fewer timesteps raise the bound of a net of the digits, with measured variances; benchmarks/honesty.md."""
MAX_REASON = 80
"""Characters of a failure's reason in the table."""


def table(rows: Sequence[Row]) -> Table:
    """The table for display: estimates with errors, settings in short form."""
    varied = _varied(rows)
    kid = next((row.trial.score.name for row in rows if row.trial.score and row.by_kid), None)
    has_means = any(row.mean for row in rows)
    names = ["trial", "status", "images"]
    names += [key.rpartition(".")[2] for key in varied]
    names += ["train loss", "bits/dim", "rank"]
    if has_means:
        names += ["mean of trainings", "rank"]
    if kid:
        names += [kid, "rank"]
    lines = []
    for row in rows:
        trial = row.trial
        line = [trial.name + (" !" if row.is_flagged else ""), _status(row), f"{trial.images_seen:,}"]
        line += [short(trial.changes[key]) if key in trial.changes else "" for key in varied]
        if trial.last:
            line += [f"{trial.last.train_loss:.4f}", shown(trial.last.bits_per_dim)]
        else:
            line += ["", ""]
        line.append(str(row.by_bits or ""))
        if has_means:
            line += [estimate(*row.mean) if row.mean else "", str(row.by_trainings or "")]
        if kid and trial.score and row.by_kid:
            line += [estimate(trial.score.value, trial.score.error), str(row.by_kid)]
        elif kid:
            line += ["", ""]
        lines.append(line)
    return Table(names, lines, num_words=2)


def _status(row: Row) -> str:
    status = row.trial.outcome
    if row.trial.repeats is not None:
        status += f", {row.trial.repeats} again"
    if row.trial.reason:
        status += f": {row.trial.reason[:MAX_REASON]}"
    return status


def markdown(rows: Sequence[Row], remarks: Sequence[str]) -> str:
    lines = [table(rows).markdown(), ""]
    lines += [f"- {line}" for line in remarks]
    return "\n".join(lines) + "\n"


def parquet(rows: Sequence[Row]) -> bytes:
    """The table as a Parquet file; null for missing values."""
    records = list[dict[str, Any]]()
    for row in rows:
        trial = row.trial
        last = trial.last
        mean = row.mean
        score = row.trial.score if row.by_kid else None
        reported = row.reported if row is rows[0] else None
        records.append(
            {
                "trial": trial.name,
                "status": trial.outcome,
                "repeats": trial.repeats,
                "images_seen": trial.images_seen,
                **{key: trial.changes.get(key) for key in _varied(rows)},
                "sqrt_D_alpha_bar_T": row.leftover,
                "train_loss": last.train_loss if last else None,
                "held_out_loss": last.held_out_loss if last else None,
                "bits_per_dim": last.bits_per_dim.value if last else None,
                "bits_per_dim_error": last.bits_per_dim.error if last else None,
                "rank_by_bits": str(row.by_bits) if row.by_bits else None,
                "mean_bits_per_dim": mean.value if mean else None,
                "mean_bits_per_dim_error": mean.error if mean else None,
                "rank_by_trainings": str(row.by_trainings) if row.by_trainings else None,
                "reported_bits_per_dim": reported.value if reported else None,
                "reported_bits_per_dim_error": reported.error if reported else None,
                "kid": score.value if score else None,
                "kid_error": score.error if score else None,
                "rank_by_kid": str(row.by_kid) if row.by_kid else None,
                "reason": trial.reason or None,
            }
        )
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file)
    return file.getvalue()


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """Remarks for reading the table: how the best trial was chosen, what its number and the ranks mean."""
    if rows and rows[0].by_bits:
        yield _how_chosen(rows)
    reported = rows[0].reported if rows else None
    if reported is not None:
        line = (
            f"The best trial, {rows[0].trial.name}, has {estimate(*reported)} bits/dim on the reporting split, the "
            "half of the held-out images that ranked no trial. The numbers in the table are of the other half, which "
            "chose the best trial: they have a selection bias."
        )
        if rows[0].by_trainings:
            line += (
                " Its net was trained again after the search, and this is the mean of these trainings alone."
            )
        yield line
    yield (
        "Ranks are ranges: two that overlap are a tie. Ranks of trials are ranks of nets: bits/dim are compared image "
        "by image, KID by its errors, both corrected for the number of pairs (Holm), and at most 5 % of searches find "
        "a difference between equally good nets."
    )
    spreads = [row.spread for row in rows if row.by_trainings]
    if spreads:
        yield (
            "Ranks beside a mean of trainings are ranks of configurations, by Welch's test, with the same correction: "
            "at most 5 % of searches find a difference between equally good configurations. The standard deviation "
            f"between trainings of one is {np.mean(np.square(spreads)) ** 0.5:.4f} bits/dim."
        )
    else:
        yield "Another training of a configuration is another net: --finalist-seeds 3 ranks configurations."
    if TIMESTEPS in _varied(rows):
        yield (
            "Trials differ in T. Fewer timesteps raise the bound of the same net, of the digits "
            f"{FEWER_TIMESTEPS}, with a fixed --variance by more: T alone can explain that (benchmarks/honesty.md)."
        )
    if any(row.is_flagged for row in rows):
        yield (
            f"!: sqrt(D alpha_bar_T), with D numbers per image, is above {LEFTOVER}: x_T still shows an image's mean. "
            "The bound includes this, but samples are biased by it, since they start from pure noise."
        )
    yield from _best_line("bits/dim", [row for row in rows if row.by_bits and row.by_bits.best == 1])
    yield from _best_line(
        "mean bits/dim", [row for row in rows if row.by_trainings and row.by_trainings.best == 1]
    )
    yield from _best_line("KID", [row for row in rows if row.by_kid and row.by_kid.best == 1])


def _how_chosen(rows: Sequence[Row]) -> str:
    """How the best trial was chosen, which best.json is of."""
    best = rows[0]
    if best.by_trainings:
        finalists = sum(row.by_trainings is not None for row in rows)
        how = f"the lowest mean bits/dim of several trainings, among {finalists} finalists that were trained again"
    else:
        compared = sum(row.by_bits is not None for row in rows)
        how = f"the lowest bits/dim among {compared} trials with {best.trial.images_seen:,} images seen"
    chose_nothing = "; KID is a second opinion, and chose nothing" if any(row.by_kid for row in rows) else ""
    return f"How the best trial was chosen: {best.trial.name} has {how}{chose_nothing}."


def _best_line(what: str, first: Sequence[Row]) -> Iterator[str]:
    if first:
        names = ", ".join(row.trial.name for row in first)
        tied = ", which are tied" if len(first) > 1 else ""
        yield f"The best by {what}: {names}{tied}."


def best_config(rows: Sequence[Row], config: Config) -> str | None:
    """The best trial's changes to `config`, for `ddpm train PRESET --config FILE`; None: there is none.

    What depends on the machine is left out: data.shards, data.images, run and cluster.
    """
    if not rows or rows[0].by_bits is None:
        return None
    locations = keys_that_affect(config, Affects.LOCATION) | {"data.images"}
    nested = dict[str, Any]()
    for key, value in flatten(override(config, rows[0].trial.changes)).items():
        group, name = key.split(".")
        if group not in ("run", "cluster") and key not in locations:
            nested.setdefault(group, {})[name] = value
    return json.dumps(nested, indent=2) + "\n"


def _varied(rows: Sequence[Row]) -> list[str]:
    """The keys that any trial changes."""
    return list(dict.fromkeys(key for row in rows for key in row.trial.changes))
