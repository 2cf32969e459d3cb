"""--train.init-from: a run that starts from the weights of another checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ddpm.checkpoints import checkpoint
from ddpm.config import Config, override
from ddpm.data.reading import DataSet
from ddpm.storage import locations
from ddpm.training import checkpoint_manager, loop
from ddpm.training.runtime import LocalRuntime, NoTracker
from ddpm.training.state import State
from ddpm.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def source(tiny: Config, tmp_path: Path) -> Path:
    """A late checkpoint of another run with the same net."""
    state = State.create(override(tiny, {"train.seed": 5, "model.zero_init": False}), CPU)
    with torch.no_grad():
        for weight in state.ema.net.parameters():
            weight.add_(0.1)
    state.step, state.images_seen = 100, 3200
    identity = {"run_key": "other", "data_fingerprint": "f"}
    checkpoint.write(state.snapshot(override(tiny, {"train.seed": 5}), identity), tmp_path / "first")
    return tmp_path / "first"


def begin(config: Config, folder: Path) -> list[str]:
    warnings: list[str] = []
    identity = {"run_key": "mine", "data_fingerprint": "f"}
    checkpoint_manager.begin(locations.resolve(str(folder)), config, identity, warnings.append)
    return warnings


def fit(config: Config, data_set: DataSet, folder: Path) -> State:
    return loop.train(config, LocalRuntime(config, data_set, None, folder), NoTracker())


def tensors(state: State) -> dict[str, torch.Tensor]:
    parts = (state.net.state_dict(), state.ema.state_dict(), state.optimizer_tensors())
    return {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}


def test_the_first_checkpoint_has_the_averaged_weights_of_the_source(
    tiny: Config, source: Path, tmp_path: Path
) -> None:
    config = override(tiny, {"train.init_from": str(source), "model.dropout": 0.1})
    assert begin(config, tmp_path / "run") == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == [checkpoint.name_at(0)]
    folder = tmp_path / "run" / checkpoint.name_at(0)
    state = State.create(config, CPU)
    state.restore(folder, config)
    assert (state.step, state.images_seen, state.optimizer_tensors()) == (0, 0, {})
    assert checkpoint.read_state(folder)["run_key"] == "mine"
    for name, tensor in load_file(source / "ema.safetensors").items():
        assert torch.equal(state.net.state_dict()[name], tensor)
        assert torch.equal(state.ema.state_dict()[name], tensor)


def test_a_run_with_init_from_resumes_bitwise_equal(
    tiny: Config, source: Path, train_set: DataSet, tmp_path: Path
) -> None:
    config = override(tiny, {"train.init_from": str(source), "optim.lr_schedule": "constant"})
    for run in ("straight", "broken"):
        begin(config, tmp_path / run)
    straight = fit(config, train_set, tmp_path / "straight")
    fit(override(config, {"train.total_images": 128}), train_set, tmp_path / "broken")
    for path in source.iterdir():  # resuming needs neither the flag nor the source
        path.unlink()
    resumed = fit(override(config, {"train.init_from": None}), train_set, tmp_path / "broken")
    assert (straight.step, resumed.step) == (8, 8)
    ours, theirs = tensors(straight), tensors(resumed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    fresh = fit(override(config, {"train.init_from": None}), train_set, tmp_path / "fresh")
    assert any(not torch.equal(ours[name], tensor) for name, tensor in tensors(fresh).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.base_width": 16}, "has another net: model.base_width 8 (now 16); use those values"),
        ({"model.net": "dit"}, "has another net: model.net unet (now dit); use those values"),
        ({"objective.predict": "v"}, "objective.predict eps (now v)"),
        ({"train.init_from": "none"}, "none does not exist; expected a checkpoint folder or a run folder"),
    ],
)
def test_a_checkpoint_of_another_net_is_a_user_error(
    tiny: Config, source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = override(tiny, {"train.init_from": str(source)} | changes)
    with pytest.raises(UserError) as caught:
        begin(config, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_a_user_error(tiny: Config, source: Path, tmp_path: Path) -> None:
    (source / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        begin(override(tiny, {"train.init_from": str(source)}), tmp_path / "run")
