"""The exponential moving average of a net's weights, which samples are drawn from.

Averaged weights make much better samples than the last ones (Song and Ermon 2020, arXiv:2006.09011; Ho et al.
2020, arXiv:2006.11239, Appendix B: decay 0.9999). The average is warmed up; otherwise the random initial weights
stay in it for about 1 / (1 - decay) steps, and early samples are noise.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The averaged weights, as a net to evaluate: `ema.net`, in eval mode, without gradients.

    Every rank keeps one. Weights are equal on all ranks after each step, so the averages are too, without
    communication, and every rank can sample.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        """Start the average at the weights of `net`, the bare net in training, whose device and dtype it keeps.

        `decay`, in [0, 1), is the share of the old average that a step keeps once warm.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1)")
        self.decay = decay
        self.net = deepcopy(net).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """min(decay, (1 + step) / (10 + step)): 0.1 at step 0, 0.9 at step 80, and at most `decay`."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """average <- decay_at(step) * average + (1 - decay_at(step)) * weights; buffers are copied.

        `net` is the net given at the start, after an optimizer step; `step` counts from 0.
        """
        average = get_ema_multi_avg_fn(self.decay_at(step))
        average(list(self.net.parameters()), list(net.parameters()), step)
        for ours, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            ours.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the names of the net's weights."""
        return self.net.state_dict()
