"""A net with a few thousand weights, for tests that need any net."""

from ddpm.config.json import override
from ddpm.config.tree import Config

TINY_NET = override(
    Config(),
    {
        "model.image_size": 8,
        "model.channels": 1,
        "model.base_width": 8,
        "model.width_multipliers": [1, 2],
        "model.attention_resolutions": [4],
        "model.blocks_per_resolution": 1,
        "model.norm_groups": 4,
    },
)
