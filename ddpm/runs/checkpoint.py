"""A checkpoint is a folder of safetensors and JSON; nothing in it is ever executed.

    net.safetensors  ema.safetensors  optimizer.safetensors   weights, averaged weights, the optimizer's state
    state.json       step, images_seen, the run's key, the classes, and the name of the random generator
    config.json      the whole config: enough to rebuild the net
    checksums.json   SHA-256 of every other file, written last

A folder without checksums.json, or with a file that does not match it, is not a checkpoint. Reading a damaged
file raises UserError.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import differences, flags, flatten, from_json, keys_that_affect, to_json
from ddpm.config.tree import Affects, Config
from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import CHECKSUMS, CheckpointName
from ddpm.utils import files, strict_json
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error

_TENSORS = ("net.safetensors", "ema.safetensors", "optimizer.safetensors")
FILES = (*_TENSORS, "state.json", "config.json", CHECKSUMS)
"""Files of a checkpoint."""


NonNegative = Annotated[int, Field(ge=0)]


class StateFile(BaseModel):
    """Content of state.json: how far training is, and the identity of the run; unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    step: NonNegative
    images_seen: NonNegative
    skipped_steps: NonNegative = 0
    best_held_out_loss: float | None
    interval: Annotated[list[float], Field(min_length=10, max_length=10)] | None = None
    generator: str = ""
    run_key: str
    """Empty for an imported checkpoint, which has no run."""
    data_fingerprint: str
    class_names: list[str] = []
    """By label; empty: the net has no classes, or they have no names."""


@dataclass(frozen=True)
class _ClassNames:
    """The part of state.json that sampling needs."""

    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Copy of the training state at one moment, in main memory, so that training can continue."""

    images_seen: int
    tensors: dict[str, dict[str, Tensor]]
    """By file: net, ema and optimizer."""
    state: dict[str, Any]
    """Content of state.json."""
    config: str
    """Content of config.json."""
    wait: Callable[[], object] = lambda: None
    """Returns when the tensors are complete; called before they are read."""


def identity(
    config: Config, run_key: str, data_fingerprint: str, class_names: Sequence[str]
) -> dict[str, Any]:
    """The part of state.json that identifies a run and its data; names of classes only if the net has classes."""
    found: dict[str, Any] = {"run_key": run_key, "data_fingerprint": data_fingerprint}
    if config.model.num_classes:
        found["class_names"] = list(class_names)
    return found


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write `snapshot` as a checkpoint into the empty or new `folder`; checksums.json last, with all else on disk."""
    files.make_folder(folder)
    snapshot.wait()
    for name, tensors in snapshot.tensors.items():
        try:
            save_file(tensors, folder / f"{name}.safetensors")
        except SafetensorError as error:  # raised for a full disk, too
            raise OSError(f"{folder}/{name}.safetensors: {error}") from None
    (folder / "state.json").write_text(json.dumps(snapshot.state, indent=2) + "\n")
    (folder / "config.json").write_text(snapshot.config)
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    files.sync_tree(folder)
    files.write_whole(folder / CHECKSUMS, (json.dumps(sums, indent=2) + "\n").encode())


def verify(folder: Path) -> None:
    """Raise UserError unless `folder` holds a whole checkpoint, byte for byte as it was written."""
    sums = read_checksums(folder)
    needed = set(FILES) - {CHECKSUMS}
    if missing := sorted(needed - set(sums)):
        raise UserError(f"{folder}/checksums.json does not list {missing[0]}")
    for name in needed:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if _sha256(path) != sums[name]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in checksums.json")


