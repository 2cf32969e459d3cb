"""Scores: their names, floors and errors, and that they do not depend on the order of the features."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.gaussians import true_kid

from ddpm.data.reading import DataSet
from ddpm.diffusion.likelihood import Bound
from ddpm.evaluation import scores
from ddpm.evaluation.bits import BitsPerDim
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import Features, features_of
from ddpm.evaluation.scores import Score, score
from ddpm.utils.errors import UserError

Int64 = NDArray[np.int64]

METRICS = ("precision", "recall", "density", "coverage")


def normal(n: int, size: int = 8, seed: int = 0, mean: float = 0.0) -> Features:
    values = mean + np.random.RandomState(seed).standard_normal((n, size))
    return values.astype(np.float32)


def by_name(found: list[Score]) -> dict[str, Score]:
    return {s.name: s for s in found}


@pytest.mark.parametrize(
    ("net", "size", "fid"),
    [
        ("inception", 200, "FID"),
        ("lite0", 200, "FID-lite0-128d"),
        ("classifier", 128, "FID-classifier"),
        ("pixels", 64, "FID-pixels"),
    ],
)
def test_a_score_is_named_after_its_feature_net(net: str, size: int, fid: str) -> None:
    found = score(net, normal(30, size), normal(40, size, 1))
    assert [s.name for s in found] == [fid, f"KID-{net}", *(f"{metric}-{net}" for metric in METRICS)]
    assert all((s.n, s.n_real, s.floor) == (30, 40, None) for s in found)


def test_a_perfect_model_scores_at_the_floor_and_a_poor_one_above() -> None:
    real, other = normal(400, seed=1), normal(500, seed=2)
    perfect = score("pixels", normal(300, seed=3), real, other)
    poor = score("pixels", normal(300, seed=3, mean=0.7), real, other)
    for good, bad in zip(perfect, poor, strict=True):
        assert good.floor == bad.floor and good.floor_n == 300
        spread = 4 * (good.error + good.floor_error) + 0.01  # type: ignore[operator]
        assert abs(good.value - good.floor) < spread  # type: ignore[operator]
    for bad in poor[:2]:  # FID and KID
        assert bad.value > bad.floor + 4 * bad.error  # type: ignore[operator]


def test_the_floor_reports_its_number_of_images() -> None:
    (first, *_) = score("pixels", normal(300), normal(100, seed=1), normal(50, seed=2))
    assert (first.n, first.floor_n) == (300, 50)


def test_the_error_of_fid_is_its_spread() -> None:
    """The spread over new generated and new real images."""
    found = [
        score("pixels", normal(200, seed=2 * i, mean=0.3), normal(100, seed=2 * i + 1))[0] for i in range(60)
    ]
    errors, values = np.array([s.error for s in found]), np.array([s.value for s in found])
    assert 0.8 < errors.mean() / values.std() < 1.3


def clusters(label: Int64, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Features of images in ten classes."""
    centres = 2 * np.random.RandomState(0).standard_normal((10, 8))
    noise = np.random.RandomState(seed).standard_normal((len(label), 8))
    return (centres[label] + shift + noise).astype(np.float32)


def errors_in_order(order: str, is_labelled: bool) -> NDArray[np.float64]:
    """[6]: the errors of clustered features, in the order of `score`, on average over five draws."""
    found = []
    for seed in range(5):
        sides = []
        for n, shift in ((500, 0.3), (300, 0.0)):
            label = np.arange(n) % 10
            values = clusters(label, 2 * seed + (n == 300), shift)
            rows = {
                "i mod 10": np.arange(n),
                "by class": np.argsort(label, kind="stable"),
                "shuffled": np.random.RandomState(seed).permutation(n),
            }[order]
            sides.append((values[rows], label[rows]))
        (generated, label), (real, _) = sides
        scores_ = score("pixels", generated, real, label=label if is_labelled else None)
        found.append([s.error**2 for s in scores_])
    return np.sqrt(np.mean(found, 0))


@pytest.mark.parametrize("is_labelled", [True, False])
def test_errors_do_not_depend_on_the_order_of_rows(is_labelled: bool) -> None:
    errors = np.array([errors_in_order(order, is_labelled) for order in ("i mod 10", "by class", "shuffled")])
    ratios = dict(zip(("FID", "KID", *METRICS), errors.max(0) / errors.min(0), strict=True))
    assert all(1 <= ratio < 1.5 for ratio in ratios.values()), ratios


def test_the_error_of_fid_is_stratified_by_class() -> None:
    classes, found = np.arange(200) % 10, []
    for seed in range(60):
        generated = clusters(classes, 2 * seed, 0.3)
        chance = np.random.RandomState(seed).randint(0, 10, 200)
        real = clusters(chance, 2 * seed + 1)
        first, *_ = score("pixels", generated, real, label=classes)
        found.append((first.value, first.error))
    values, errors = np.array(found).T
    assert 0.8 < errors.mean() / values.std() < 1.3


