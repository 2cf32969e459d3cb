"""A net of some thousand weights, for tests of what is done with a net."""

from ddpm.config import Config, override

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
