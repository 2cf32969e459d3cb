"""Inception against torch-fidelity's, with random weights, since the real ones must be downloaded."""

from pathlib import Path

import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3

from ddpm.evaluation import inception
from ddpm.evaluation.inception import Inception
from ddpm.utils.errors import UserError

Theirs = tuple[FeatureExtractorInceptionV3, Path]


def noise(n: int, side: int, channels: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, side, side, channels), generator=g, dtype=torch.uint8)


class TouchOnUnpickle:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """torch-fidelity's net with random weights, and the file of these weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    g = torch.Generator().manual_seed(0)
    weights = inception.build_net().state_dict()
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=g)
        elif "bn.weight" in name:
            tensor.uniform_(0.8, 1.6, generator=g)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=g)
        else:
            tensor.normal_(0, 0.1, generator=g)
    torch.save(weights, path)
    return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)), path


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (320, 3)])
def test_features_equal_those_of_torch_fidelity(reference: Theirs, side: int, channels: int) -> None:
    net, path = reference
    image = noise(2, side, channels)
    right = net(image.expand(-1, -1, -1, 3).permute(0, 3, 1, 2))[0]
    ours = Inception(str(path), sha256_prefix="").features(image)
    assert ours.shape == (2, Inception.size)
    torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())


def test_other_weights_are_rejected(
    reference: Theirs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="SHA-256"):
        Inception(str(reference[1]))
    with pytest.raises(UserError, match="does not exist"):
        Inception("nowhere.pth")
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights of Inception-v3"):
        Inception(str(tmp_path / "w.pth"), sha256_prefix="")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="name a file or a URL"):
        Inception()
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/"):
        Inception("http://127.0.0.1:9/weights.pth")


def test_code_in_the_weights_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"w": TouchOnUnpickle(str(tmp_path / "ran"))}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights"):
        Inception(str(tmp_path / "w.pth"), sha256_prefix="")
    assert not (tmp_path / "ran").exists()


def test_weights_of_torch_fidelity_are_found(
    reference: Theirs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints" / inception.FILES[0]
    place.parent.mkdir(parents=True)
    place.write_bytes(reference[1].read_bytes())
    assert Inception(sha256_prefix="").digest == Inception(str(reference[1]), sha256_prefix="").digest
