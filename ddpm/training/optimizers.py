"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): steps of equal size in all directions of a matrix.

Each matrix moves along the nearest semi-orthogonal matrix to its momentum. Convolutions [out, in, h, w] are matrices
[out, in h w] (arXiv:2510.19376). Against AdamW: benchmarks/optimizers.md. torch.optim.Muon takes neither convolutions
nor the flag of a bad step.

Axes: K weights of one shape, m n of a matrix.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ddpm.config.tree import Config

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of an iteration of `orthogonal`: the steepest at 0 that stays near 1 (Jordan et al. 2024)."""
ITERATIONS = 5
AS_ADAMW = 0.2
"""Root mean square of AdamW's updates at learning rate 1, so that one rate suits both (arXiv:2502.16982)."""


def build(config: Config, net: nn.Module) -> list[Optimizer]:
    """The optimizers of all weights of `net`: AdamW, and with optim.kind "muon" `Muon` for its matrices."""
    ours = matrices(net) if config.optim.kind == "muon" else []
    taken = set(map(id, ours))
    rest = [weight for weight in net.parameters() if id(weight) not in taken]
    optim = config.optim
    adamw = AdamW(
        rest, lr=optim.lr, betas=(optim.beta_1, optim.beta_2), weight_decay=optim.weight_decay, fused=True
    )
    dtype = getattr(torch, config.train.precision)
    if not ours:
        return [adamw]
    return [adamw, Muon(ours, optim.lr, optim.weight_decay, dtype)]


def matrices(net: nn.Module) -> list[Tensor]:
    """Weights of the convolutions and linear layers of `net`; embeddings, norms and biases are not among them."""
    layers = (module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return list(dict.fromkeys(layer.weight for layer in layers))


class Muon(Optimizer):
    """Muon with Nesterov momentum, for weights of two dimensions or more.

    `found_inf`, a [] tensor that is 1 for a bad step, leaves weights and momentum as they are, as it does for AdamW.
    """

    found_inf: Tensor

    def __init__(self, weights: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step; weights of one shape take it together."""
        group = self.param_groups[0]
        good = self.found_inf == 0
        kept = torch.where(good, 1 - group["lr"] * group["weight_decay"], 1.0)
        by_shape = defaultdict[torch.Size, list[Tensor]](list)
        for weight in group["params"]:
            by_shape[weight.shape].append(weight)
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        for weights in by_shape.values():
            momenta = [self.state[weight]["momentum"] for weight in weights]
            # A layer that has no part in the loss has no gradient.
            gradient = _as_matrices([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
            before = _as_matrices(momenta)
            after = before.lerp(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(after, MOMENTUM).to(self._dtype)).to(after.dtype)
            update *= group["lr"] * AS_ADAMW * max(update.shape[1:]) ** 0.5
            _from_matrices(torch.where(good, after, before), momenta, torch.Tensor.copy_)
            for weight in weights:
                weight.mul_(kept)
            _from_matrices(torch.where(good, update, 0), weights, torch.Tensor.sub_)


def _as_matrices(weights: list[Tensor]) -> Tensor:
    """Weights [out, in, h, w] as [K, out, h w in]: a convolution's memory is channels-last."""
    return torch.stack([weight.movedim(1, -1).flatten(1) for weight in weights])


def _from_matrices(
    matrices: Tensor, weights: list[Tensor], assign: Callable[[Tensor, Tensor], Tensor]
) -> None:
    for weight, matrix in zip(weights, matrices, strict=True):
        last = weight.movedim(1, -1)
        assign(last, matrix.view(last.shape))


def orthogonal(matrix: Tensor) -> Tensor:
    """Matrices [K, m, n] with the same singular vectors and all singular values near 1, by Newton and Schulz."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[1] > matrix.shape[2]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


STATE: dict[type[Optimizer], tuple[str, ...]] = {
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What an optimizer keeps of each weight: a count of steps, and averages in the weight's shape."""
