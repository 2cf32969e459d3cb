"""A checkpoint is loaded completely and unchanged, by the run it belongs to, or not at all."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from support.trained import alter_json, replace, write_trained
from torch import Tensor

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import checkpoint
from ddpm.training.state import State
from ddpm.utils.errors import UserError
from ddpm.utils.seeding import GENERATOR

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny: Config, tmp_path: Path) -> Path:
    return write_trained(tmp_path / "c", tiny)


@pytest.mark.lowest
def test_a_checkpoint_restores_everything(folder: Path, tiny: Config) -> None:
    state = State.create(tiny, CPU)
    state.restore(folder, tiny)
    assert (state.step, state.images_seen) == (3, 96)
    for file, tensors in {
        "net": state.net.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer_tensors(),
    }.items():
        saved = load_file(folder / f"{file}.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensors[name]) for name in saved)
    for weight in state.net.parameters():  # the memory layout, too
        assert state.optimizers[0].state[weight]["exp_avg"].stride() == weight.stride()
    assert checkpoint.read_config(folder) == tiny
    assert checkpoint.read_state(folder)["run_key"] == "k"
    changes = {"train.total_images": 9999, "cluster.num_workers": 2, "run.storage": "elsewhere"}
    longer = override(tiny, changes)
    State.create(longer, CPU).restore(folder, longer)


def test_the_net_of_a_run_is_that_of_its_newest_checkpoint(
    folder: Path, tiny: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-000000000096-g1", "checkpoint-000000000064-g2", "best-000000000128-g1"):
        shutil.copytree(folder, run / name)
        alter_json(run / name, "config.json", {"run": {"name": name}})
    (run / "checkpoint-000000000128-g1").mkdir()  # incomplete
    newest = checkpoint.load_net(str(run))
    assert newest.config.run.name == "checkpoint-000000000096-g1"
    weights = zip(newest.net.parameters(), checkpoint.load_net(folder).net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize(
    "name", ["net.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "config.json"]
)
def test_a_changed_byte_is_detected(folder: Path, tiny: Config, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        State.create(tiny, CPU).restore(folder, tiny)


@pytest.mark.parametrize(
    ("name", "message"),
    [("ema.safetensors", r"ema\.safetensors is missing"), ("checksums.json", "is not a checkpoint")],
)
def test_a_missing_file_is_detected(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        checkpoint.load_net(folder, CPU)


def test_another_architecture_is_rejected(folder: Path, tiny: Config) -> None:
    """That of the config to resume with, and that of the weights themselves."""
    other = override(tiny, {"model.base_width": 16})
    state = State.create(other, CPU)
    with pytest.raises(UserError, match=r"model.base_width 8 \(now 16\).*--run.name"):
        state.restore(folder, other)
    checkpoint.write(state.snapshot(tiny, {"run_key": "k", "data_fingerprint": "f"}), folder)
    with pytest.raises(UserError, match="of another architecture"):
        checkpoint.load_net(folder, CPU)


@pytest.mark.parametrize("says", [{}, {"generator": "philox4x64-blake2b/0"}], ids=["nothing", "another"])
def test_a_checkpoint_of_another_generator_cannot_be_resumed(
    folder: Path, tiny: Config, says: dict[str, str]
) -> None:
    """Its data order and its noise differ; its weights can still be used for sampling and for --train.init-from."""
    assert checkpoint.read_state(folder)["generator"] == GENERATOR
    alter_json(folder, "state.json", {"generator": ...} | says)
    with pytest.raises(UserError, match=rf"{says.get('generator', '')}.*{GENERATOR}.*--train\.init-from"):
        State.create(tiny, CPU).restore(folder, tiny)
    State.create(tiny, CPU).init_from(folder, tiny)
    checkpoint.load_net(folder, CPU)


def test_loading_never_executes_code(folder: Path, tmp_path: Path) -> None:
    class TouchOnUnpickle:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    replace(folder, "net.safetensors", pickle.dumps(TouchOnUnpickle()))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_net(folder, CPU, ema=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("state.json", b'{"step": 3, "images', "it is not JSON: EOF while parsing"),
        ("state.json", b"[]", r"it is \[\]"),
        ("state.json", {"images_seen": "96"}, "images_seen is '96'"),
        ("state.json", {"images_seen": -5}, "images_seen is -5"),
        ("state.json", {"best_held_out_loss": float("inf")}, "best_held_out_loss is inf"),
        ("state.json", {"interval": [0.0] * 11}, "interval is "),
        ("state.json", {"data_fingerprint": ...}, "it lacks 'data_fingerprint'$"),
        ("config.json", b"\xff", "it is not JSON"),
        ("checksums.json", b'{"net.safetensors": 3}', "net.safetensors is 3"),
    ],
)
def test_json_with_wrong_content_is_rejected(
    folder: Path, tiny: Config, name: str, wrong: bytes | dict[str, Any], message: str
) -> None:
    """Every reader rejects it: resume, registry and sampling."""
    if isinstance(wrong, dict):
        alter_json(folder, name, wrong)
    else:
        replace(folder, name, wrong)
    readers: list[Callable[[], object]] = [lambda: State.create(tiny, CPU).restore(folder, tiny)]
    if name == "state.json":
        readers.append(lambda: checkpoint.images_seen_at(folder))
    else:
        readers.append(lambda: checkpoint.load_net(folder, CPU))
    for read in readers:
        with pytest.raises(UserError, match=f"^{folder}/{name}( is damaged)?: {message}"):
            read()


MOMENT = "conv_in.weight.exp_avg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, f"lacks '{MOMENT}'"),
        ({MOMENT: torch.zeros(8, 1, 1, 3)}, rf"{MOMENT} is \(8, 1, 1, 3\)"),
        ({"a": torch.zeros(1)}, "unknown 'a'"),
    ],
    ids=["missing", "of another shape", "unknown"],
)
def test_the_state_of_another_optimizer_or_net_is_rejected(
    folder: Path, tiny: Config, change: dict[str, Tensor], message: str
) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    if not change:
        del tensors[MOMENT]
    replace(folder, "optimizer.safetensors", save(tensors | change))
    with pytest.raises(UserError, match=f"^{folder}/optimizer.safetensors .*{message}"):
        State.create(tiny, CPU).restore(folder, tiny)
    checkpoint.load_net(folder, CPU)
    State.create(tiny, CPU).init_from(folder, tiny)


@pytest.mark.parametrize("file", ["net.safetensors", "ema.safetensors"])
def test_weights_of_another_shape_are_rejected(folder: Path, tiny: Config, file: str) -> None:
    """Every reader rejects them, also a shape that would broadcast."""
    tensors = load_file(folder / file)
    replace(folder, file, save(tensors | {"conv_in.weight": tensors["conv_in.weight"][:1]}))
    readers: list[Callable[[], object]] = [
        lambda: State.create(tiny, CPU).restore(folder, tiny),
        lambda: checkpoint.load_net(folder, CPU, ema=file.startswith("ema")),
    ]
    if file.startswith("ema"):
        readers.append(lambda: State.create(tiny, CPU).init_from(folder, tiny))
    for read in readers:
        with pytest.raises(UserError, match=rf"^{folder}/{file} .*: conv_in\.weight is \(1, 1, 3, 3\)"):
            read()


def test_a_registered_model_can_be_sampled_but_not_resumed(
    folder: Path, tiny: Config, tmp_path: Path
) -> None:
    checkpoint.write_net(checkpoint.load_net(folder), checkpoint.read_state(folder), tmp_path / "light")
    checkpoint.load_net(tmp_path / "light", CPU)
    State.create(tiny, CPU).init_from(tmp_path / "light", tiny)
    with pytest.raises(UserError, match=r"optimizer\.safetensors is empty"):
        State.create(tiny, CPU).restore(tmp_path / "light", tiny)


def test_a_checkpoint_with_only_skipped_steps_can_be_resumed(tiny: Config, tmp_path: Path) -> None:
    """AdamW has no state before its first step."""
    state = State.create(tiny, CPU)
    state.step = state.skipped_steps = 2
    state.images_seen = 64
    checkpoint.write(state.snapshot(tiny, {"run_key": "", "data_fingerprint": "f"}), tmp_path / "c")
    restored = State.create(tiny, CPU)
    restored.restore(tmp_path / "c", tiny)
    assert (restored.step, restored.skipped_steps, restored.optimizer_tensors()) == (2, 2, {})


def test_the_names_of_the_classes_are_kept(tiny: Config, tmp_path: Path) -> None:
    """An imported net may have none."""
    conditional = override(tiny, {"model.num_classes": 2})
    for config, names in ((conditional, ("cats", "dogs")), (tiny, ())):
        folder = tmp_path / f"{config.model.num_classes}"
        identity = checkpoint.identity(config, "k", "f", ("cats", "dogs"))
        checkpoint.write(State.create(config, CPU).snapshot(config, identity), folder)
        assert checkpoint.load_net(folder).class_names == names
    checkpoint.write(
        State.create(conditional, CPU).snapshot(conditional, {"run_key": "k", "data_fingerprint": "f"}),
        tmp_path / "earlier",
    )
    assert checkpoint.load_net(tmp_path / "earlier").class_names == ()


def test_the_error_of_another_configuration_has_the_flags_that_continue_the_run(tiny: Config) -> None:
    changes = {"model.num_classes": 10, "data.horizontal_flip": False, "run.name": "my run"}
    now = override(tiny, changes)
    saved = override(now, {"model.num_classes": 0, "data.horizontal_flip": True})
    with pytest.raises(UserError) as error:
        checkpoint.check_same_run(saved, now, "runs/a")
    for part in ("model.num_classes 0 (now 10)", "--model.num-classes 0", "--data.horizontal-flip"):
        assert part in str(error.value)
    assert "--run.name 'my run'" in str(error.value)
    checkpoint.check_same_run(now, now, "runs/a")
