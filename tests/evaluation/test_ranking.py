"""Rankings with known answers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm.evaluation.ranking import Rank, paired_ranks, ranks


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


def searches(num_images: int, num: int, lead: float = 0.0) -> list[NDArray[np.float64]]:
    """Searches of [16, M]: trials share the difficulty of images, not the noise; the first leads by `lead` errors."""
    rng, found = np.random.default_rng(1), []
    for _ in range(num):
        bits = rng.gamma(9, 1 / 3, num_images) + rng.normal(0, 0.3, (16, num_images))
        bits[0] -= lead * 0.3 * (2 / num_images) ** 0.5
        found.append(bits)
    return found


@pytest.mark.parametrize("num_images", [90, 512])
def test_equal_trials_rarely_show_a_difference(num_images: int) -> None:
    """16 equal trials: at most about 5 % of searches find any difference; without correction 85 % would."""
    claims = sum(paired_ranks(bits) != [Rank(1, 16)] * 16 for bits in searches(num_images, 2000))
    assert 0.02 < claims / 2000 <= 0.06


def test_equal_values_rarely_show_a_difference() -> None:
    rng = np.random.default_rng(2)
    errors = rng.uniform(0.5, 2, 16)
    claims = sum(ranks(rng.normal(0, errors), errors) != [Rank(1, 16)] * 16 for _ in range(2000))
    assert 0.02 < claims / 2000 <= 0.06


@pytest.mark.parametrize("num_images", [90, 512])
def test_a_real_difference_is_found(num_images: int) -> None:
    """The first is better than each of the others by 6 standard errors of the difference; 3.5 are required."""
    found = [paired_ranks(bits)[0] for bits in searches(num_images, 50, lead=6)]
    assert sum(rank == Rank(1, 1) for rank in found) >= 45
