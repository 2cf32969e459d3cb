"""--train.init-from: a run that starts from the weights of another checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import checkpoint_name
from support.local import assert_same, fit, tensors

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.reading import DataSet
from ddpm.runs import checkpoint, generations, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training import checkpoint_manager
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
    state.step = 100
    state.images_seen = 3200
    identity = {"run_key": "other", "data_fingerprint": "f"}
    checkpoint.write(state.snapshot(override(tiny, {"train.seed": 5}), identity), tmp_path / "first")
    return tmp_path / "first"


def begin(config: Config, folder: Path) -> list[str]:
    warnings: list[str] = []
    run = RunFolder("run", storage.resolve(str(folder)), "")
    generations.Writer(run.location, "driver", "driver").claim()
    checkpoint_manager.begin(run, "driver", config, "f", warnings.append)
    return warnings


def test_the_first_checkpoint_has_the_averaged_weights_of_the_source(
    tiny: Config, source: Path, tmp_path: Path
) -> None:
    changes = {"model.dropout": 0.1, "objective.weight": "min_snr"}  # both mean the same net
    config = override(tiny, changes | {"train.init_from": str(source)})
    assert begin(config, tmp_path / "run") == []
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {checkpoint_name(0), generations.FILE}
    folder = tmp_path / "run" / checkpoint_name(0)
    state = State.create(config, CPU)
    state.restore(folder, config)
    assert (state.step, state.images_seen, state.optimizer_tensors()) == (0, 0, {})
    position = checkpoint.read_state(folder)
    assert (position["run_key"], position["data_fingerprint"]) == ("", "f")
    for name, tensor in load_file(source / "ema.safetensors").items():
        assert torch.equal(state.net.state_dict()[name], tensor)
        assert torch.equal(state.ema.state_dict()[name], tensor)


def test_a_net_begins_without_the_embedding_of_augmentation_or_leaves_it_out(
    tiny: Config, source: Path, tmp_path: Path
) -> None:
    """A net that was trained plainly begins a run of augmented images, and the reverse."""
    told = override(tiny, {"data.augment": 0.1})
    begin(override(told, {"train.init_from": str(source)}), tmp_path / "told")
    folder = tmp_path / "told" / checkpoint_name(0)
    saved = load_file(folder / "ema.safetensors")
    fresh = State.create(told, CPU).net.state_dict()
    name = "augment_embedding.weight"
    assert torch.equal(saved.pop(name), fresh[name]) and fresh[name].abs().max() > 0
    begin(override(tiny, {"train.init_from": str(folder)}), tmp_path / "plain")
    for path in (source / "ema.safetensors", tmp_path / "plain" / checkpoint_name(0) / "ema.safetensors"):
        assert_same(load_file(path), saved)


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
    assert_same(tensors(straight), tensors(resumed))
    fresh = fit(override(config, {"train.init_from": None}), train_set, tmp_path / "fresh")
    ours = tensors(straight)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in tensors(fresh).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.base_width": 16}, "model.base_width 8 (now 16)"),
        ({"objective.predict": "v"}, "objective.predict eps (now v)"),
        ({"train.init_from": "none"}, "none does not exist"),
    ],
)
def test_a_checkpoint_of_another_net_is_a_user_error(
    tiny: Config, source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = override(tiny, {"train.init_from": str(source)} | changes)
    with pytest.raises(UserError) as caught:
        begin(config, tmp_path / "run")
    assert message in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [generations.FILE]
