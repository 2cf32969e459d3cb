"""Runs to compare, each read from its folder: settings, facts, curves, grids, evaluations."""

import io
import json
import logging
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ddpm.build import build_net
from ddpm.config.json import from_json, keys_that_affect
from ddpm.config.tree import Affects, Config
from ddpm.data import latents
from ddpm.evaluation.plots import ChartPoint
from ddpm.runs import checkpoint, curves, names, run_folder, storage
from ddpm.runs.checkpoint import StateFile
from ddpm.runs.curves import Point
from ddpm.runs.evaluations import Report, read_reports
from ddpm.runs.run_folder import Card, RunFolder, RunStatus, Status
from ddpm.runs.storage import Location
from ddpm.sampling import workers
from ddpm.tracking import run_params
from ddpm.utils import images, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.progress import printable
from ddpm.utils.retry import as_user_error

log = logging.getLogger(__name__)

RATE = "train/images_per_s"
ERRORS = {"held_out/bits_per_dim": "held_out_error/bits_per_dim"}
"""Metric -> the metric that holds its standard error."""
CURVES = ("train/loss", "held_out/loss", "held_out/bits_per_dim")
SEEDS = {"train.seed", "sample.seed"}
VERSION = re.compile(r"version|git\.c")
SAMPLED_IMAGES = 64
"""Images of a grid that is sampled for a run without one."""

Read = Callable[[], bytes]


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
    configuration: str = ""
    """Everything that determines its weights and its samples, but the seeds."""
    seed: int = 0
    """Its seed of training."""
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


def _read(folder: RunFolder, sample: bool) -> ComparedRun:
    location = folder.location
    logged = curves.read(location)
    grids = run_folder.pictures(location, run_folder.SAMPLES)
    card = run_folder.read_card(location)
    run = ComparedRun(
        name=printable(folder.name),
        key=folder.key,
        where=location.uri,
        facts={"status": "no checkpoint yet"},
        command=card.command,
        curves=_shown(logged),
        grids={images_seen: file.read for images_seen, file in grids.items()},
        evaluations=list(read_reports(location.child(run_folder.EVALUATIONS), log.warning).values()),
    )
    stored = run_folder.checkpoints(location)
    if not stored:
        return run
    status = run_folder.read_status(location)
    rates = [point.value for point in logged.get(RATE, ())]
    return _with_checkpoint(run, stored[-1], card, status, rates, sample)


def _read_net(uri: str, sample: bool) -> ComparedRun:
    """A built-in or registered net, which has no run's folder."""
    with names.local_checkpoint(uri) as folder:
        key = checkpoint.read_state(folder).get("run_key") or uri
        run = ComparedRun(name=uri, key=key, where=uri)
        card = Card(name=uri, run_key=key, created_ms=0)
        return _with_checkpoint(run, storage.resolve(str(folder)), card, None, [], sample)


def _with_checkpoint(
    run: ComparedRun,
    stored: Location,
    card: Card,
    status: Status | None,
    rates: Sequence[float],
    sample: bool,
) -> ComparedRun:
    """The run with what its newest checkpoint, run.json and status.json tell, and a grid, if it has none.

    Args:
        rates: its logged images/s.
    """
    config_file = stored.child("config.json")
    config = from_json(config_file.read().decode(errors="replace"), config_file.uri)
    state_file = stored.child("state.json")
    state = strict_json.parse(StateFile, state_file.read(), f"{state_file.uri} is damaged", extra="allow")
    seen = state.images_seen
    total = config.train.total_images
    with torch.device("meta"):  # only its weights are counted
        net = build_net(config)
    source = config.data.source or (config.data.shards or "unknown").rstrip("/").rpartition("/")[2]
    versions = [f"{k.rpartition('.')[2]} {v}" for k, v in card.versions.items() if VERSION.match(k)]
    status_text = status.status.text if status else "unknown"
    if status and status.status == RunStatus.RUNNING:
        status_text += ", or killed"  # a killed driver writes no status
    facts = {
        "status": status_text,
        "images seen": f"{seen:,} of {total:,}" if seen < total else f"{seen:,}",
        "minutes": f"{status.minutes:.1f}" if status else "unknown",
        "images/s": f"{statistics.median(rates):,.0f}" if rates else "unknown",
        "weights": f"{sum(weight.numel() for weight in net.parameters()):,}",
        "seed": str(config.train.seed),
        "hardware": (status.hardware if status else "") or "unknown",
        "versions": ", ".join(versions) or "unknown",
        "data": f"{source} ({state.data_fingerprint[:8]})",
    }
    grids = run.grids
    if sample and not grids:
        grids = {seen: io.BytesIO(_sample(stored)).getvalue}
    return replace(
        run,
        images_seen=seen,
        settings={key: str(value) for key, value in run_params.params(config).items()},
        configuration=_configuration(config, state.data_fingerprint),
        seed=config.train.seed,
        facts=facts,
        data=state.data_fingerprint,
        grids=grids,
    )


def _configuration(config: Config, data: str) -> str:
    """Equal for runs that differ in their seeds, and in how they were carried out, alone.

    Args:
        data: fingerprint of the data set.
    """
    keys = keys_that_affect(config, Affects.WEIGHTS | Affects.SAMPLING | Affects.TASK) - SEEDS
    keys.add("train.total_images")  # the learning rate may depend on it
    determining = {key: value for key, value in run_params.params(config).items() if key in keys}
    return json.dumps([data, determining], sort_keys=True)


def _sample(stored: Location) -> bytes:
    """A PNG of a grid, sampled from a checkpoint as training samples it."""
    with names.as_folder(stored) as folder:
        job = workers.SampleJob(latents.load_net(folder))
    return images.png_bytes(job.grid(workers.in_memory(job, SAMPLED_IMAGES)))


def _shown(logged: Mapping[str, Sequence[Point]]) -> dict[str, list[ChartPoint]]:
    """The shown curves with their errors, without values that are not finite."""
    shown: dict[str, list[ChartPoint]] = {}
    for name in CURVES:
        errors = {point.images_seen: point.value for point in logged.get(ERRORS.get(name, ""), ())}
        finite = [point for point in logged.get(name, ()) if np.isfinite(point.value)]
        if finite:
            shown[name] = [ChartPoint(p.images_seen, p.value, errors.get(p.images_seen, 0.0)) for p in finite]
    return shown


def _report_in(file: Location, where: str) -> Report:
    """The results of ddpm evaluate in a file."""
    with as_user_error(f"{where} cannot be read"):
        return Report.from_json(file.read(), where)
