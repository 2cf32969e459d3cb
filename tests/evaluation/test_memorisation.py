"""Shares and intervals with known answers: copies, samples of one distribution, mixtures of both."""

from pathlib import Path

import numpy as np
import pytest
from scipy import special
from sklearn.metrics import pairwise_distances
from support.local import fit

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.data.manifest import make_manifest, write_manifest
from ddpm.data.reading import DataSet
from ddpm.data.shards import write_shard
from ddpm.data.sources.sources import Digits
from ddpm.evaluation import evaluate, inputs, memorisation
from ddpm.evaluation.memorisation import Nearest, nearer_share, nearest
from ddpm.evaluation.results_table import remarks
from ddpm.evaluation.settings import Settings
from ddpm.runs import storage
from ddpm.runs.evaluations import NearerShare
from ddpm.runs.run_folder import open_run
from ddpm.utils import images


def distances(values: np.ndarray) -> Nearest:
    return Nearest(values, np.zeros(len(values), np.int64))


def random_images(seed: int, n: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 1)).astype(np.uint8)


def test_the_nearest_is_found_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    train = random_images(0, 300)
    sets = [random_images(1, 70), random_images(2, 20)]
    sets[0][5] = train[123]
    whole = [
        pairwise_distances(x.reshape(-1, 16).astype(float), train.reshape(-1, 16).astype(float)) for x in sets
    ]
    for size in (7, 300, 4096):
        monkeypatch.setattr(memorisation, "BLOCK_BYTES", size * 16 * 4)
        assert memorisation.block_images((4, 4, 1)) == size
        blocks = (train[i : i + size] for i in range(0, len(train), size))
        for found, expected in zip(nearest(sets, blocks), whole, strict=True):
            assert (found.index == expected.argmin(1)).all()
            np.testing.assert_allclose(found.distance, expected.min(1) / 4, rtol=1e-12)
    assert nearest(sets, [train])[0].distance[5] == 0


def test_small_distances_of_features_are_exact() -> None:
    """Next to vectors of length 1,000 a difference of 0.001 is lost in |x|^2 - 2 x y + |y|^2 in float32."""
    train = np.random.RandomState(0).standard_normal((50, 64)).astype(np.float32) * 125
    (found,) = nearest([train + np.float32(2**-10)], [train])
    np.testing.assert_allclose(found.distance, 2**-10, rtol=0.01)


@pytest.mark.lowest
def test_copies_of_training_images_are_all_nearer() -> None:
    train = random_images(0, 200)
    held_out = random_images(1, 150)
    near_held_out, near_drawn = nearest([held_out, train[:100]], [train])
    found = nearer_share("pixels", near_drawn, near_held_out)
    assert (found.name, found.value, found.high) == ("nearer_than_held_out-pixels", 1, 1)
    assert found.low > 0.9
    assert (found.n, found.n_real) == (100, 150)
    assert found.floor == 2 / 151  # the 2nd smallest distance is the 1st percentile of 150


@pytest.mark.parametrize(("num_drawn", "num_held_out"), [(200, 20), (500, 90), (1000, 1000)])
def test_the_interval_covers_the_expected_share_without_memorisation(
    num_drawn: int, num_held_out: int
) -> None:
    """Coverage is at least 95 % by construction; less than 91 % of 300 repetitions has probability 0.001."""
    noise = np.random.RandomState(0)
    covered = []
    of_one_percent = []
    shares = []
    for _ in range(300):
        sides = (distances(noise.rand(n)) for n in (num_drawn, num_held_out))
        found = nearer_share("pixels", *sides)
        covered.append(found.low <= found.floor <= found.high)
        of_one_percent.append(found.low <= 0.01 <= found.high)
        shares.append(found.value)
    assert np.mean(covered) >= 0.91
    assert (
        num_held_out < 90 or np.mean(of_one_percent) >= 0.91
    )  # the smallest of 20 distances is not a 1st percentile
    # The floor is the expected share, and its error the standard deviation of a share.
    assert np.mean(shares) == pytest.approx(found.floor, abs=4 * found.floor_error / 300**0.5)
    assert np.std(shares) == pytest.approx(found.floor_error, rel=0.25)


