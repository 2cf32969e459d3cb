"""Muon: the orthogonal factor, convolutions, and PyTorch's own Muon."""

import pytest
import torch
from torch import nn

from ddpm.build import build_net
from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.training.optimizers import Muon, build, matrices, orthogonal


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_the_orthogonal_factor_has_the_same_vectors_and_singular_values_near_1(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    among_them = left.mT @ orthogonal(matrix) @ right.mT
    values = among_them.diagonal(dim1=1, dim2=2)
    assert (
        values.min() > 0.5 and values.max() < 1.3
    )  # but for a value of almost 0, which 5 iterations do not lift
    assert (among_them - torch.diag_embed(values)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_a_matrix_takes_the_steps_of_pytorchs_muon(shape: tuple[int, int]) -> None:
    start = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    ours = [nn.Parameter(weight.clone()) for weight in start]
    theirs = [nn.Parameter(weight.clone()) for weight in start]
    muon = Muon(ours, lr=0.1, weight_decay=0.2, dtype=torch.bfloat16)
    muon.found_inf = torch.zeros(())
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            for weight in pair:
                weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + i))
        muon.step()
        reference.step()
    for our, their, before in zip(ours, theirs, start, strict=True):
        assert (our - their).norm() < 0.01 * (our - before).norm()  # bfloat16 has 8 bits


def test_a_convolution_takes_the_steps_of_its_matrix_in_either_memory_format() -> None:
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    after = []
    for change in (
        torch.Tensor.contiguous,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.flatten(1),
    ):
        weight = nn.Parameter(change(start).clone())
        weight.grad = change(gradient)
        muon = Muon([weight], lr=0.1, weight_decay=0.0, dtype=torch.float32)
        muon.found_inf = torch.zeros(())
        muon.step()
        after.append(weight.detach().reshape(6, -1))
    assert torch.equal(after[0], after[1])
    torch.testing.assert_close(after[0], after[2])
    rms = (after[0] - start.flatten(1)).square().mean().sqrt()
    assert rms == pytest.approx(0.1 * 0.2, rel=0.2)  # as AdamW's


def test_every_weight_has_one_optimizer(tiny: Config) -> None:
    net = build_net(override(tiny, {"model.num_classes": 10, "optim.kind": "muon"}))
    adamw, muon = build(override(tiny, {"optim.kind": "muon"}), net)
    of_each = [{id(weight) for weight in o.param_groups[0]["params"]} for o in (adamw, muon)]
    assert of_each[0].isdisjoint(of_each[1])
    assert of_each[0] | of_each[1] == {id(weight) for weight in net.parameters()}
    kept = {name for name, weight in net.named_parameters() if weight.ndim > 1 and id(weight) in of_each[0]}
    assert kept == {"label_embedding.weight"}
    assert len(build(tiny, net)) == 1
    assert all(weight.ndim in (2, 4) for weight in matrices(net))
