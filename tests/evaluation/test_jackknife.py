"""Standard errors with known answers: those of means."""

import numpy as np
import pytest

from ddpm.evaluation.jackknife import GROUPS, error_of_groups, jackknife_error


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.RandomState(0).standard_normal(50)
    without = (x.sum() - x) / 49
    error = x.std(ddof=1) / 50**0.5
    assert jackknife_error(without) == pytest.approx(error)
    assert jackknife_error(without, 3 * without + 7) == pytest.approx(10**0.5 * error)
    several = jackknife_error(np.stack([without, 3 * without], axis=1))
    np.testing.assert_allclose(several, [error, 3 * error])


def error_of_difference(generated: np.ndarray, real: np.ndarray, label: np.ndarray | None) -> float:
    """The standard error of the difference of two means."""

    def difference(rows: np.ndarray | None, real_rows: np.ndarray | None) -> float:
        left = generated if rows is None else generated[rows]
        right = real if real_rows is None else real[real_rows]
        return float(left.mean() - right.mean())

    return float(error_of_groups(difference, len(generated), len(real), label))


@pytest.mark.parametrize("is_labelled", [True, False])
def test_the_error_of_groups_is_that_of_redrawing_both_samples(is_labelled: bool) -> None:
    """If each image has a given class, the error excludes the spread between classes."""
    noise = np.random.RandomState(0)
    variances = []
    for _ in range(200):
        label = np.arange(200) % 10 if is_labelled else noise.randint(10, size=200)
        generated = 5 * label + noise.standard_normal(200)
        real = 2 * noise.standard_normal(100)
        error = error_of_difference(generated, real, label if is_labelled else None)
        variances.append(error**2)
    within_classes = 1 / 200
    between_classes = 0 if is_labelled else 25 * np.arange(10).var() / 200
    of_real = 4 / 100
    assert np.mean(variances) == pytest.approx(within_classes + between_classes + of_real, rel=0.1)


def test_the_same_images_are_left_out_each_time() -> None:
    left: list[np.ndarray] = []

    def record(rows: np.ndarray | None, real_rows: np.ndarray | None) -> float:
        left.append(np.arange(23) if rows is None else rows)
        return 0.0

    for _ in range(2):
        error_of_groups(record, 23, 20)
    half = len(left) // 2
    assert half == 2 * GROUPS
    for first, second in zip(left[:half], left[half:], strict=True):
        np.testing.assert_array_equal(first, second)
    dropped = np.concatenate([np.setdiff1d(np.arange(23), rows) for rows in left[:GROUPS]])
    assert sorted(dropped) == list(range(23))
