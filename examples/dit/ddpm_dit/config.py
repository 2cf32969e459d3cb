"""The fields of the diffusion Transformer, which are flags, and what the entry point returns; without PyTorch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ddpm.config.kinds import Choice, Kind
from ddpm.config.tree import ModelConfig, PositiveInt

KIND = Kind("ddpm_dit.config:DiTConfig")


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """The diffusion Transformer."""

    module = "ddpm_dit.net"
    net: Annotated[Literal["dit"], Choice("model.net")] = "dit"
    patch_size: PositiveInt = 2
    """Side of a patch; each patch is one token."""
    width: PositiveInt = 128
    """Width of a token."""
    depth: PositiveInt = 4
    """Number of blocks."""
    num_heads: PositiveInt = 4
    """Attention heads per block."""
    mlp_ratio: PositiveInt = 4
    """Width of the hidden layer of a block's MLP, as a multiple of width."""
