"""Runs to compare, each read from its folder: settings, facts, curves, grids, evaluations."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ddpm.build import build_net
from ddpm.config.json import from_json
from ddpm.evaluation.plots import ChartPoint
from ddpm.evaluation.results import Report
from ddpm.runs import checkpoint, curves, run_folder, storage
from ddpm.runs.checkpoint import StateFile
from ddpm.runs.run_folder import Card, RunFolder, Status
from ddpm.runs.storage import Location
from ddpm.sampling import workers
from ddpm.tracking import names, run_params
from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable
from ddpm.utils.retry import as_user_error

RATE = "train/images_per_s"
ERRORS = {"held_out/bits_per_dim": "held_out_error/bits_per_dim"}
"""Metric -> the metric that holds its standard error."""
CURVES = ("train/loss", "held_out/loss", "held_out/bits_per_dim")
VERSION = re.compile(r"version|git\.c")
SAMPLED_IMAGES = 64
"""Images of a grid that is sampled for a run without one."""
STATUS = {
    "RUNNING": "running, or killed",
    "FINISHED": "finished",
    "STOPPED": "stopped",
    "PRUNED": "stopped early",
    "FAILED": "failed",
}
"""Words for a run's status."""

Read = Callable[[], bytes]
T = TypeVar("T")


class Remark(NamedTuple):
    """A sentence for the reader, and a command that helps."""

    text: str
    command: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.command}".rstrip()


@dataclass(frozen=True)
class ComparedRun:
    """The compared data of a run; what is unknown is empty."""

    name: str
    key: str
    """Its run key."""
    where: str
    """Its folder."""
    images_seen: int = 0
    """At its newest checkpoint."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Its flat config, without settings that have no effect."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """By title."""
    command: str = ""
    """It trains and resumes the run."""
    data: str = ""
    """Fingerprint of its data set."""
    curves: Mapping[str, Sequence[ChartPoint]] = field(default_factory=dict)
    """By metric, ascending."""
    grids: Mapping[int, Read] = field(default_factory=dict)
    """PNGs by images seen, ascending."""
    evaluations: Sequence[Report] = ()
    """They may include other runs."""
    remarks: list[Remark] = field(default_factory=list)
    """What is missing in the run's folder, and the command that makes it."""

    def hours(self, images_seen: float) -> float | None:
        """Hours of training up to a position, by the logged images/s; None: unknown. Breaks do not count."""
        return _hours(self.curves.get(RATE, ()), images_seen)


def read(uris: Sequence[str], evaluations: Sequence[str] = (), *, sample: bool = False) -> list[ComparedRun]:
    """The runs at `uris`, folders or URIs, and nets with a scheme of names.SCHEMES, each once.

    Args:
        evaluations: files of ddpm evaluate, beside those in the runs' folders.
        sample: sample a grid from the newest checkpoint of a run that has none.
    """
    compared: dict[str, ComparedRun] = {}
    reports = [_report_in(storage.resolve(uri), f"--evaluations {uri}") for uri in evaluations]
    for uri in dict.fromkeys(uris):
        is_net = uri.startswith(names.SCHEMES)
        if not is_net and not storage.resolve(uri).exists():
            raise UserError(f"{uri} does not exist; expected a run's folder or URI, or builtin:NAME")
        with as_user_error(f"{uri} cannot be read"):
            run = _read_net(uri, sample) if is_net else _read(run_folder.existing_run(uri), sample)
        compared.setdefault(run.key, replace(run, evaluations=[*run.evaluations, *reports]))
    return list(compared.values())


def _read(run: RunFolder, sample: bool) -> ComparedRun:
    location = run.location
    remarks: list[Remark] = []
    points: dict[str, list[ChartPoint]] = _readable(partial(_curves, location), {}, remarks)
    if not points:
        remarks.append(Remark(f"no curves: {location.uri} has no points in {curves.FOLDER}"))
    status = _readable(partial(run_folder.read_status, location), None, remarks)
    card = run_folder.read_card(location)
    evaluations = _evaluations(location.child(run_folder.EVALUATIONS), remarks)
    stored = run_folder.checkpoints(location)
    of_checkpoint: dict[str, Any] = {}
    if stored:
        of_checkpoint = _of_checkpoint(stored[-1], card, status, points.get(RATE, ()), remarks)
    else:
        text = "no checkpoint yet, so its settings are unknown"
        remarks.append(Remark(f"{text}; this trains it:" if card.command else text, card.command))
    grids: dict[int, Read] = {
        images_seen: file.read
        for images_seen, file in run_folder.pictures(location, run_folder.SAMPLES).items()
    }
    if stored and not grids and not sample:
        remarks.append(Remark("no samples yet; without --no-sample they are made now"))
    elif stored and not grids:
        png = _readable(partial(_sample, stored[-1]), b"", remarks)
        if png:
            grids[of_checkpoint["images_seen"]] = io.BytesIO(png).getvalue
    return ComparedRun(
        name=printable(run.name),
        key=run.key,
        where=location.uri,
        curves=points,
        grids=grids,
        evaluations=evaluations,
        remarks=remarks,
        **of_checkpoint,
    )


