"""How a search ended: finalists drawn from, a table with ranks and ties, the best config, and where all that is kept.

Both rankings are shown, for likelihood and sample quality may disagree; the best config is the best by the metric that
was searched by. Its own room because it stands on everything that judges, and knows nothing of who searched.
"""

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from ddpm import config as configs
from ddpm import delivery, evaluate, generation, judgement, runs, search_plots, yardstick
from ddpm.attempt import JUDGED
from ddpm.calls import OutOfTime
from ddpm.config import Config, UserError
from ddpm.contest import short
from ddpm.data.reading import DataSet
from ddpm.diffusion import schedules
from ddpm.evaluation import nets
from ddpm.evaluation.ranking import Rank, paired_ranks, ranks
from ddpm.evaluation.reference import images_of
from ddpm.jury import Judged
from ddpm.records import Artifact, Metrics
from ddpm.storage import Location
from ddpm.tracking import Address, Lost, MlflowRun, tracking_uri, without_password
from ddpm.trials import Ledger, Metric, Trial, best

SAMPLER, STEPS = "dpmpp_2m", 20
"""How finalists are drawn: fast, and the same for all."""
LEFTOVER = 0.01
"""A schedule whose last x_t keeps more of x_0 than that, sqrt(alpha_bar_T), is flagged."""
LOG_SNR = np.linspace(-8, 8, 33)
CURVE_IMAGES = 128
MLFLOW_TIMEOUT_S = 20.0
OF_A_TRIAL = ("train.checkpoint_every_images", "train.keep_checkpoints")
"""What a search sets for its own purposes."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": "KILLED"}
"""Of a trial, in MLflow's words."""


@dataclass(frozen=True)
class Standing:
    """A trial's line in the table."""

    trial: Trial
    leftover: float
    """sqrt(alpha_bar_T)."""
    by_bits: Rank | None
    """Among those that came equally far; None: it did not."""
    by_kid: Rank | None
    """Among the finalists."""

    @property
    def is_flagged(self) -> bool:
        return self.leftover > LEFTOVER


def address(ledger: Ledger, name: str, experiment: str) -> Address:
    """The search's own run in MLflow."""
    return Address(tracking_uri(), experiment, name, ledger.key, source="tune/search.py")


def open_parent(parent: Address, params: Mapping[str, Any], warn: Callable[[str], None]) -> str | None:
    """The id of the search's MLflow run, which is made if there is none; None: MLflow is away, and is told later."""
    run = MlflowRun(parent, params, MLFLOW_TIMEOUT_S)
    try:
        run.open(running=True)
    except (OutOfTime, Lost) as error:
        warn(
            f"MLflow at {without_password(parent.uri)} is told of the search later: {error or run.call.trouble}"
        )
    return run.run_id


def draw_finalists(
    ledger: Ledger,
    place: Location,
    metric: Metric,
    *,
    num_finalists: int,
    num_images: int,
    features: nets.Name | None,
    seed: int,
) -> None:
    """Note in the ledger what the images of the best few are worth; of those of which it is not known yet."""
    todo = [
        trial
        for trial in best(ledger.trials(), metric)[:num_finalists]
        if not trial.drawn or trial.drawn["n"] != num_images
    ]
    if not todo:
        return
    settings = yardstick.Settings(
        num_images=num_images, features=features, samplers=(SAMPLER,), num_sample_steps=(STEPS,), seed=seed
    )
    candidates = yardstick.read([place.child(trial.name).uri for trial in todo])
    report = evaluate.evaluate(candidates, settings)
    for trial, verdict in zip(todo, report.verdicts, strict=True):
        (score,) = (score for score in verdict.drawn[0].scores if score.name.startswith("KID"))
        ledger.add("drawn", trial.number, **vars(score))


def standings(trials: Sequence[Trial], place: Location, metric: Metric, base: Config) -> list[Standing]:
    """All trials: the finished ones by the metric, then the others by how far they came."""
    order = best(trials, metric)
    there = [trial.number for trial in order]
    by_bits = dict(
        zip(there, paired_ranks([bits_of(trial, place) for trial in order]) if order else [], strict=True)
    )
    drawn = [trial for trial in order if trial.drawn]
    of_kid = ranks([trial.drawn["value"] for trial in drawn], [trial.drawn["error"] for trial in drawn])
    by_kid = dict(zip([trial.number for trial in drawn], of_kid, strict=True))
    rest = sorted(
        (trial for trial in trials if trial.number not in by_bits),
        key=lambda t: (-t.last.images_seen, t.last.value(metric)) if t.last else (0, float(t.number)),
    )
    return [
        Standing(
            trial,
            _leftover(configs.override(base, trial.changes)),
            by_bits.get(trial.number),
            by_kid.get(trial.number),
        )
        for trial in (*order, *rest)
    ]