@pytest.mark.parametrize("num_held_out", [90, 1000])
def test_the_interval_covers_a_larger_share(num_held_out: int) -> None:
    """Distances whose odds of lying below any other are 10 times those of held-out ones."""
    noise = np.random.RandomState(1)
    covered = []
    for _ in range(200):
        drawn = noise.rand(1000)
        held_out = noise.rand(num_held_out)
        found = nearer_share(
            "pixels", distances(special.expit(special.logit(drawn) - np.log(10))), distances(held_out)
        )
        truth = special.expit(special.logit(found.floor) + np.log(10))
        covered.append(found.low <= truth <= found.high)
    assert 0.9 <= np.mean(covered) < 1


@pytest.mark.parametrize(("num_held_out", "share"), [(90, 0.3), (1000, 0.04)])
def test_a_few_copies_are_detected(num_held_out: int, share: float) -> None:
    noise = np.random.RandomState(2)
    drawn = noise.rand(2000)
    drawn[: int(share * 2000)] = 0
    found = nearer_share("pixels", distances(drawn), distances(noise.rand(num_held_out)))
    assert found.value == pytest.approx(share, abs=0.03)
    assert found.low > 1.5 * found.floor


@pytest.mark.parametrize(("channels", "num_drawn"), [(1, 40), (3, 16)])
def test_the_picture_of_nearest_images_shows_the_nearest_pairs_first(channels: int, num_drawn: int) -> None:
    image = np.random.RandomState(0).randint(0, 256, (130, 8, 8, channels)).astype(np.uint8)
    image[..., 0, 0, :] = 255
    train = image[:60]
    drawn = image[90 : 90 + num_drawn]
    drawn[4] = train[50]
    drawn[3] = train[20]
    drawn[3, 0, 1] ^= 4
    (near,) = nearest([drawn], [train])
    shown = images.from_png(memorisation.picture(near, drawn, lambda at: train[at]))
    order = np.argsort(near.distance)[:16]
    assert order[:2].tolist() == [4, 3]
    for pair_image in (*drawn[order], *train[near.index[order]]):
        pixel = np.broadcast_to(pair_image[4, 4], 3)
        assert (shown == pixel).all(-1).sum() > 9, "an image is missing"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("num_digits", "is_caught"), [(16, True), (1707, False)])
def test_a_net_that_memorised_sixteen_images_is_detected(
    tmp_path: Path, num_digits: int, is_caught: bool
) -> None:
    """A net smaller than the digits preset's, trained a fifth as long in the same way: on few digits, and on all."""
    source = Digits()
    location = storage.resolve(str(tmp_path / "data"))
    image, label = source.read("train", 0, num_digits)
    # Evaluation needs 20 training images at least for its floor.
    copies = max(1, 160 // num_digits)
    splits = {
        "train": (np.tile(image, (copies, 1, 1, 1)), np.tile(label, copies)),
        "test": source.read("test", 0, 90),
    }
    shards = {
        split: [write_shard(location, f"{split}/00000.parquet", *rows, rows_per_row_group=100)]
        for split, rows in splits.items()
    }
    manifest = make_manifest("digits", (8, 8, 1), "raw", list(source.class_names), shards, options="test")
    write_manifest(location, manifest)
    train = DataSet(location, manifest, "train")
    config = override(
        DIGITS,
        {
            "data.shards": location.uri,
            "schedule.num_timesteps": 100,
            "model.base_width": 16,
            "model.width_multipliers": [1, 2],
            "train.total_images": 38_400,
            "train.checkpoint_every_images": 38_400,
            "train.sample_every_images": 38_400,
            "train.held_out_images": 0,
            "sample.num_images": 4,
            "sample.num_sample_steps": 20,
        },
    )
    run = open_run("judged", str(tmp_path / "runs"))
    fit(config, train, Path(run.location.path))
    settings = Settings(num_images=250, features="classifier", num_draws=1)
    report = evaluate.evaluate(inputs.read_checkpoints([run.location.uri]), settings, 1)
    shares = [score for score in report.results[0].drawn.scores if isinstance(score, NearerShare)]
    names = ["nearer_than_held_out-classifier", "nearer_than_held_out-pixels"]
    assert [share.name for share in shares] == names
    assert all(share.low > 0.2 if is_caught else share.value < 0.03 for share in shares)
    assert [name in "".join(remarks(report, "out.json")[1:]) for name in names] == [is_caught] * 2