def test_a_share_of_one_has_an_error() -> None:
    """All 90 real images are covered: adding two successes and two failures makes 92 of 94 (Agresti & Coull 1998)."""
    real = normal(90, seed=1)
    found = by_name(score("pixels", np.tile(real, (4, 1))[:300], real))
    assert found["coverage-pixels"].value == 1
    assert found["coverage-pixels"].error == pytest.approx((92 / 94 * 2 / 94 / 94) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("n_real", [90, 1000])
def test_intervals_cover(n_real: int, shift: float) -> None:
    """In at least 90 % of 200 pairs of sets the true value lies within 1.96 errors.

    For KID the true value is the population's; the others are biased by the number of images, so it is their mean.
    """
    found = [
        score("pixels", normal(300, 16, 2 * i, shift), normal(n_real, 16, 2 * i + 1)) for i in range(200)
    ]
    values, errors = (np.array([[getattr(s, key) for s in f] for f in found]) for key in ("value", "error"))
    right = values.mean(0)
    right[1] = true_kid(np.full(16, shift), np.zeros(16))
    coverage = (abs(values - right) <= 1.96 * errors).mean(0)
    named = dict(zip(("FID", "KID", *METRICS), coverage, strict=True))
    assert all(share >= 0.9 for share in named.values()), named


def test_pairs_use_only_the_first_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "MAX_PAIRWISE", 50)
    found = by_name(score("pixels", normal(100), normal(80, seed=1)))
    few = by_name(score("pixels", normal(50), normal(50, seed=1)))
    assert (found["FID-pixels"].n, found["FID-pixels"].n_real) == (100, 80)
    assert {s.n for name, s in found.items() if name != "FID-pixels"} == {50}
    again = by_name(score("pixels", normal(100)[:50], normal(80, seed=1)[:50]))
    assert again["KID-pixels"] == found["KID-pixels"]
    assert few.keys() == found.keys()


def test_too_few_images_are_a_one_line_error() -> None:
    with pytest.raises(UserError, match="12 generated and 90 real images; a comparison needs at least 20"):
        score("pixels", normal(12), normal(90))


def test_noisy_digits_score_worse(
    digits_classifier: Classifier, train_digits: DataSet, held_out_digits: DataSet
) -> None:
    """The classifier's KID ranks real, noisy and very noisy digits; real ones score at the floor."""
    real = torch.from_numpy(held_out_digits.read(held_out_digits.plan(0, 1000), 0, 297).image)
    other = torch.from_numpy(train_digits.read(train_digits.plan(0, 2000), 0, 1500).image)
    noise = torch.randn(other[750:].shape, generator=torch.Generator().manual_seed(0))
    values = []
    for amount in (0, 80, 200):
        image = (other[750:] + amount * noise).round().clamp(0, 255).to(torch.uint8)
        found = score(
            "classifier",
            features_of(digits_classifier, image),
            features_of(digits_classifier, real),
            features_of(digits_classifier, other[:750]),
        )
        values.append(by_name(found)["KID-classifier"])
    clean, slight, heavy = values
    assert clean.floor is not None and clean.floor_error is not None
    assert abs(clean.value - clean.floor) < 3 * np.hypot(clean.error, clean.floor_error)
    assert clean.value + 3 * clean.error < slight.value
    assert slight.value + 3 * slight.error < heavy.value


def bits(*index: int) -> BitsPerDim:
    value = torch.tensor(index, dtype=torch.float64)
    t = torch.tensor([[1, 3]] * len(index))
    kl = torch.stack([value, value / 2], 1)
    return BitsPerDim.of(Bound(value / 100, t, kl, 2 + value))


def test_bits_of_parts_merge_to_those_of_the_whole() -> None:
    whole = bits(0, 1, 2, 3, 4, 5)
    merged = BitsPerDim.merge(bits(0, 1, 2), bits(3), bits(4, 5))
    np.testing.assert_allclose(merged.kl, [0, 1.5, 3, 4.5, 6, 7.5])
    assert merged.scores() == whole.scores()
    total, *terms = whole.scores()
    assert [s.name for s in terms] == ["bits/dim-prior", "bits/dim-kl", "bits/dim-decoder"]
    assert {(s.n, s.n_real, s.floor) for s in (total, *terms)} == {(6, None, None)}
    assert total.value == pytest.approx(sum(s.value for s in terms))
    assert terms[1].value == pytest.approx(merged.kl.mean())
    slopes = {"bits/dim": 2.51, "bits/dim-prior": 0.01, "bits/dim-kl": 1.5, "bits/dim-decoder": 1.0}
    for s in whole.scores():
        assert s.error == pytest.approx(slopes[s.name] * np.std(range(6), ddof=1) / 6**0.5)
