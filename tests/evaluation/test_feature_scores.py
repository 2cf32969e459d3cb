"""Scores: their names, floors and errors, and that they do not depend on the order of the features."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm.evaluation import feature_scores
from ddpm.evaluation.feature_scores import score_features
from ddpm.evaluation.features import Features
from ddpm.runs.evaluations import Score
from ddpm.utils.errors import UserError

Int64 = NDArray[np.int64]

METRICS = ("precision", "recall")


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
    found = score_features(net, normal(30, size), normal(40, size, 1))
    assert [s.name for s in found] == [fid, f"KID-{net}", *(f"{metric}-{net}" for metric in METRICS)]
    assert all((s.n, s.n_real, s.floor) == (30, 40, None) for s in found)


def test_a_perfect_model_scores_at_the_floor_and_a_poor_one_above() -> None:
    real = normal(400, seed=1)
    other = normal(500, seed=2)
    perfect = score_features("pixels", normal(300, seed=3), real, other)
    poor = score_features("pixels", normal(300, seed=3, mean=0.7), real, other)
    for good, bad in zip(perfect, poor, strict=True):
        assert good.floor == bad.floor
        spread = 4 * (good.error + good.floor_error) + 0.01  # type: ignore[operator]
        assert abs(good.value - good.floor) < spread  # type: ignore[operator]
    for bad in poor[:2]:  # FID and KID
        assert bad.value > bad.floor + 4 * bad.error  # type: ignore[operator]


def clusters(label: Int64, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    """Features of images in ten classes."""
    centres = 2 * np.random.RandomState(0).standard_normal((10, 8))
    noise = np.random.RandomState(seed).standard_normal((len(label), 8))
    return (centres[label] + shift + noise).astype(np.float32)


@pytest.mark.parametrize("is_labelled", [True, False])
def test_errors_do_not_depend_on_the_order_of_rows(is_labelled: bool) -> None:
    """Clustered features by i mod 10, by class, and shuffled: the errors of all metrics, over five draws."""
    variances = np.zeros((3, 4))
    for seed in range(5):
        label = np.arange(500) % 10
        of_real = np.arange(300) % 10
        generated = clusters(label, 2 * seed, 0.3)
        real = clusters(of_real, 2 * seed + 1)
        shuffle = np.random.RandomState(seed).permutation
        orders = (np.arange, lambda n: np.argsort(np.arange(n) % 10, kind="stable"), shuffle)
        for i, order in enumerate(orders):
            rows = order(500)
            classes = label[rows] if is_labelled else None
            scores_ = score_features("pixels", generated[rows], real[order(300)], label=classes)
            variances[i] += [s.error**2 for s in scores_]
    ratios = dict(zip(("FID", "KID", *METRICS), np.sqrt(variances.max(0) / variances.min(0)), strict=True))
    assert all(1 <= ratio < 1.5 for ratio in ratios.values()), ratios


def test_the_error_of_fid_is_stratified_by_class() -> None:
    classes = np.arange(200) % 10
    found = []
    for seed in range(60):
        generated = clusters(classes, 2 * seed, 0.3)
        chance = np.random.RandomState(seed).randint(0, 10, 200)
        real = clusters(chance, 2 * seed + 1)
        first, *_ = score_features("pixels", generated, real, label=classes)
        found.append((first.value, first.error))
    values, errors = np.array(found).T
    assert 0.8 < errors.mean() / values.std() < 1.3


def test_a_share_of_one_has_an_error() -> None:
    """All 90 real images are recalled: adding two successes and two failures makes 92 of 94 (Agresti & Coull 1998)."""
    real = normal(90, seed=1)
    found = by_name(score_features("pixels", np.tile(real, (4, 1))[:300], real))
    assert found["recall-pixels"].value == 1
    assert found["recall-pixels"].error == pytest.approx((92 / 94 * 2 / 94 / 94) ** 0.5)


def test_pairs_use_only_the_first_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_scores, "MAX_PAIRWISE", 50)
    found = by_name(score_features("pixels", normal(100), normal(80, seed=1)))
    few = by_name(score_features("pixels", normal(50), normal(50, seed=1)))
    assert (found["FID-pixels"].n, found["FID-pixels"].n_real) == (100, 80)
    assert {s.n for name, s in found.items() if name != "FID-pixels"} == {50}
    again = by_name(score_features("pixels", normal(100)[:50], normal(80, seed=1)[:50]))
    assert again["KID-pixels"] == found["KID-pixels"]
    assert few.keys() == found.keys()


def test_too_few_images_are_a_one_line_error() -> None:
    with pytest.raises(UserError, match="12 generated and 90 real images"):
        score_features("pixels", normal(12), normal(90))
