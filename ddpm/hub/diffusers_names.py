"""The names of our U-Net's weights in diffusers' UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpm.config import UNetConfig


def diffusers_names(config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Map each weight of a time-conditional `UNet` to the weights of UNet2DModel that it consists of.

    Usually one. Where our net merges several products into one (q, k, v; the shifts of all blocks), its weight is the
    concatenation of theirs along the first axis, in this order. Every weight of either net appears exactly once.
    """
    modules: dict[str, list[str]] = {"conv_in": ["conv_in"]}
    shifts: list[str] = []

    def add_block(ours: str, theirs: str, index: int, attention: bool, shortcut: bool) -> None:
        residual = f"{theirs}.resnets.{index}"
        for layer in ("norm", "conv"):
            modules[f"{ours}.{layer}_1"] = [f"{residual}.{layer}1"]
            modules[f"{ours}.{layer}_2"] = [f"{residual}.{layer}2"]
        if shortcut:
            modules[f"{ours}.shortcut"] = [f"{residual}.conv_shortcut"]
        shifts.append(f"{residual}.time_emb_proj")
        if attention:
            head = f"{theirs}.attentions.{index}"
            modules[f"{ours}.attention.norm"] = [f"{head}.group_norm"]
            modules[f"{ours}.attention.qkv"] = [f"{head}.to_{letter}" for letter in "qkv"]
            modules[f"{ours}.attention.project"] = [f"{head}.to_out.0"]

    last = len(config.width_multipliers) - 1
    multipliers = config.width_multipliers
    attention = [config.image_size >> level in config.attention_resolutions for level in range(last + 1)]

    layer = 0
    for level in range(last + 1):
        for index in range(config.blocks_per_resolution):
            widens = index == 0 and level > 0 and multipliers[level] != multipliers[level - 1]
            add_block(f"down.{layer}", f"down_blocks.{level}", index, attention[level], shortcut=widens)
            layer += 1
        if level < last:
            modules[f"down.{layer}.conv"] = [f"down_blocks.{level}.downsamplers.0.conv"]
            layer += 1

    add_block("middle.0", "mid_block", 0, config.middle_attention, shortcut=False)
    add_block("middle.1", "mid_block", 1, False, shortcut=False)

    layer = 0
    for level in range(last + 1):
        for index in range(config.blocks_per_resolution + 1):
            add_block(f"up.{layer}", f"up_blocks.{level}", index, attention[last - level], shortcut=True)
            layer += 1
        if level < last:
            modules[f"up.{layer}.conv"] = [f"up_blocks.{level}.upsamplers.0.conv"]
            layer += 1

    modules |= {
        "norm_out": ["conv_norm_out"],
        "conv_out": ["conv_out"],
        "time_mlp.0": ["time_embedding.linear_1"],
        "time_mlp.2": ["time_embedding.linear_2"],
        "shifts": shifts,
    }
    names = {
        f"{ours}.{kind}": tuple(f"{module}.{kind}" for module in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    if config.num_classes:
        names["label_embedding.weight"] = ("class_embedding.weight",)
    return names
