"""Who is better than whom: known answers."""

import math

import numpy as np

from ddpm.evaluation.ranking import Rank, agreement, paired_ranks, ranks


def test_far_apart_there_are_no_ties() -> None:
    assert ranks([3.0, 1.0, 2.0], [0.01, 0.01, 0.01]) == [Rank(3, 3), Rank(1, 1), Rank(2, 2)]


def test_overlapping_intervals_are_a_tie() -> None:
    # 1.0 and 1.1 overlap, 1.1 and 1.2 do, 1.0 and 1.2 do not
    assert ranks([1.0, 1.1, 1.2], [0.04, 0.04, 0.04]) == [Rank(1, 2), Rank(1, 3), Rank(2, 3)]
    assert [str(rank) for rank in ranks([1.0, 5.0], [0.1, 0.1])] == ["1", "2"]
    assert [str(rank) for rank in ranks([1.0, 1.0], [0.1, 0.1])] == ["1-2", "1-2"]


def test_what_an_image_costs_everybody_drops_out_of_pairs() -> None:
    """Images differ by 1 bit, the two by 0.05: only image by image can that be told."""
    rng = np.random.default_rng(0)
    image = rng.normal(3, 1, 200)
    values = [image, image + 0.05 + rng.normal(0, 0.01, 200)]
    errors = [np.std(v) / 200**0.5 for v in values]
    assert ranks(np.mean(values, 1), errors) == [Rank(1, 2), Rank(1, 2)]
    assert paired_ranks(values) == [Rank(1, 1), Rank(2, 2)]
    assert paired_ranks([image, image]) == [Rank(1, 2), Rank(1, 2)]


def test_paired_ranks_are_seldom_sure_of_what_is_equal() -> None:
    """Of two that differ by noise alone, one is called better in 5 % of all cases."""
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(400):
        wrong += paired_ranks(rng.normal(0, 1, (2, 50)))[0] != Rank(1, 2)
    assert 0.02 < wrong / 400 < 0.09


def test_agreement() -> None:
    a = [1.0, 2.0, 3.0, 4.0]
    assert agreement(a, a) == (1, 1)
    assert agreement(a, a[::-1]) == (-1, -1)
    # ranks 1 2 4 3: rho = 1 - 6 * 2 / (4 * 15), tau = (5 - 1) / 6
    found = agreement(a, [1.0, 2.0, 4.0, 3.0])
    assert math.isclose(found.spearman, 0.8) and math.isclose(found.kendall, 2 / 3)
    assert math.isnan(agreement(a, [1.0] * 4).spearman) and math.isnan(agreement([1.0], [2.0]).kendall)
