"""From checkpoints to a report: whose images are judged by which, in pieces that any number of workers may share.

Its own room because judgement.py judges a batch, and here are the questions around it: which data, which feature
net, which way of drawing; and where the answer goes. All checkpoints are read at the beginning: a run that goes on
deletes its old ones meanwhile.

A piece is a range of images whose place does not depend on the workers, and pieces are put together in order.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm import generation, judgement, runs, storage
from ddpm import report as reports
from ddpm.calls import OutOfTime
from ddpm.config import Config, SampleConfig, UserError
from ddpm.data import embedded, stream
from ddpm.data.manifest import MANIFEST
from ddpm.data.reading import DataSet, Images
from ddpm.diffusion import schedules, timesteps
from ddpm.evaluation import nets
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.features import FeatureNet, Features
from ddpm.evaluation.reference import WINDOW_ROWS, real_features
from ddpm.evaluation.scores import LEAST_IMAGES, Score, score
from ddpm.models.unet import UNet
from ddpm.progress import Display
from ddpm.records import Artifact, Metrics, Record
from ddpm.report import Drawn, Report, Verdict
from ddpm.storage import Location
from ddpm.tracking import Address, Lost, MlflowRun, tracking_uri, without_password
from ddpm.training import checkpoint

T = TypeVar("T")

PIECE_IMAGES = 125
"""Images of a piece, drawn or read as one batch."""
MLFLOW_TIMEOUT_S = 20.0
"""Seconds without a call that works after which MLflow is left alone."""
CACHE = "evaluation"
"""Folder beside the shards: what is kept of the data set, for whoever judges by it."""


@dataclass(frozen=True)
class Settings:
    """How checkpoints are judged."""

    num_images: int = 2000
    features: nets.Name | None = None
    """None: classifier where the data set has classes, else lite0."""
    inception_weights: str | None = None
    samplers: tuple[str, ...] = ()
    """None: the run's own."""
    num_sample_steps: tuple[int, ...] = ()
    """None: the run's own, or its sampler's."""
    sample: Mapping[str, Any] = field(default_factory=dict)
    """What else is changed in the run's SampleConfig."""
    num_draws: int = 8
    """Timesteps of an image at which KL_t is measured; 0: all."""
    seed: int = 0
    shards: str | None = None
    """Folder or URI of the data set; None: the one that was trained on."""
    cache: str | None = None
    """Folder or URI for what is kept of the data set; None: beside its shards."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be judged, read into memory."""

    uri: str
    net: UNet
    config: Config
    position: Mapping[str, Any]
    """Its state.json."""
    weights_sha256: str


@dataclass(frozen=True)
class Yardstick:
    """What all candidates are judged by."""

    uri: str
    """Of the data set."""
    train: DataSet
    held_out: DataSet
    feature_net: FeatureNet
    real: Features
    """Of held-out images."""
    other_real: Features
    """Of training images, for the floor."""


