"""Augmentation: each transformation is the one that the net is told of, and without any an image keeps its bits."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.diffusion.augmentation import CONDITIONS, augment, augmented
from ddpm.diffusion.objectives import Loss
from ddpm.utils.generators import PhiloxGenerator

X_0 = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Chosen:
    """Applies one of the five transformations to all images, with given numbers."""

    def __init__(self, which: int, turn: float = 0.0, normal: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        self._which = which
        self._turn = turn
        self._normal = torch.tensor(normal)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) == 1:
            return torch.full(tuple(shape), self._turn)
        return (torch.arange(5) != self._which).float().expand(*shape)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._normal.expand(*shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("generator", "wanted", "conditions"),
    [
        (Chosen(0), X_0.flip(3), [1, 0, 0, 0, 0, 0, 0]),
        (Chosen(1), X_0.flip(2), [0, 1, 0, 0, 0, 0, 0]),
        (Chosen(3, turn=0.25), X_0.rot90(-1, (2, 3)), [0, 0, 0, -1, 1, 0, 0]),
        (Chosen(3, turn=0.5), X_0.flip(2, 3), [0, 0, 0, -2, 0, 0, 0]),
        (Chosen(4, normal=(9, 1, 0)), F.pad(X_0, (2, 0, 0, 0), "reflect")[..., :16], [0, 0, 0, 0, 0, 1, 0]),
    ],
    ids=["left-right", "top-bottom", "quarter turn", "half turn", "shift"],
)
def test_a_transformation_of_known_result(generator: Chosen, wanted: Tensor, conditions: list[float]) -> None:
    changed, told = augment(X_0, 0.5, generator)
    inside = (..., slice(None), slice(4, None))  # reflected edges repeat the outermost pixels
    torch.testing.assert_close(changed[inside], wanted[inside], atol=2e-5, rtol=0)
    torch.testing.assert_close(told, torch.tensor(conditions).float().expand(3, 7), atol=1e-6, rtol=0)


def test_a_scale_of_two_shows_the_middle() -> None:
    changed, told = augment(X_0, 0.5, Chosen(2, normal=(5, 9, 9)))  # 2 ** (0.2 * 5)
    twice = F.interpolate(X_0[..., 4:12, 4:12], scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(changed[..., 1:-1, 1:-1], twice[..., 1:-1, 1:-1], atol=2e-5, rtol=0)
    assert told.tolist() == [[0, 0, 5, 0, 0, 0, 0]] * 3


def test_each_is_applied_as_often_as_asked_for_independently() -> None:
    x_0 = torch.zeros(20_000, 1, 1, 1)
    _, told = augment(x_0, 0.12, PhiloxGenerator(1))
    applied = (told[:, [0, 1, 2, 3, 5]] != 0).double()
    assert (applied.mean(0) - 0.12).abs().max() < 4 * math.sqrt(0.12 * 0.88 / 20_000)
    off_diagonal = torch.corrcoef(applied.T) - torch.eye(5)
    assert off_diagonal.abs().max() < 4 / math.sqrt(20_000)
    assert told[:, 2][told[:, 2] != 0].std() == pytest.approx(1, abs=0.1)


def test_an_image_to_which_nothing_is_done_keeps_its_bits() -> None:
    x_0 = X_0.repeat(100, 1, 1, 1)
    changed, told = augment(x_0, 0.12, PhiloxGenerator(2))
    same = (told == 0).all(1)
    assert 0 < same.sum() < len(x_0)
    assert torch.equal(changed[same], x_0[same])
    assert not any(torch.equal(a, b) for a, b in zip(changed[~same], x_0[~same], strict=True))


def test_the_model_is_told_and_without_augmentation_nothing_is_between() -> None:
    seen = list[Tensor]()

    def model(x_t: Tensor, t: Tensor | None, label: Tensor | None, augmented: Tensor) -> Tensor:
        seen.append(augmented)
        return x_t

    def loss(model, x_0, label, generator, progress) -> Loss:
        model(x_0, None, label)
        return Loss(x_0.mean(), x_0.mean(), torch.tensor(progress))

    assert augmented(loss, 0.0) is loss
    value, _, progress = augmented(loss, 1.0)(model, X_0, None, PhiloxGenerator(3), 0.25)
    assert seen[0].shape == (3, CONDITIONS) and (seen[0] != 0).all()
    assert value != X_0.mean() and progress == 0.25
