"""Compilation by region: the blocks of a net are compiled, not the whole net.

Blocks of equal shapes share their code: of a net with 22 blocks of 11 shapes 11 blocks are compiled, which takes less
time than one graph of all of them. What is between the blocks runs as it is. This is what PyTorch's recipe calls
regional compilation, https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.
"""

import torch
from torch import nn

from ddpm.models import dit, layers

BLOCKS = (layers.ResidualBlock, dit.Block)
VARIANTS = 4
"""Variants of a block: the last pass of a step may have fewer images, a pass of consistency may have no gradients."""


def compile_blocks(net: nn.Module) -> None:
    """Compile the blocks of `net` in place, at their first call; a net without `BLOCKS` as a whole.

    Each shape has its own code (dynamic=False): else PyTorch would take the second block's width for a size that
    changes from call to call. All of them count toward one limit, which is raised to hold them.
    """
    blocks = [module for module in net.modules() if isinstance(module, BLOCKS)]
    limits = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)
    if not blocks:
        net.compile()
