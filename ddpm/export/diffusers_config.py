"""Our net in terms of diffusers: configs of its UNet2DModel and DDPMScheduler, to and from ours; names of weights.

A setting that the other side cannot express is refused; what is not named here has diffusers' default. Names: diffusers
0.35 to 0.42.
"""

import inspect
import itertools
import math
from collections.abc import Mapping
from typing import Any

from ddpm.build import build_schedule, resolve_sample
from ddpm.config.json import from_json, to_json
from ddpm.config.tree import Config, ObjectiveConfig, SampleConfig, ScheduleConfig, UNetConfig
from ddpm.models.layers import EMBEDDED_TIMESTEPS, NORM_EPS
from ddpm.utils.errors import UserError

PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
"""Ours -> diffusers'; v has the same sign in both."""
VARIANCES = {"beta_tilde": "fixed_small", "beta": "fixed_large", "learned": "learned_range"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Settings of a scheduler that concern only samplers that are not exported.
_SAMPLING_ALONE = ("timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value")


def unet_of(config: Config) -> UNetConfig:
    """The U-Net's config."""
    if not isinstance(config.model, UNetConfig):
        raise UserError(
            f"model.net is {config.model.net}; a DDPMPipeline of diffusers has a UNet2DModel, so only the net unet "
            "can become one; use examples/torch_export"
        )
    return config.model


def unet_config(config: Config) -> dict[str, Any]:
    """The arguments with which UNet2DModel computes what our net computes, but for its defaults."""
    model = unet_of(config)
    stretched = config.schedule.num_timesteps != EMBEDDED_TIMESTEPS
    assert model.num_classes == 0, "labels are folded into a bias before"
    sizes = [model.image_size >> level for level in range(len(model.width_multipliers))]
    attention = ["Attn" if size in model.attention_resolutions else "" for size in sizes]
    return {
        "sample_size": model.image_size,
        "in_channels": model.channels,
        "out_channels": model.channels * (2 if config.objective.variance == "learned" else 1),
        "time_embedding_type": "learned" if stretched else "positional",
        "num_train_timesteps": config.schedule.num_timesteps if stretched else None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": [f"{kind}DownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(attention)],
        "block_out_channels": [model.base_width * multiplier for multiplier in model.width_multipliers],
        "layers_per_block": model.blocks_per_resolution,
        "downsample_padding": 0,
        "dropout": model.dropout,
        "attention_head_dim": model.attention_head_dim,
        "norm_num_groups": model.norm_groups,
        "norm_eps": NORM_EPS,
        "add_attention": model.middle_attention,
    }


def scheduler_config(config: Config) -> dict[str, Any]:
    """The arguments of DDPMScheduler, but for its defaults: our schedule, prediction, and the mean and variance of
    `ancestral`."""
    schedule = config.schedule
    sample = resolve_sample(config.sample, config.objective)
    if config.objective.predict not in PREDICTIONS:
        raise UserError(
            f"objective.predict is {config.objective.predict}, which scales the net's input; a DDPMScheduler supports "
            f"{', '.join(PREDICTIONS)}; use examples/torch_export"
        )
    betas: dict[str, Any]
    match schedule.kind:
        case "linear" | "scaled_linear":
            betas = {"beta_schedule": SCHEDULES[schedule.kind]}
            betas |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        case "cosine" if (schedule.cosine_s, schedule.max_beta) == (0.008, 0.999):
            betas = {"beta_schedule": SCHEDULES["cosine"]}
        case _:
            betas = {"trained_betas": build_schedule(schedule).beta.tolist()}
    return {
        "num_train_timesteps": schedule.num_timesteps,
        **betas,
        "prediction_type": PREDICTIONS[config.objective.predict],
        "variance_type": VARIANCES[sample.variance],
        "clip_sample": sample.mean == "clipped",
        "clip_sample_range": config.data.x_0_max,
        "timestep_spacing": "linspace",  # with fewer than T steps both ends matter, as in timesteps.uniform
    }


