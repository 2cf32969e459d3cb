"""Rankings with known answers."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ddpm.evaluation.ranking import Rank, configuration_difference, configuration_ranks, paired_ranks, ranks


def test_distant_values_have_no_ties() -> None:
    assert ranks([3.0, 1.0, 2.0], [0.01, 0.01, 0.01]) == [Rank(3, 3), Rank(1, 1), Rank(2, 2)]


def test_values_without_significant_difference_are_ties() -> None:
    # z of neighbours 1.77, p 0.077; of the outer two 3.54, p 0.0004, below 0.05 / 3: Holm's first step
    assert ranks([1.0, 1.1, 1.2], [0.04, 0.04, 0.04]) == [Rank(1, 2), Rank(1, 3), Rank(2, 3)]
    assert [str(rank) for rank in ranks([1.0, 5.0], [0.1, 0.1])] == ["1", "2"]
    assert [str(rank) for rank in ranks([1.0, 1.0], [0.1, 0.1])] == ["1-2", "1-2"]
    assert ranks([], []) == [] and ranks([1.0], [0.1]) == paired_ranks([[1.0, 2.0]]) == [Rank(1, 1)]


def test_holm_s_step_down_procedure() -> None:
    # z 2.26, 2.40 and 4.67 of errors hypot(1, 1): p 0.0236, 0.0162 and 3e-6. Holm's bounds are 0.05 / 3, 0.05 / 2 and
    # 0.05, so all three differ; by Bonferroni's, 0.05 / 3 for each, the first pair would be a tie.
    root = 2**0.5
    assert ranks([0.0, 2.264 * root, 4.668 * root], [1.0] * 3) == [Rank(1, 1), Rank(2, 2), Rank(3, 3)]
    # of two numbers alone z = 1.97 is a difference, and beside a third that is equal to the second it is none
    assert ranks([0.0, 1.97 * root], [1.0] * 2) == [Rank(1, 1), Rank(2, 2)]
    assert ranks([0.0, 1.97 * root, 1.97 * root], [1.0] * 3) == [Rank(1, 3)] * 3


def test_paired_differences_use_student_s_t() -> None:
    """Five differences: p is 0.048 and 0.052 by Student's t; by a normal distribution it would be 0.005 and 0.006."""
    difference = np.array([0.1, 1.0, 1.5, 2.0, 0.4])
    assert paired_ranks([difference - 0.02, np.zeros(5)]) == [Rank(2, 2), Rank(1, 1)]
    assert paired_ranks([difference - 0.05, np.zeros(5)]) == [Rank(1, 2)] * 2


def test_paired_differences_cancel_the_difficulty_of_images() -> None:
    """Images differ by 1 bit, the two trials by 0.05: only a paired comparison can detect that."""
    rng = np.random.default_rng(0)
    image = rng.normal(3, 1, 200)
    values = [image, image + 0.05 + rng.normal(0, 0.01, 200)]
    errors = [np.std(v) / 200**0.5 for v in values]
    assert ranks(np.mean(values, 1), errors) == [Rank(1, 2), Rank(1, 2)]
    assert paired_ranks(values) == [Rank(1, 1), Rank(2, 2)]
    assert paired_ranks([image, image]) == [Rank(1, 2), Rank(1, 2)]


def test_a_difference_of_configurations_is_tested_as_by_welch() -> None:
    """On images that do not differ; the spread of images adds to the error, and most degrees of freedom."""
    rng = np.random.default_rng(0)
    a = rng.normal(1.0, 0.1, (3, 1))
    b = rng.normal(1.4, 0.02, (5, 1))
    flat = [np.repeat(side, 200, 1) for side in (a, b)]
    right = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    difference, error, dof = configuration_difference(flat[0], flat[1])
    assert (difference / error, dof) == pytest.approx((right.statistic, right.df))
    assert configuration_difference(a, b) == pytest.approx((difference, error, dof))  # one number of each
    image = rng.normal(0, 2, 200)
    _, larger, more = configuration_difference(flat[0] + image, flat[1])
    assert larger**2 == pytest.approx(error**2 + image.var(ddof=1) / 200) and more > 10 * dof
    _, same, _ = configuration_difference(flat[0] + image, flat[1] + image)
    assert same == pytest.approx(error)


def test_configurations_that_differ_less_than_their_trainings_are_tied() -> None:
    """Nets of both differ significantly, the configurations do not; the third is far worse than either."""
    image = np.random.default_rng(0).normal(3, 1, 100)
    found = [np.array([image + mean + shift for shift in (-0.02, 0, 0.02)]) for mean in (0.0, 0.01, 1.0)]
    assert paired_ranks([each[0] for each in found]) == [Rank(1, 1), Rank(2, 2), Rank(3, 3)]
    assert configuration_ranks(found) == [Rank(1, 2), Rank(1, 2), Rank(3, 3)]
    assert configuration_ranks([found[0], found[0]]) == [Rank(1, 2)] * 2
    assert configuration_ranks([]) == [] and configuration_ranks(found[:1]) == [Rank(1, 1)]


def test_few_searches_of_equal_configurations_claim_a_difference() -> None:
    """Eight equal configurations, the best three trained twice more. Their nets nearly always differ."""
    rng = np.random.default_rng(0)
    image = rng.gamma(9, 1 / 3, 100)

    def net() -> NDArray[np.float64]:
        return image + rng.normal(0, 0.05) + rng.normal(0, 0.1, 100)

    claims = np.zeros(2)
    for _ in range(100):
        first = sorted((net() for _ in range(8)), key=lambda bits: float(bits.mean()))
        found = configuration_ranks([np.array([bits, net(), net()]) for bits in first[:3]])
        claims += paired_ranks(first) != [Rank(1, 8)] * 8, found != [Rank(1, 3)] * 3
    assert claims[0] > 90 and claims[1] <= 5
