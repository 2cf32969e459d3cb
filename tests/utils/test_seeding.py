"""Counter-based random numbers: the same counters give the same run, on any machine and in any version."""

import pytest
import torch

from ddpm.utils.generators import PerMicroBatch, PhiloxGenerator, TorchGenerator, generator
from ddpm.utils.seeding import Purpose, key, torch_seed

CPU = torch.device("cpu")


def test_streams_never_change_between_versions() -> None:
    """A run can be resumed after an upgrade of this project or of NumPy: these numbers must not change."""
    assert key(0) == 144831499309457368979394674105665208338
    assert key(0, 1, 2, 3) == 63407688129533460527905472793373798608
    numbers = PhiloxGenerator(0, Purpose.SAMPLE, 7)
    assert numbers.normal([3]).tolist() == [1.2535868883132935, 0.9168907403945923, -0.16425767540931702]
    assert numbers.uniform([2]).tolist() == [0.8639244437217712, 0.9025437235832214]
    assert numbers.integers(1000, [4]).tolist() == [362, 950, 299, 464]


def test_keys_depend_on_value_order_length_and_width_of_counters() -> None:
    counters = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    counters += [(2,), (2, 0), (2, 0, 0, 0), (5 + 2**32,), (5, 1), (-1,), (1,), (12, 3), (1, 23), (123,)]
    keys = {key(*some) for some in counters}
    assert len(keys) == len(counters)
    assert all(0 <= one < 2**128 for one in keys) and max(keys) > 2**120


def test_a_stream_depends_only_on_its_counters() -> None:
    first, again, other = (generator(CPU, 0, i).normal([64]) for i in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_draws_of_a_micro_batch_do_not_depend_on_other_batches() -> None:
    def draws(*micro_batches: int) -> list[torch.Tensor]:
        noise = PerMicroBatch([generator(CPU, 0, i) for i in micro_batches], 2)
        n = 2 * len(micro_batches)
        return [noise.uniform([n]), noise.integers(9, [n]), noise.normal([n, 1, 4, 4], torch.float64)]

    for together, *alone in zip(draws(3, 1, 4), draws(3), draws(1), draws(4), strict=True):
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", [PhiloxGenerator, TorchGenerator])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_the_right_distribution(kind: type, dtype: torch.dtype) -> None:
    numbers = kind(3, device=CPU)
    normal = numbers.normal([40_000], dtype)
    uniform = numbers.uniform([40_000], dtype)
    whole = numbers.integers(7, [40_000])
    assert normal.dtype == uniform.dtype == dtype and whole.dtype == torch.int64
    moments = [normal.mean(), normal.var() - 1, normal.pow(3).mean(), normal.pow(4).mean() - 3]
    assert all(abs(m) < 5 * (s / 40_000) ** 0.5 for m, s in zip(moments, (1, 2, 15, 96), strict=True))
    assert 0 <= uniform.min() < 1e-3 and 1 - 1e-3 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 40_000) ** 0.5
    counts = torch.bincount(whole, minlength=7)
    assert len(counts) == 7 and (counts - 40_000 / 7).abs().max() < 5 * (40_000 / 7) ** 0.5
    assert numbers.uniform([]).shape == () and numbers.normal([2, 3]).shape == (2, 3)


def test_a_uniform_number_is_never_one() -> None:
    """A float64 just below 1 would round to 1 as a float32; multiples of 2^-24 below 1 do not."""
    u = PhiloxGenerator(0).uniform([2_000_000])
    assert u.max() < 1 and torch.equal(u * 2**24, (u * 2**24).round())


def test_pytorch_gets_64_bit_seeds() -> None:
    seeds = {torch_seed(0, Purpose.DROPOUT, step) for step in range(1000)}
    assert len(seeds) == 1000 and 2**63 < max(seeds) < 2**64
    for seed in seeds:
        torch.Generator().manual_seed(seed)