def config_of(unet: Mapping[str, Any], scheduler: Mapping[str, Any], where: str) -> Config:
    """Our config for diffusers' configs. It is exported again and compared, so that no setting is lost."""
    widths = list(unet["block_out_channels"])
    side = unet["sample_size"]
    if not isinstance(side, int):
        raise UserError(f"{where}/unet: sample_size is {side}; it must be one number: our images are square")
    base_width = math.gcd(*widths)
    sizes = [side >> level for level in range(len(widths))]
    model = UNetConfig(
        image_size=side,
        channels=unet["in_channels"],
        base_width=base_width,
        width_multipliers=tuple(width // base_width for width in widths),
        blocks_per_resolution=unet["layers_per_block"],
        attention_resolutions=tuple(
            size for size, kind in zip(sizes, unet["down_block_types"], strict=False) if "Attn" in kind
        ),
        attention_head_dim=unet["attention_head_dim"],
        middle_attention=unet["add_attention"],
        norm_groups=unet["norm_num_groups"],
        dropout=unet["dropout"],
    )
    schedule = ScheduleConfig(
        kind=_ours(SCHEDULES, scheduler, "beta_schedule", where),
        num_timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
    )
    variance = _ours(VARIANCES, scheduler, "variance_type", where)
    sample = SampleConfig(mean="clipped" if scheduler["clip_sample"] else "plain", variance=variance)
    objective = ObjectiveConfig(
        predict=_ours(PREDICTIONS, scheduler, "prediction_type", where),
        variance="learned" if variance == "learned" else "fixed",
    )
    config = Config(schedule=schedule, objective=objective, model=model, sample=sample)
    config = from_json(to_json(config), where)  # checks every type
    from diffusers import DDPMScheduler, UNet2DModel

    _check_same(f"{where}/unet", unet, defaults(UNet2DModel) | unet_config(config))
    unused = {key: scheduler[key] for key in ("beta_start", "beta_end")}  # by a cosine
    expected = defaults(DDPMScheduler) | unused | scheduler_config(config)
    _check_same(f"{where}/scheduler", scheduler, expected)
    return config


def diffusers_names(config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Map each weight of a time-conditional `UNet` to the weights of UNet2DModel that it consists of.

    Usually one. Where our net merges several products into one (q, k, v; the shifts of all blocks), its weight is the
    concatenation of theirs along the first axis, in this order. Every weight of either net appears exactly once.
    """
    multipliers = config.width_multipliers
    num_blocks = config.blocks_per_resolution
    attention = [
        config.image_size >> level in config.attention_resolutions for level in range(len(multipliers))
    ]
    widens = [level > 0 and multipliers[level] != multipliers[level - 1] for level in range(len(multipliers))]
    shifts: list[str] = []
    modules = {
        "conv_in": ["conv_in"],
        "norm_out": ["conv_norm_out"],
        "conv_out": ["conv_out"],
        "time_mlp.0": ["time_embedding.linear_1"],
        "time_mlp.2": ["time_embedding.linear_2"],
        "shifts": shifts,
    }

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

    def add_path(path: str, attention: list[bool], shortcuts: list[list[bool]]) -> None:
        layer = itertools.count()
        for level, of_level in enumerate(shortcuts):
            for index, shortcut in enumerate(of_level):
                add_block(
                    f"{path}.{next(layer)}", f"{path}_blocks.{level}", index, attention[level], shortcut
                )
            if level < len(shortcuts) - 1:
                modules[f"{path}.{next(layer)}.conv"] = [f"{path}_blocks.{level}.{path}samplers.0.conv"]

    add_path("down", attention, [[widened] + [False] * (num_blocks - 1) for widened in widens])
    add_block("middle.0", "mid_block", 0, config.middle_attention, shortcut=False)
    add_block("middle.1", "mid_block", 1, False, shortcut=False)
    add_path("up", attention[::-1], [[True] * (num_blocks + 1) for _ in multipliers])
    names = {
        f"{ours}.{kind}": tuple(f"{module}.{kind}" for module in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    if config.num_classes:
        names["label_embedding.weight"] = ("class_embedding.weight",)
    return names


def defaults(kind: Any) -> dict[str, Any]:
    """The default arguments of a diffusers class."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}


def _ours(names: Mapping[str, str], scheduler: Mapping[str, Any], key: str, where: str) -> Any:
    """The key of `names` whose value is scheduler[key]."""
    for ours, theirs in names.items():
        if scheduler[key] == theirs:
            return ours
    raise UserError(
        f"{where}/scheduler: {key} is {scheduler[key]!r}; it must be one of {', '.join(names.values())}"
    )


def _check_same(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key, right in ours.items():
        got = theirs[key]
        got = list(got) if isinstance(got, tuple) else got
        if got != right and key not in _SAMPLING_ALONE:
            raise UserError(f"{where}: {key} is {got!r:.80}; in our architecture it is {right!r:.80}")
