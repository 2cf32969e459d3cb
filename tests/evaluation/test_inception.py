"""Inception of FID: torch-fidelity's net, with random weights here, since the real ones must be downloaded."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import Inception3

from ddpm.evaluation import inception
from ddpm.evaluation.inception import Inception
from ddpm.utils.errors import UserError


class TouchOnUnpickle:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random weights; their names are torchvision's."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    generator = torch.Generator().manual_seed(0)
    tensors = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
@pytest.mark.lowest
def test_features_are_those_of_torch_fidelity_on_three_channels(
    weights: str, side: int, channels: int
) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (2, side, side, channels), generator=generator, dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights)
    found = Inception(weights, sha256_prefix="").features(image)
    assert found.shape == (2, Inception.size) and found.std() > 0
    (right,) = theirs(image.expand(-1, -1, -1, 3).permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(found, right)


def test_other_weights_are_rejected(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="SHA-256"):
        Inception(weights)
    with pytest.raises(UserError, match="does not exist"):
        Inception("nowhere.pth")
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights"):
        Inception(str(tmp_path / "w.pth"), sha256_prefix="")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="--inception-weights"):
        Inception()


def test_code_in_the_weights_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"w": TouchOnUnpickle(str(tmp_path / "ran"))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights"):
        Inception(str(tmp_path / "w.pth"), sha256_prefix="")
    assert not (tmp_path / "ran").exists()


def test_weights_of_torch_fidelity_are_found(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / inception.FILES[0]
    place.parent.mkdir(parents=True)
    place.write_bytes(Path(weights).read_bytes())
    assert Inception(sha256_prefix="").digest == Inception(weights, sha256_prefix="").digest


def test_the_missing_package_is_named(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        Inception(weights, sha256_prefix="")