def read_checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, from checksums.json."""
    file = folder / CHECKSUMS
    if not file.exists():
        raise UserError(f"{folder} is not a checkpoint: it has no {CHECKSUMS}")
    return strict_json.parse(dict[str, str], read_bytes(file), f"{file} is damaged")


def read_bytes(file: Path) -> bytes:
    """The content of a checkpoint's file."""
    with as_user_error(f"{file} cannot be read"):
        return files.read_whole(file)


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint."""
    return _read_state_file(folder / "state.json").model_dump(exclude_unset=True)


def _read_state_file(file: Path) -> StateFile:
    return strict_json.parse(StateFile, read_bytes(file), f"{file} is damaged", extra="allow")


def check_belongs(folder: Path, run_key: str) -> None:
    """Raise UserError unless the checkpoint in `folder` is the one of this name, and of the run with this key."""
    file = folder / "state.json"
    state = _read_state_file(file)
    name = CheckpointName.parse(folder.name)
    if name is None or name.images_seen != state.images_seen:
        raise UserError(
            f"{file} is damaged: images_seen is {state.images_seen}, in a folder named {folder.name}"
        )
    if state.run_key != run_key:
        raise UserError(f"{file} is of another run: run_key is {state.run_key!r}; run.json has {run_key!r}")


def images_seen_at(folder: Path | None) -> int:
    """images_seen of a checkpoint; 0 for None. The tensors need not be intact."""
    return read_state(folder)["images_seen"] if folder else 0


def read_config(folder: Path) -> Config:
    """config.json of a checkpoint."""
    file = folder / "config.json"
    return from_json(read_bytes(file), where=str(file))


def config_at(uri: str) -> Config:
    """config.json of the checkpoint in a folder or bucket."""
    file = storage.resolve(uri).child("config.json")
    with as_user_error(f"{file.uri} cannot be read"):
        return from_json(file.read(), file.uri)


def load_net(folder: Path | str, device: torch.device | str = "cpu", *, ema: bool = True) -> TrainedNet:
    """The averaged (or the raw) net of a checkpoint, or of a run's newest, ready for sampling."""
    stored = run_folder.checkpoints(storage.resolve(str(folder)))
    folder = Path(stored[-1].path if stored else folder)
    verify(folder)
    config = read_config(folder)
    net = build_net(config)
    load_weights(net, folder / ("ema.safetensors" if ema else "net.safetensors"))
    net.to(device).eval().requires_grad_(False)
    file = folder / "state.json"
    state = strict_json.parse(_ClassNames, read_bytes(file), f"{file} is damaged", extra="ignore")
    return TrainedNet(net, config, class_names=state.class_names)


def write_net(trained: TrainedNet, state: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of a net alone: the averaged net is the same, and the optimizer has no state."""
    weights = {name: tensor.contiguous() for name, tensor in trained.net.state_dict().items()}
    tensors = {"net": weights, "ema": weights, "optimizer": dict[str, Tensor]()}
    snapshot = Snapshot(
        images_seen=state["images_seen"], tensors=tensors, state=state, config=to_json(trained.config)
    )
    write(snapshot, folder)


def check_same_run(saved: Config, now: Config, where: str) -> None:
    """Raise UserError if `saved` and `now` are configurations of different runs."""
    before, after = _both(saved, now, Affects.WEIGHTS)
    if before != after:
        own = {key: before[key] for key in before if before[key] != after[key]}
        name = "" if now.run.name is None else f" --run.name {shlex.quote(now.run.name)}"
        raise UserError(
            f"{where} belongs to a run with another configuration: {differences(before, after)}; continue it with "
            f"{flags(own)}{name}, or choose another --run.name"
        )


def check_same_net(saved: Config, now: Config, folder: Path) -> None:
    """Raise UserError if `now` describes another net than `saved`, the config of the checkpoint in `folder`."""
    before, after = _both(saved, now, Affects.NET)
    if before != after:
        changed = differences(before, after)
        raise UserError(f"train.init_from: {folder} has another net: {changed}; use those values")


def _both(saved: Config, now: Config, what: Affects) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both flat, with the keys that affect `what` and that both have: different nets have different keys."""
    before = flatten(saved)
    keys = keys_that_affect(now, what)
    after = {key: value for key, value in flatten(now).items() if key in keys and key in before}
    return {key: before[key] for key in after}, after


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def load_weights(net: nn.Module, path: Path, optional: str = "") -> None:
    """Put the weights in the file at `path` into `net`; the weight `optional` may be in one of the two alone."""
    tensors = read_tensors(path, next(net.parameters()).device)
    own = net.state_dict()
    if optional in own:
        tensors.setdefault(optional, own[optional])
    else:
        tensors.pop(optional, None)
    check_fit(shapes(tensors), shapes(own), path)
    net.load_state_dict(tensors)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fit(there: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError unless the file has exactly the tensors that the net needs, in their shapes."""
    for name in sorted(set(want) ^ set(there)):
        has = "lacks" if name in want else "has the unknown"
        raise UserError(f"{path} is damaged or of another architecture: it {has} {name!r:.100}")
    for name, shape in there.items():
        if shape != want[name]:
            differs = f"{name} is {shape}, the net has {want[name]}"
            raise UserError(f"{path} is damaged or of another architecture: {differs}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
