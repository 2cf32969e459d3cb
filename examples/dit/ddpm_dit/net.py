"""The diffusion Transformer (DiT) for small images: it predicts eps (or x_0, or v) from x_t, as the U-Net does.

Peebles and Xie 2022 (arXiv:2212.09748): the image is cut into patches, each patch becomes a token, and Transformer
blocks attend among all tokens. t and label reach a block through its layer normalisations (adaLN-Zero): from their
embedding it computes a shift, a scale and a gate for both of its branches. The layers that compute them start at zero,
so that every block is then the identity, and the output is 0.

Axes: B batch, C channels, H W pixels, p side of a patch, N = H W / p^2 tokens, E width of a token.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.models.compile import Region
from ddpm.models.dropout import Dropout
from ddpm.models.layers import (
    EMBEDDED_TIMESTEPS,
    MAX_BLOCKS,
    MAX_SIZE,
    Requirement,
    attend,
    check_conditions,
    check_sizes,
    sinusoids,
    zero,
)
from ddpm.models.precision import autocast
from ddpm_dit.config import DiTConfig

SINUSOID_WIDTH = 256
NORM_EPS = 1e-6


class DiT(nn.Module):
    """The whole net, with fresh weights drawn from torch's global generator; arguments as in `UNet`."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        time_conditional: bool = True,
        autocast_dtype: torch.dtype | None = None,
        num_timesteps: int = EMBEDDED_TIMESTEPS,
        out_channels: int | None = None,
        num_conditions: int = 0,
    ) -> None:
        check_sizes(config, num_timesteps, _requirements(config))
        super().__init__()
        self.time_conditional = time_conditional
        self.num_classes = config.num_classes
        self.num_conditions = num_conditions
        self.autocast_dtype = autocast_dtype
        self.time_scale = EMBEDDED_TIMESTEPS / num_timesteps
        self.patch_size = config.patch_size
        width = config.width
        pixels = config.patch_size**2
        self.embed = nn.Linear(pixels * config.channels, width)
        # A condition that is not used has no weights: DDP would wait for their gradients.
        if time_conditional:
            self.time_mlp = nn.Sequential(
                nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width)
            )
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, pixels * (out_channels or config.channels))
        self.apply(_init)
        if num_conditions:
            self.augment_embedding = nn.Linear(num_conditions, width, bias=False)
        zero(self.modulation)
        zero(self.project)

    def forward(
        self, x_t: Tensor, t: Tensor | None, label: Tensor | None = None, augmented: Tensor | None = None
    ) -> Tensor:
        """The net's prediction for each image; arguments, result and errors as in `UNet.forward`."""
        label, augmented = check_conditions(self, x_t, t, label, augmented)
        rows, columns = (side // self.patch_size for side in x_t.shape[2:])
        with autocast(x_t.device, self.autocast_dtype):
            width = self.embed.out_features
            condition = x_t.new_zeros(x_t.shape[0], width)  # len(x_t) would fix the batch in torch.export
            if t is not None:
                condition = condition + self.time_mlp(sinusoids(t * self.time_scale, SINUSOID_WIDTH))
            if label is not None:
                condition = condition + self.label_embedding(label)
            if augmented is not None:
                condition = condition + self.augment_embedding(augmented)
            condition = F.silu(condition)  # [B, E]
            tokens = self.embed(patchify(x_t, self.patch_size)) + positions(rows, columns, width, x_t.device)
            for block in self.blocks:
                tokens = block(tokens, condition)
            shift, scale = self.modulation(condition)[:, None].chunk(2, dim=2)
            tokens = self.project(_modulated(tokens, shift, scale))
        return unpatchify(tokens.float(), self.patch_size, rows)


class Block(nn.Module, Region):
    """Attention among the tokens, then an MLP on each; [B, N, E] -> the same. Peebles and Xie 2022, Fig. 3."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        hidden = config.width * config.mlp_ratio
        self.head_dim = width // config.num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            Dropout(config.dropout),
            nn.Linear(hidden, width),
        )

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(
            6, dim=2
        )
        qkv = self.qkv(_modulated(tokens, shift_1, scale_1)).unflatten(2, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        tokens = tokens + gate_1 * self.project(attend(q, k, v).transpose(1, 2).flatten(2))
        return tokens + gate_2 * self.mlp(_modulated(tokens, shift_2, scale_2))


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images into patches, row by row: [B, C, H, W] -> [B, N, C p p]."""
    grid = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, H / p, p, W / p, p]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, p: int, rows: int) -> Tensor:
    """The inverse of `patchify`, for images of H = rows * p: [B, N, C p p] -> [B, C, H, W]."""
    grid = tokens.unflatten(2, (-1, p, p)).unflatten(1, (rows, -1))  # [B, H / p, W / p, C, p, p]
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Position embeddings, sinusoids of a token's row (one half) and of its column: float32 [N, E]."""
    row, column = (sinusoids(torch.arange(n, device=device), width // 2) for n in (rows, columns))
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1)


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation of each token [B, N, E], with given shift and scale [B, 1, E]."""
    return F.layer_norm(tokens, tokens.shape[2:], eps=NORM_EPS) * (1 + scale) + shift


def _init(module: nn.Module) -> None:
    """Initialise as the authors do: Xavier for products, small numbers for labels, zero for a block's modulation.

    `Module.apply` visits a block after the layers in it.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Block):
        zero(module.modulation)


build = DiT


def _requirements(c: DiTConfig) -> Iterator[Requirement]:
    large = f"at least 1, and at most {MAX_SIZE}"
    yield "patch_size", 1 <= c.patch_size <= MAX_SIZE, large
    yield "depth", 1 <= c.depth <= MAX_BLOCKS, f"at least 1, and at most {MAX_BLOCKS}"
    yield "width", c.width % 4 == 0 and 8 <= c.width <= MAX_SIZE, f"a multiple of 4, from 8 to {MAX_SIZE}"
    yield "mlp_ratio", 1 <= c.mlp_ratio <= MAX_SIZE // c.width, f"1 to {MAX_SIZE // c.width}"
    divides = c.num_heads >= 1 and c.width % c.num_heads == 0
    yield "num_heads", divides, f"a divisor of width, {c.width}"
    multiple = f"a multiple of patch_size, {c.patch_size}, and at most {MAX_SIZE}"
    yield "image_size", 1 <= c.image_size <= MAX_SIZE and c.image_size % c.patch_size == 0, multiple