def _read_net(uri: str, sample: bool) -> ComparedRun:
    """A built-in or registered net, which has no run's folder: its settings, and a grid that is sampled now."""
    remarks = [Remark("no curves: it is a net without its run's folder")]
    grids: dict[int, Read] = {}
    with names.local_checkpoint(uri) as folder:
        stored = storage.resolve(str(folder))
        key = checkpoint.read_state(folder).get("run_key") or uri
        of_checkpoint = _of_checkpoint(stored, Card(run_key=key), None, (), remarks)
        png = _readable(partial(_sample, stored), b"", remarks) if sample else b""
    if png:
        grids[of_checkpoint["images_seen"]] = io.BytesIO(png).getvalue
    return ComparedRun(name=uri, key=key, where=uri, grids=grids, remarks=remarks, **of_checkpoint)


def _readable(read: Callable[[], T], otherwise: T, remarks: list[Remark]) -> T:
    """The result of `read`; if it raises UserError, `otherwise`, with a remark."""
    try:
        return read()
    except UserError as error:
        remarks.append(Remark(str(error)))
        return otherwise


def _of_checkpoint(
    stored: Location, card: Card, status: Status | None, rates: Sequence[ChartPoint], remarks: list[Remark]
) -> dict[str, Any]:
    """What a run's newest checkpoint, run.json and status.json tell, as fields of ComparedRun."""
    config_file = stored.child("config.json")
    config = from_json(config_file.read().decode(errors="replace"), config_file.uri)
    state_file = stored.child("state.json")
    state = strict_json.parse(StateFile, state_file.read(), f"{state_file.uri} is damaged", extra="allow")
    seen = state.images_seen
    total = config.train.total_images
    tags = status.tags if status else {}  # version 0.1
    command = card.command or tags.get("command", "")
    if seen < total and status and status.status != "FINISHED":
        words = f"{STATUS[status.status]} at {seen:,} of {total:,} images"
        if command and status.status == "RUNNING":
            words += "; if it was killed, this resumes it:"
        elif command:
            words += "; this resumes it:"
        remarks.append(Remark(words, command))
    with torch.device("meta"):  # only its weights are counted
        net = build_net(config)
    hours = _hours(rates, rates[-1].x) if rates else None
    source = config.data.source or (config.data.shards or "unknown").rstrip("/").rpartition("/")[2]
    all_versions = card.versions or tags
    versions = [f"{k.rpartition('.')[2]} {v}" for k, v in all_versions.items() if VERSION.match(k)]
    facts = {
        "status": STATUS[status.status] if status else "unknown",
        "images seen": f"{seen:,} of {total:,}" if seen < total else f"{seen:,}",
        "minutes": f"{status.minutes:.1f}" if status else "unknown",
        "images/s": f"{rates[-1].x / hours / 3600:,.0f}" if hours else "unknown",
        "weights": f"{sum(weight.numel() for weight in net.parameters()):,}",
        "seed": str(config.train.seed),
        "hardware": (status.hardware if status else "") or tags.get("hardware", "unknown"),
        "versions": ", ".join(versions) or "unknown",
        "data": f"{source} ({state.data_fingerprint[:8]})",
    }
    return {
        "images_seen": seen,
        "settings": {key: str(value) for key, value in run_params.params(config).items()},
        "facts": facts,
        "command": command,
        "data": state.data_fingerprint,
    }


def _hours(rates: Sequence[ChartPoint], images_seen: float) -> float | None:
    """Hours of training up to a position, by the images/s logged at `rates`."""
    rates = [point for point in rates if point.value > 0]
    if not rates or images_seen > rates[-1].x:
        return None
    at = np.array([0, *(point.x for point in rates)])
    spent = np.diff(at) / np.array([point.value for point in rates]) / 3600
    return float(np.interp(images_seen, at, [0, *spent.cumsum()]))


def _sample(stored: Location) -> bytes:
    """A PNG of a grid, sampled from a checkpoint as training samples it."""
    with names.as_folder(stored) as folder:
        job = workers.SampleJob(checkpoint.load_net(folder))
    return images.png_bytes(job.grid(workers.in_memory(job, SAMPLED_IMAGES)))


def _curves(run: Location) -> dict[str, list[ChartPoint]]:
    """The shown curves with their errors, without values that are not finite."""
    logged = curves.read(run)
    shown: dict[str, list[ChartPoint]] = {}
    for name in (*CURVES, RATE):
        errors = {point.images_seen: point.value for point in logged.get(ERRORS.get(name, ""), ())}
        finite = [point for point in logged.get(name, ()) if np.isfinite(point.value)]
        if finite:
            shown[name] = [ChartPoint(p.images_seen, p.value, errors.get(p.images_seen, 0.0)) for p in finite]
    return shown


def _evaluations(folder: Location, remarks: list[Remark]) -> list[Report]:
    reports = []
    for name in folder.files():
        if name.endswith(".json"):
            file = folder.child(name)
            report = _readable(partial(_report_in, file, file.uri), None, remarks)
            if report is not None:
                reports.append(report)
    return reports


def _report_in(file: Location, where: str) -> Report:
    """The results of ddpm evaluate in a file."""
    with as_user_error(f"{where} cannot be read"):
        return Report.from_json(file.read(), where)