def columns(found: Sequence[Standing]) -> dict[str, list[Any]]:
    """The table, column by column; None where there is nothing to say."""
    keys = list(dict.fromkeys(key for s in found for key in s.trial.changes))
    lasts, drawn = [s.trial.last for s in found], [s.trial.drawn for s in found]
    return {
        "trial": [s.trial.name for s in found],
        "status": [s.trial.status for s in found],
        "images_seen": [last.images_seen if last else 0 for last in lasts],
        **{key: [s.trial.changes.get(key) for s in found] for key in keys},
        "sqrt_alpha_bar_T": [s.leftover for s in found],
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


def parquet(found: Sequence[Standing]) -> bytes:
    file = io.BytesIO()
    made = {
        name: [str(v) if isinstance(v, tuple | list) else v for v in values]
        for name, values in columns(found).items()
    }
    pq.write_table(pa.table(made), file)
    return file.getvalue()


def table(found: Sequence[Standing]) -> Table:
    """For a terminal."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names, rows = _shown(found)
    for name in names:
        made.add_column(name, justify="left" if name in ("trial", "status") else "right")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(found: Sequence[Standing], metric: Metric, remarks: Sequence[str]) -> str:
    names, rows = _shown(found)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks)]) + "\n"


def remarks(found: Sequence[Standing], metric: Metric) -> list[str]:
    """What one must know to read the table."""
    lines = [
        "Ranks are ranges: two that overlap are a tie. bits/dim are compared image by image, KID by its intervals."
    ]
    if any(s.is_flagged for s in found):
        lines.append(
            f"!: sqrt(alpha_bar_T) is above {LEFTOVER}, so x_T is not pure noise: the bound counts it, and samples, "
            "which begin with pure noise, are biased by it."
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


def best_config(found: Sequence[Standing], base: Config) -> str | None:
    """What `jobs/train.py PRESET --config FILE` takes: the best trial's config, without its place and its cluster."""
    if not found or found[0].by_bits is None:
        return None
    nested: dict[str, Any] = {}
    for key, value in configs.flatten(configs.override(base, found[0].trial.changes)).items():
        room, name = key.split(".")
        if room not in ("run", "cluster") and key != "data.shards" and key not in OF_A_TRIAL:
            nested.setdefault(room, {})[name] = value
    return json.dumps(nested, indent=2) + "\n"


def curves(found: Sequence[Standing], place: Location, held_out: DataSet) -> dict[str, NDArray[np.float64]]:
    """The finalists' errors of x_0_hat, [N, L] at LOG_SNR, by what a legend says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = images_of(held_out, 0, min(CURVE_IMAGES, held_out.rows.num_rows))
    made = {}
    for standing in (s for s in found if s.by_kid):
        (candidate,) = yardstick.read([place.child(standing.trial.name).uri])
        net, config = candidate.net.to(device), candidate.config
        error = judgement.denoising_curve(
            net, config, generation.build_objective(config), batch, torch.from_numpy(LOG_SNR), device=device
        )
        kind, steps = config.schedule.kind, config.schedule.num_timesteps
        made[f"{standing.trial.name} {kind}, T = {steps}"] = error.numpy()
    return made


def store(
    ledger: Ledger, place: Location, metric: Metric, base: Config, held_out: DataSet, parent: Address
) -> Iterator[str]:
    """Write table, best config and pictures to the search's folder and to its MLflow run; lines that say where."""
    trials = ledger.trials()
    found = standings(trials, place, metric, base)
    files = {
        "results.parquet": parquet(found),
        "results.md": markdown(found, metric, remarks(found, metric)).encode(),
    }
    config = best_config(found, base)
    if config is not None:
        files["best.json"] = config.encode()
        files["parallel.png"] = search_plots.parallel(trials, metric)
    if any(s.by_kid for s in found):
        files["bits-and-kid.png"] = search_plots.scatter(trials)
        files["denoising.png"] = search_plots.denoising(LOG_SNR, curves(found, place, held_out))
    for name, data in files.items():
        _patiently_written(place.child(name), data)
    yield f"results     {place.uri}/results.md, .parquet; pictures beside them"
    if config is not None:
        yield f"best        {place.uri}/best.json, of {found[0].trial.name}"
    yield from _publish(trials, found, place, files, parent)


def _publish(
    trials: Sequence[Trial],
    found: Sequence[Standing],
    place: Location,
    files: Mapping[str, bytes],
    parent: Address,
) -> Iterator[str]:
    shown = without_password(parent.uri)
    run = MlflowRun(parent, {}, MLFLOW_TIMEOUT_S)
    try:
        run.open(running=True)
        records: list[Any] = [Artifact(name, data) for name, data in files.items()]
        if found and found[0].by_bits and (last := found[0].trial.last):
            values = {
                "best/bits_per_dim": last.bits_per_dim,
                "best/bits_per_dim_error": last.bits_per_dim_error,
            }
            records.append(Metrics(values, len(trials), int(time.time() * 1000)))
        whole = run.add(records)
        for trial in trials:
            whole &= _settle(trial, place, parent, str(run.run_id))
        whole &= run.end("FINISHED")
    except OutOfTime:
        yield f"MLflow      {shown} cannot be reached; the same command tries again: {run.call.trouble}"
    except Lost as error:
        yield f"MLflow      {shown} refuses: {error}"
    else:
        yield f"MLflow      run {run.run_id} in {shown}" + (
            "" if whole else ", which did not take everything"
        )


def _settle(trial: Trial, place: Location, parent: Address, parent_run_id: str) -> bool:
    """Tell MLflow what a trial's own driver could not, if it was killed."""
    uri = place.child(trial.name).uri
    try:
        key = runs.existing_run(uri).key
    except UserError:  # it never began
        return True
    try:
        kept = delivery.kept(uri, parent.experiment)
        if kept.records:
            delivery.deliver(kept, MLFLOW_TIMEOUT_S, lambda done: None)
    except UserError:  # MLflow does not take it now
        return False
    run = MlflowRun(
        Address(parent.uri, parent.experiment, trial.name, key, parent_run_id), {}, MLFLOW_TIMEOUT_S
    )
    return not run.find() or run.settle(STATUS[trial.status])


def _shown(found: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Names and cells of the table for people: estimates with their errors, settings in short."""
    keys = list(dict.fromkeys(key for s in found for key in s.trial.changes))
    with_kid = next((s.trial.drawn["name"] for s in found if s.trial.drawn), None)
    titles = [key.rpartition(".")[2] for key in keys]
    names = ["trial", "status", "images", *titles, "train loss", "bits/dim", "rank"]
    names += [with_kid, "rank"] if with_kid else []
    rows = []
    for s in found:
        last, drawn = s.trial.last, s.trial.drawn
        status = s.trial.status + (f": {s.trial.reason[:80]}" if s.trial.reason else "")
        row = [
            s.trial.name + (" !" if s.is_flagged else ""),
            status,
            f"{last.images_seen:,}" if last else "0",
        ]
        row += ["" if (v := s.trial.changes.get(key)) is None else short(v) for key in keys]
        row += (
            [f"{last.train_loss:.4f}", _estimate(last.bits_per_dim, last.bits_per_dim_error)]
            if last
            else ["", ""]
        )
        row.append(str(s.by_bits or ""))
        if with_kid:
            row += [_estimate(drawn["value"], drawn["error"]) if drawn else "", str(s.by_kid or "")]
        rows.append(row)
    return names, rows


def _estimate(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def bits_of(trial: Trial, place: Location) -> tuple[float, ...]:
    """Of each held-out image at the trial's last rung."""
    assert trial.last is not None
    file = place.child(trial.name).child(JUDGED).child(f"{trial.last.images_seen:012d}.json")
    try:
        return Judged.from_json(file.read(), file.uri).bits
    except OSError as error:
        raise UserError(f"cannot read {file.uri}: {error}") from None


def _leftover(config: Config) -> float:
    return float(schedules.build(config.schedule).alpha_bar[-1].sqrt())


def _patiently_written(file: Location, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {file.uri}: {error}") from None
