"""A checkpoint is loaded whole and as it was, by the run it belongs to, or not at all."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm.config import Config, UserError, override
from ddpm.training import checkpoint
from ddpm.training.state import State
from ddpm.utils.seeding import GENERATOR

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny: Config, tmp_path: Path) -> Path:
    state = State.create(tiny, CPU)
    sum(p.square().sum() for p in state.net.parameters()).backward()  # type: ignore[union-attr]
    state.optimizer.step()
    state.step, state.images_seen = 3, 96
    checkpoint.save(tmp_path / "c", state, tiny, {"run_key": "k"})
    return tmp_path / "c"


def test_a_checkpoint_restores_everything(folder: Path, tiny: Config) -> None:
    state = State.create(tiny, CPU)
    checkpoint.load(folder, state, tiny)
    assert (state.step, state.images_seen) == (3, 96)
    for file, tensors in {
        "net": state.net.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer_tensors(),
    }.items():
        saved = load_file(folder / f"{file}.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensors[name]) for name in saved)
    assert checkpoint.read_config(folder) == tiny
    assert checkpoint.read_state(folder)["run_key"] == "k"


def test_restored_optimizer_state_lies_in_memory_as_it_did(folder: Path, tiny: Config) -> None:
    state = State.create(tiny, CPU)
    checkpoint.load(folder, state, tiny)
    for weight in state.net.parameters():
        assert state.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize(
    "name", ["net.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "config.json"]
)
def test_a_changed_byte_is_found(folder: Path, tiny: Config, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        checkpoint.load(folder, State.create(tiny, CPU), tiny)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors is missing"):
        checkpoint.verify(folder)


def test_without_checksums_it_is_none(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.load_net(folder, CPU)


def test_another_architecture_is_refused(folder: Path, tiny: Config) -> None:
    other = override(tiny, {"model.base_width": 16})
    with pytest.raises(
        UserError, match=r"model.base_width 8 \(now 16\); use those values, or another --run.name"
    ):
        checkpoint.load(folder, State.create(other, CPU), other)


def test_weights_that_contradict_their_config_are_refused(folder: Path, tiny: Config) -> None:
    other = State.create(override(tiny, {"model.base_width": 16}), CPU)
    checkpoint.save(folder, other, tiny, {})
    with pytest.raises(UserError, match="is of another architecture"):
        checkpoint.load_net(folder, CPU)


def test_what_may_change_may_change(folder: Path, tiny: Config) -> None:
    longer = override(
        tiny, {"train.total_images": 9999, "cluster.num_workers": 2, "run.storage": "elsewhere"}
    )
    checkpoint.load(folder, State.create(longer, CPU), longer)


@pytest.mark.parametrize("says", [{}, {"generator": "philox4x64-blake2b/0"}], ids=["nothing", "another"])
def test_a_run_of_another_generator_does_not_go_on(folder: Path, tiny: Config, says: dict[str, str]) -> None:
    """Its images and its noise were others; its weights serve to draw with, and to begin with."""
    position = checkpoint.read_state(folder)
    assert position.pop("generator") == GENERATOR
    (folder / "state.json").write_text(json.dumps(position | says))
    sums = json.loads((folder / "checksums.json").read_text())
    sums["state.json"] = checkpoint._sha256(folder / "state.json")
    (folder / "checksums.json").write_text(json.dumps(sums))
    expected = says.get("generator", "PyTorch's, with 32 bits of a seed")
    with pytest.raises(UserError, match=rf"another random generator \({expected}; now .*--train\.init-from"):
        checkpoint.load(folder, State.create(tiny, CPU), tiny)
    checkpoint.begin(folder, State.create(tiny, CPU), tiny)
    checkpoint.load_net(folder, CPU)


def test_nothing_loaded_is_executed(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    (folder / "net.safetensors").write_bytes(pickle.dumps(Bomb()))
    sums = json.loads((folder / "checksums.json").read_text())
    sums["net.safetensors"] = checkpoint._sha256(folder / "net.safetensors")
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_net(folder, CPU, ema=False)
    assert not (tmp_path / "executed").exists()
