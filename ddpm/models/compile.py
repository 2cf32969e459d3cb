"""Compilation by region: the blocks of a net are compiled, not the whole net.

Blocks of equal shapes share their code: of a net with 22 blocks of 11 shapes 11 blocks are compiled, which takes less
time than one graph of all of them. What is between the blocks runs as it is. This is what PyTorch's recipe calls
regional compilation, https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.
"""

import torch
from torch import nn

VARIANTS = 12
"""Variants of a block: passes are halved until they fit into a GPU's memory, the last pass of a step may have fewer
images, and a pass of an objective may have no gradients."""


class Region:
    """A base class of a net's blocks that marks them: each is compiled by itself."""


def compile_blocks(net: nn.Module) -> None:
    """Compile the blocks of `net` in place, at their first call; a net without a `Region` as a whole.

    Each shape has its own code (dynamic=False): else PyTorch would take the second block's width for a size that
    changes from call to call. All of them count toward one limit, which is raised to hold them.
    """
    blocks = [module for module in net.modules() if isinstance(module, Region)]
    limits = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)
    if not blocks:
        net.compile()