def read(uris: Sequence[str], every: bool = False) -> list[Candidate]:
    """The checkpoints at `uris`; of a run its newest, or with `every` all it has.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = [uri for given in uris for uri in runs.checkpoints_of(given)[0 if every else -1 :]]
    return [_read(uri) for uri in dict.fromkeys(found)]


def evaluate(candidates: Sequence[Candidate], settings: Settings) -> Report:
    """Judge all candidates by the same held-out images.

    Raises:
        UserError: the settings do not fit the candidates, or there are no images to judge them by.
    """
    if settings.num_images < LEAST_IMAGES:
        raise UserError(f"num_images is {settings.num_images}; it must be at least {LEAST_IMAGES}")
    if settings.num_draws < 0:
        raise UserError(f"num_draws is {settings.num_draws}; it must be at least 1, or 0 for all timesteps")
    ways = [_ways(candidate.config, settings) for candidate in candidates]
    yardstick = _yardstick(candidates, settings)
    verdicts = []
    for i, (candidate, samples) in enumerate(zip(candidates, ways, strict=True)):
        which = f"checkpoint {i + 1}/{len(candidates)}: " if len(candidates) > 1 else ""
        verdicts.append(_judge(candidate, samples, yardstick, settings, which))
    held_out = yardstick.held_out.rows
    about = {
        "num_images": settings.num_images,
        "seed": settings.seed,
        "features": {key: getattr(yardstick.feature_net, key) for key in ("name", "size", "digest")},
        "bits_per_dim": {"timesteps": settings.num_draws or "all"},
        "data": {
            "shards": yardstick.uri,
            "split": yardstick.held_out.split,
            "num_rows": held_out.num_rows,
            "fingerprint": held_out.fingerprint,
        },
    }
    return Report(about, tuple(verdicts))


def place_for(out: str) -> Location:
    """The file `out`, a path or a URI, once it is sure that one can be written there.

    Raises:
        UserError: it cannot.
    """
    place = storage.resolve(out)
    if place.is_local:
        path = Path(place.path)
        if path.is_dir():
            raise UserError(f"--out {out} is a folder; name a file, as {out.rstrip('/')}/evaluation.json")
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"--out {out} cannot be written: {nearest} is no folder that may be written to")
    return place


def store(report: Report, place: Location) -> Iterator[str]:
    """Write the report to `place` and its picture beside it, tell MLflow, and say in lines where everything is.

    Raises:
        UserError: a file cannot be written.
    """
    picture = reports.picture(report)
    beside = Path(place.path).with_suffix(".png").name
    files = {
        "results": (place, report.to_json().encode()),
        "picture": (
            replace(place, uri=_sibling(place.uri, beside), path=_sibling(place.path, beside)),
            picture,
        ),
    }
    for what, (file, data) in files.items():
        try:
            file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {file.uri}: {error}") from None
        yield f"{what:<11} {file.uri}"
    yield from publish(report, picture)


def publish(report: Report, picture: bytes, timeout_s: float = MLFLOW_TIMEOUT_S) -> Iterator[str]:
    """Put results into the MLflow runs of the checkpoints, and say in lines where they went.

    Points are at the step images_seen; one that MLflow has already, at the same step with the same value, is not sent
    again, and one of another value (of more images, say) is sent as a newer point beside it. The report and its
    picture become artifacts whose name depends on the checkpoints and the settings, so that the same evaluation
    replaces its own files and no other's.
    """
    uri = tracking_uri()
    shown = without_password(uri)
    for verdict in {verdict.run_key: verdict for verdict in report.verdicts}.values():
        if not verdict.run_key:
            yield f"MLflow      nothing is logged of {verdict.checkpoint}, which no run of ours made"
            continue
        run = MlflowRun(Address(uri, verdict.experiment, verdict.name, verdict.run_key), {}, timeout_s)
        try:
            if not run.find():
                yield f"MLflow      {shown} does not know run {verdict.name}; nothing is logged there"
            elif run.add(list(_records(report.of_run(verdict.run_key), picture))):
                yield f"MLflow      run {run.run_id} in {shown}"
            else:
                yield f"MLflow      {shown} did not take everything: {run.call.trouble}"
        except OutOfTime:
            yield f"MLflow      {shown} cannot be reached, nothing is logged: {run.call.trouble}"
            return
        except Lost as error:
            yield f"MLflow      {shown} refuses run {verdict.name}: {error}"


def _records(report: Report, picture: bytes) -> Iterator[Record]:
    now_ms = int(time.time() * 1000)
    for verdict in report.verdicts:
        yield Metrics(reports.metrics(verdict), verdict.images_seen, now_ms)
    yield Artifact(f"evaluation/{report.key}.json", report.to_json().encode())
    yield Artifact(f"evaluation/{report.key}.png", picture)


def _sibling(path: str, name: str) -> str:
    return f"{path.rpartition('/')[0]}/{name}"


def _read(uri: str) -> Candidate:
    with runs.local_checkpoint(uri) as folder:
        net, config = checkpoint.load_net(folder, torch.device("cpu"))
        digest = json.loads((folder / checkpoint.CHECKSUMS).read_text())["ema.safetensors"]
        return Candidate(uri, net, config, checkpoint.read_state(folder), digest)


def _ways(config: Config, settings: Settings) -> list[SampleConfig]:
    """The ways in which images are drawn from a net of `config`, each with its sampler and its number of steps.

    Raises:
        UserError: one of them does not fit the net.
    """
    found = []
    for sampler in settings.samplers or (config.sample.sampler,):
        for steps in settings.num_sample_steps or (config.sample.num_sample_steps,):
            changes = {
                **settings.sample,
                "sampler": sampler,
                "num_sample_steps": steps,
                "seed": settings.seed,
            }
            sample = replace(config.sample, **changes)
            generation.build_sampler(config, sample)
            found.append(_resolved(config, sample))
    return list(dict.fromkeys(found))


def _resolved(config: Config, sample: SampleConfig) -> SampleConfig:
    """`sample`, of which nothing is left open."""
    sample = sample.resolved(config.objective.process)
    if sample.num_sample_steps is not None:
        return sample
    is_mix = sample.sampler == "mix"
    steps = timesteps.FEW if is_mix else len(timesteps.build(sample, schedules.build(config.schedule)))
    return replace(sample, num_sample_steps=steps)


def _yardstick(candidates: Sequence[Candidate], settings: Settings) -> Yardstick:
    train, uri = _data_set(candidates, settings.shards)
    held_out = train.held_out()
    if held_out is None:
        raise UserError(
            f"{uri} has no images that were not trained on (a split test beside {train.split}); "
            "name a data set that has, with --data.shards"
        )
    if held_out.rows.num_rows < LEAST_IMAGES:
        raise UserError(
            f"{uri} holds out {held_out.rows.num_rows} images; it takes at least {LEAST_IMAGES} to judge by"
        )
    for candidate in candidates:
        _check_shape(candidate, train, uri)
    place = storage.resolve(settings.cache or f"{uri.rstrip('/')}/{CACHE}")
    cache, name = Cache(place.filesystem, place.path), settings.features
    name = name or ("classifier" if len(train.manifest.class_names) > 1 else "lite0")
    counts = [min(settings.num_images, split.rows.num_rows) for split in (held_out, train)]
    with Display("real images", sum(counts)) as display:
        net = nets.build(name, train, cache, settings.inception_weights)
        real = real_features(held_out, net, cache, counts[0], _device(), display.update)
        other = real_features(
            train, net, cache, counts[1], _device(), lambda n: display.update(counts[0] + n)
        )
        display.update(sum(counts))
    return Yardstick(uri, train, held_out, net, real, other)


def _data_set(candidates: Sequence[Candidate], shards: str | None) -> tuple[DataSet, str]:
    """The split trained on, of the data set in `shards` or of the one that the candidates name; and its URI."""
    config = candidates[0].config
    if shards is not None:
        shards = storage.absolute(shards)
    elif len({candidate.position.get("data_fingerprint") for candidate in candidates}) > 1:
        raise UserError(
            "the checkpoints were trained on different data; name what to judge all by with --data.shards"
        )
    elif config.data.shards and storage.resolve(config.data.shards).child(MANIFEST).exists():
        shards = config.data.shards
    elif config.data.source is None:
        where = f"is not at {config.data.shards} any more" if config.data.shards else "is not known"
        raise UserError(f"what {candidates[0].uri} was trained on {where}; name it with --data.shards")
    else:
        shards = embedded.with_shards(
            replace(config, data=replace(config.data, shards=None), run=replace(config.run, storage="runs"))
        ).data.shards
    assert shards is not None, "embedded.with_shards names them"
    return stream.open_data_set(replace(config, data=replace(config.data, shards=shards))), shards


def _check_shape(candidate: Candidate, data_set: DataSet, uri: str) -> None:
    """Raise UserError unless the net draws what the data set holds."""
    model, manifest = candidate.config.model, data_set.manifest
    drawn = (model.image_size, model.image_size, model.channels)
    held = (manifest.height, manifest.width, manifest.channels)
    if drawn != held:
        raise UserError(
            f"{candidate.uri} draws images of {drawn[0]}x{drawn[1]} with {drawn[2]} channel(s), but {uri} holds "
            f"{held[0]}x{held[1]} with {held[2]}; name the data it was trained on with --data.shards"
        )
    if model.num_classes not in (0, len(manifest.class_names)):
        raise UserError(
            f"{candidate.uri} knows {model.num_classes} classes, but {uri} has {len(manifest.class_names)}; "
            "name the data it was trained on with --data.shards"
        )


def _judge(
    candidate: Candidate, samples: list[SampleConfig], yardstick: Yardstick, settings: Settings, which: str
) -> Verdict:
    config, position = candidate.config, candidate.position
    own = replace(_resolved(config, config.sample), seed=settings.seed)
    return Verdict(
        checkpoint=candidate.uri,
        weights_sha256=candidate.weights_sha256,
        run_name=config.run.name,
        run_key=position.get("run_key", ""),
        experiment=config.run.experiment,
        images_seen=position["images_seen"],
        saw_this_data=position.get("data_fingerprint") == yardstick.train.rows.fingerprint,
        bits=tuple(_bits(candidate, yardstick, settings, which)),
        drawn=tuple(
            Drawn(sample, sample == own, tuple(_scores(candidate, sample, yardstick, settings, which)))
            for sample in samples
        ),
    )


def _bits(candidate: Candidate, yardstick: Yardstick, settings: Settings, which: str) -> list[Score]:
    if candidate.config.objective.process != "gaussian":
        return []
    num_images = min(settings.num_images, yardstick.held_out.rows.num_rows)
    posed = candidate.net, candidate.config
    (proposal,) = [None]
    if settings.num_draws:
        (proposal,) = _spread(partial(_proposal, *posed, yardstick.train), [range(judgement.PILOT_IMAGES)])
    task = partial(_bits_of, *posed, yardstick.held_out, proposal, settings.num_draws, settings.seed)
    with Display(f"{which}bits/dim", num_images) as display:
        parts = _spread(task, _pieces(num_images), display.update)
    return BitsPerDim.merge(*parts).scores()


def _scores(
    candidate: Candidate, sample: SampleConfig, yardstick: Yardstick, settings: Settings, which: str
) -> list[Score]:
    task = partial(_drawn, candidate.net, candidate.config, yardstick.feature_net, sample)
    with Display(f"{which}{sample.sampler}-{sample.num_sample_steps}", settings.num_images) as display:
        parts = _spread(task, _pieces(settings.num_images), display.update)
    generated = Features.merge(*parts)
    return score(yardstick.feature_net.name, generated, yardstick.real, yardstick.other_real)


def _proposal(net: UNet, config: Config, train: DataSet, piece: range) -> Tensor:
    objective = generation.build_objective(config)
    net.to(_device())
    return judgement.proposal(
        net, config, objective, _images(train, piece), device=_device(), variance=config.sample.variance
    )


def _bits_of(
    net: UNet,
    config: Config,
    held_out: DataSet,
    proposal: Tensor | None,
    num_draws: int,
    seed: int,
    piece: range,
) -> BitsPerDim:
    return judgement.bits_per_dim(
        net.to(_device()),
        config,
        generation.build_objective(config),
        _images(held_out, piece),
        start=piece.start,
        device=_device(),
        variance=config.sample.variance,
        proposal=proposal,
        num_draws=num_draws,
        seed=seed,
    )


def _drawn(
    net: UNet, config: Config, feature_net: FeatureNet, sample: SampleConfig, piece: range
) -> Features:
    objective, device = generation.build_objective(config), _device()
    net.to(device)
    return judgement.drawn_features(net, config, objective, feature_net, piece, device=device, sample=sample)


def _images(data_set: DataSet, piece: range) -> Images:
    """Those at these places of an order without a seed, as `real_features` takes them."""
    return data_set.read(data_set.plan(0, WINDOW_ROWS), piece.start, piece.stop, "substitute")


def _pieces(num_images: int) -> list[range]:
    return [range(i, min(i + PIECE_IMAGES, num_images)) for i in range(0, num_images, PIECE_IMAGES)]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _spread(
    task: Callable[[range], T], pieces: Sequence[range], show: Callable[[int], None] = lambda done: None
) -> list[T]:
    """The task's results, in the order of the pieces."""
    results = []
    for piece in pieces:
        results.append(task(piece))
        show(piece.stop)
    return results
