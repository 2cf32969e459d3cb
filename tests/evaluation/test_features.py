"""Feature nets, the order of features, and what is kept."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from ddpm.config import UserError
from ddpm.data.reading import DataSet
from ddpm.evaluation import classifier, inception, nets
from ddpm.evaluation.cache import Cache
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import Features, digest_of, features_of, normalised
from ddpm.evaluation.inception import Inception
from ddpm.evaluation.lite0 import Lite0
from ddpm.evaluation.pixels import Pixels
from ddpm.evaluation.reference import real_features


def noise(n: int, side: int = 8, channels: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, side, side, channels), generator=g, dtype=torch.uint8)


def some(*index: int) -> Features:
    return Features(np.array(index), np.array(index, np.float32)[:, None] * 2)


def test_parts_make_the_whole_in_any_order() -> None:
    merged = Features.merge(some(7, 9), some(0, 1, 8), some(1, 2))
    assert merged.index.tolist() == [0, 1, 2, 7, 8, 9]
    assert merged.values.ravel().tolist() == [0, 2, 4, 14, 16, 18]
    with pytest.raises(ValueError, match="ascending"):
        some(2, 1)


def test_pixels_are_pixels() -> None:
    image = noise(3)
    net = Pixels((8, 8, 1))
    found = features_of(net, image, start=5, batch_size=2)
    assert found.index.tolist() == [5, 6, 7] and net.size == 64
    np.testing.assert_allclose(found.values, image.numpy().reshape(3, 64) / 127.5 - 1, atol=1e-6)


def test_floats_are_not_judged() -> None:
    for net in (Pixels((8, 8, 1)), Lite0()):
        with pytest.raises(ValueError, match="must be uint8"):
            net.features(noise(2).float())


def test_lite0_knows_imagenet_and_has_unit_scale() -> None:
    net = Lite0()
    grey = net.features(noise(3))
    assert grey.shape == (3, net.size) and grey.dtype == torch.float32
    torch.testing.assert_close(grey.square().mean(1), torch.ones(3))
    torch.testing.assert_close(net.features(noise(3).expand(-1, -1, -1, 3)), grey)
    # The weights are the trained ones: the first filters see edges and colours, not noise.
    fresh = type(net.net).from_name("efficientnet-lite0")
    assert net.net._bn1.running_var.std() > 0 and fresh._bn1.running_var.std() == 0
    assert Lite0().digest == net.digest


def test_normalised_keeps_the_direction() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(normalised(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]) * 2**0.5)


def test_a_digest_sees_a_changed_bit_a_name_and_the_recipe() -> None:
    a, b = (
        {"w": torch.zeros(4), "b": torch.ones(2)},
        {"w": torch.tensor([0.0, 0, 0, 1e-30]), "b": torch.ones(2)},
    )
    renamed = {"v": torch.zeros(4), "b": torch.ones(2)}
    digests = {digest_of(a), digest_of(b), digest_of(renamed), digest_of(a, "other"), digest_of({})}
    assert len(digests) == 5
    assert digest_of(a) == digest_of(dict(reversed(a.items())))


class TestInception:
    @pytest.fixture(scope="class")
    def theirs(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureExtractorInceptionV3, Path]:
        """torch-fidelity's net with random weights, since the real ones are a download, and their file."""
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
        return FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(path)
        ), path

    @pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (320, 3)])
    def test_features_are_torch_fidelitys(
        self, theirs: tuple[FeatureExtractorInceptionV3, Path], side: int, channels: int
    ) -> None:
        net, path = theirs
        image = noise(2, side, channels)
        right = net(image.expand(-1, -1, -1, 3).permute(0, 3, 1, 2))[0]
        ours = Inception(str(path), sha256_prefix="").features(image)
        assert ours.shape == (2, Inception.size)
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4 * right.abs().max().item())

    @pytest.mark.parametrize("side", [1, 7, 32, 299, 500])
    def test_images_are_resized_as_tensorflow_did(self, side: int) -> None:
        x = noise(2, side, 3).permute(0, 3, 1, 2).float()
        right = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        torch.testing.assert_close(inception.resize(x), right, rtol=0, atol=2e-4 * 255)

    def test_other_weights_are_refused(
        self,
        theirs: tuple[FeatureExtractorInceptionV3, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with pytest.raises(UserError, match="is not the Inception-v3 of FID: its SHA-256 begins with"):
            Inception(str(theirs[1]))
        with pytest.raises(UserError, match="does not exist"):
            Inception("nowhere.pth")
        torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
        with pytest.raises(UserError, match="holds no weights of Inception-v3"):
            Inception(str(tmp_path / "w.pth"), sha256_prefix="")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(UserError, match="name a file or a URL"):
            Inception()
        with pytest.raises(UserError, match="cannot download http://127.0.0.1:9/"):
            Inception("http://127.0.0.1:9/weights.pth")

    def test_code_in_the_file_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"w": Trap(str(tmp_path / "ran"))}, tmp_path / "w.pth")
        with pytest.raises(UserError, match="holds no weights"):
            Inception(str(tmp_path / "w.pth"), sha256_prefix="")
        assert not (tmp_path / "ran").exists()

    def test_where_torch_fidelity_keeps_them_they_are_found(
        self,
        theirs: tuple[FeatureExtractorInceptionV3, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        place = tmp_path / "hub/checkpoints" / inception.FILES[0]
        place.parent.mkdir(parents=True)
        place.write_bytes(theirs[1].read_bytes())
        assert Inception(sha256_prefix="").digest == Inception(str(theirs[1]), sha256_prefix="").digest


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def test_the_classifier_classifies(digits_classifier: Classifier, test_digits: DataSet) -> None:
    held_out = test_digits.read(test_digits.plan(0, 1000), 0, 90)
    guess = digits_classifier.logits(torch.from_numpy(held_out.image)).argmax(1).numpy()
    assert (guess == held_out.label).mean() > 0.95
    found = digits_classifier.features(torch.from_numpy(held_out.image))
    assert found.shape == (90, 128)
    torch.testing.assert_close(found.square().mean(1), torch.ones(90))


def test_the_classifier_is_the_same_again_and_kept(
    train_digits: DataSet, cache: Cache, tmp_path: Path
) -> None:
    first = classifier.build(train_digits, cache, train_images=256)
    (file,) = (tmp_path / "cache").iterdir()
    kept = file.read_bytes()
    assert classifier.build(train_digits, cache, train_images=256).digest == first.digest
    file.unlink()
    assert classifier.build(train_digits, cache, train_images=256).digest == first.digest
    assert file.read_bytes() == kept
    assert classifier.build(train_digits, cache, train_images=512).digest != first.digest


def test_without_classes_there_is_no_classifier(train_digits: DataSet, cache: Cache) -> None:
    manifest = Mock(wraps=train_digits.manifest, class_names=(), channels=1)
    unlabelled = Mock(manifest=manifest, where="data/cats")
    with pytest.raises(UserError, match="data/cats has no classes"):
        classifier.build(unlabelled, cache)


def test_a_net_has_a_name(train_digits: DataSet, cache: Cache) -> None:
    assert nets.build("pixels", train_digits, cache).size == 64
    assert nets.build("lite0", train_digits, cache).size == 1280
    with pytest.raises(UserError, match="'vgg' is unknown; it must be inception"):
        nets.build("vgg", train_digits, cache)  # type: ignore[arg-type]


def test_features_of_real_images_are_computed_once(test_digits: DataSet, cache: Cache) -> None:
    net, told = Pixels((8, 8, 1)), []
    found = real_features(test_digits, net, cache, 50, torch.device("cpu"), told.append)
    assert len(found) == 50 and told == [50]
    again = real_features(test_digits, net, cache, 50, torch.device("cpu"), told.append)
    assert told == [50]
    np.testing.assert_array_equal(found.values, again.values)
    everything = real_features(test_digits, net, cache, 1000, torch.device("cpu"), told.append)
    assert len(everything) == 90 and told == [50, 90]
    np.testing.assert_array_equal(found.values, everything.values[:50])
    other = Pixels((8, 8, 1))
    other.digest = "0" * 64
    real_features(test_digits, other, cache, 50, torch.device("cpu"), told.append)
    assert told == [50, 90, 50]


@pytest.mark.parametrize(
    "harm", [lambda d: d[:-3], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: b"", lambda d: b"x"]
)
def test_what_is_damaged_is_made_again(cache: Cache, tmp_path: Path, harm) -> None:  # type: ignore[no-untyped-def]
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T}

    right = cache.get("a", make)
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 1
    file = tmp_path / "cache/a.safetensors"
    file.write_bytes(harm(file.read_bytes()))
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 2
    assert torch.equal(cache.get("a", make)["a"], right["a"]) and len(made) == 2


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot keep .*cache/a.safetensors"):
        cache.get("a", lambda: {"a": torch.zeros(1)})
