"""What a run takes, against what it took."""

from pathlib import Path

import pytest
from support.trained import write_trained

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.training.footprint import footprint
from ddpm.training.state import parameter_count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim.kind": "muon", "train.precision": "bfloat16"},
        {"model.num_classes": 10, "model.dropout": 0.1, "data.augment": 0.1, "objective.variance": "learned"},
    ],
)
def test_weights_and_checkpoint(tiny: Config, tmp_path: Path, changes: dict[str, object]) -> None:
    config = override(tiny, changes)
    found = footprint(config)
    assert found.weights == parameter_count(build_net(config))
    assert (found.micro_batches, found.images) == (4, 32)
    folder = write_trained(tmp_path / "checkpoint", config)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    headers = 100 * 6 * len(list(build_net(config).parameters()))  # names and shapes
    assert found.checkpoint <= stored < found.checkpoint + headers


def test_memory_grows_with_the_images_of_a_pass(tiny: Config) -> None:
    def memory(images: int, workers: int = 1) -> int:
        found = footprint(override(tiny, {"train.forward_images": images, "cluster.num_workers": workers}))
        assert found.images == min(images, 32 // workers) and found.memory is not None
        return found.memory

    one = memory(2) - memory(1)
    assert one > 4 * 64 and memory(32) - memory(1) == 31 * one
    assert memory(32, workers=4) == memory(8)
