"""Export of nets to a diffusers pipeline folder, and import of such a folder.

    DIR/model_index.json  unet/  scheduler/     DDPMPipeline.from_pretrained(DIR) draws the same images
    DIR/sample.py  unet/  scheduler/  vae/      of a net of latents: python DIR/sample.py draws the same images

No pipeline of diffusers scales latents by channel, as ours are, so a net of latents gets a script.

What diffusers cannot express directly is translated or refused; nothing is left out silently:

- a T other than 1000 (we rescale t to 1000, diffusers does not): a "learned" embedding of t, whose table holds our
  sinusoids at the rescaled t;
- a schedule that diffusers does not have: "trained_betas";
- labels, which DDPMPipeline does not take: one is chosen, and its embedding is added to a bias.

A learned variance is "learned_range" in diffusers.

The pipeline samples as our `ancestral` does, with all T steps; guidance and the samplers of few steps are
not exported.

Papers: Ho et al. 2020 (arXiv:2006.11239). Names: diffusers 0.35 to 0.42.

Axes: B batch, C channels, H W, T timesteps.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from ddpm.build import TrainedNet, build_net
from ddpm.config import kinds
from ddpm.config.tree import Config
from ddpm.export.diffusers_config import (
    config_of,
    defaults,
    diffusers_names,
    scheduler_config,
    unet_config,
    unet_of,
)
from ddpm.latents.diffusers import DiffusersAutoencoder
from ddpm.latents.scaling import STD, Decoder, Scaling
from ddpm.models.layers import EMBEDDED_TIMESTEPS, sinusoids
from ddpm.runs import checkpoint
from ddpm.utils import files
from ddpm.utils.errors import UserError
from ddpm.utils.retry import as_user_error
from ddpm.utils.seeding import GENERATOR

TIME_TABLE = "time_proj.weight"
"""Diffusers' name for the [T, E] embedding of t, where it is a table."""
SCRIPT = "sample.py"
"""The file that samples an exported net of latents."""


def to_diffusers(trained: TrainedNet, out: Path, label: int | None = None) -> None:
    """Write the new folder `out`, from which `DDPMPipeline.from_pretrained(out)` draws what `ancestral` draws.

    Sample with num_inference_steps = T and one torch.Generator per image. From a net of latents, `python out/sample.py`
    draws.

    Args:
        label: for a conditional net, the class that the pipeline generates; num_classes, the null label: all classes.
    """
    diffusers = _diffusers()
    config = trained.config
    if not kinds.objective(config.objective.process).has_bound:
        name = config.objective.process
        raise UserError(
            f"diffusers' DDPMPipeline cannot sample for objective.process {name}; use examples/torch_export"
        )
    unet_of(config)
    decoder = trained.decoder
    vae = None if decoder is None else _vae(decoder)
    weights, config = _without_labels(trained.net.state_dict(), config, label)
    unet = diffusers.UNet2DModel(**unet_config(config))
    unet.load_state_dict(to_their_names(weights, config, unet.state_dict()))
    scheduler = diffusers.DDPMScheduler(**scheduler_config(config))
    with _new_folder(out) as folder:
        if decoder is None or vae is None:
            diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=True)
        else:
            unet.save_pretrained(folder / "unet", safe_serialization=True)
            scheduler.save_pretrained(folder / "scheduler")
            files.make_folder(folder / "vae")
            vae.save(folder / "vae")
            (folder / SCRIPT).write_text(_script(decoder.scaling, vae, config))


def from_diffusers(source: Path, out: Path) -> None:
    """Write the new checkpoint `out`, at 0 images seen, with the net of the DDPM pipeline in the folder `source`.

    Net and averaged net have the same weights; data and optimizer, which diffusers does not store, are `Config`'s
    defaults.
    """
    config, theirs = _read_pipeline(source)
    net = build_net(config)
    net.load_state_dict(_to_our_names(theirs, config, str(source)))
    state = {
        "step": 0,
        "images_seen": 0,
        "best_held_out_loss": None,
        "generator": GENERATOR,
        "run_key": "",
        "data_fingerprint": "",
        "imported_from": str(source.absolute()),
    }
    with _new_folder(out) as folder:
        checkpoint.write_net(TrainedNet(net, config), state, folder)


def _vae(decoder: Decoder) -> DiffusersAutoencoder:
    """The autoencoder of a net of latents."""
    if not isinstance(decoder.autoencoder, DiffusersAutoencoder):
        raise UserError(
            "the autoencoder of this net is no class of diffusers, which could not decode what the net generates; use "
            "examples/torch_export"
        )
    return decoder.autoencoder


def _script(scaling: Scaling, vae: DiffusersAutoencoder, config: Config) -> str:
    """The content of SCRIPT."""
    environment = Environment(loader=PackageLoader("ddpm.export"), undefined=StrictUndefined)
    return environment.get_template("sample.py.jinja").render(
        autoencoder=vae.class_name,
        num_timesteps=config.schedule.num_timesteps,
        mean=list(scaling.mean),
        scale=[std / STD for std in scaling.std],
    )


def _diffusers() -> Any:
    """The package diffusers, imported late: it takes seconds, and only export needs it."""
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers is not installed; run pip install 'ddpm-on-ray[export]'") from None
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def _read_pipeline(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config and weights (under diffusers' names) of a pipeline, from JSON and safetensors alone.

    model_index.json is not read: only these two classes are created.
    """
    diffusers = _diffusers()
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a folder of a diffusers DDPMPipeline: it has no {name}")
    try:
        config = config_of(
            defaults(diffusers.UNet2DModel) | diffusers.UNet2DModel.load_config(folder / "unet"),
            defaults(diffusers.DDPMScheduler) | diffusers.DDPMScheduler.load_config(folder / "scheduler"),
            str(folder),
        )
        unet, loading = diffusers.UNet2DModel.from_pretrained(
            folder / "unet",
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # else it warns that accelerate is missing
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"{folder} cannot be read as a DDPMPipeline: {' '.join(str(error).split())[:300]}"
        ) from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            raise UserError(f"{folder}/unet: the weights do not fit: {what} {sorted(loading[what])[0]}")
    return config, unet.state_dict()


def _without_labels(
    weights: Mapping[str, Tensor], config: Config, label: int | None
) -> tuple[dict[str, Tensor], Config]:
    """The net for one `label`, whose embedding is added to a bias of the embedding of t."""
    weights = dict(weights)
    classes = config.model.num_classes
    if not classes:
        if label is not None:
            raise UserError(f"label is {label}; this net was trained without labels")
        return weights, config
    if label is None or not 0 <= label <= classes:
        raise UserError(
            f"label is {label}; it must be the one class that the pipeline generates, 0..{classes - 1}, or {classes} "
            "(the null label) for all"
        )
    weights["time_mlp.2.bias"] = weights["time_mlp.2.bias"] + weights.pop("label_embedding.weight")[label]
    return weights, replace(config, model=replace(config.model, num_classes=0))


def to_their_names(
    weights: Mapping[str, Tensor], config: Config, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our weights under the names of `like`, the weights of a UNet2DModel."""
    theirs: dict[str, Tensor] = {}
    for ours, names in diffusers_names(unet_of(config)).items():
        parts = weights[ours].split([len(like[name]) for name in names])
        theirs |= dict(zip(names, parts, strict=True))
    if TIME_TABLE in like:
        theirs[TIME_TABLE] = _time_table(config)
    return theirs


def _to_our_names(theirs: Mapping[str, Tensor], config: Config, where: str) -> dict[str, Tensor]:
    if TIME_TABLE in theirs and not torch.allclose(theirs[TIME_TABLE], _time_table(config), atol=1e-5):
        raise UserError(f"{where}/unet: its embedding of t was learned; ours consists of sinusoids")
    return {
        ours: torch.cat([theirs[name] for name in names])
        for ours, names in diffusers_names(unet_of(config)).items()
    }


def _time_table(config: Config) -> Tensor:
    """[T, E] float32: the sinusoids of our net for each t."""
    T = config.schedule.num_timesteps
    model = unet_of(config)
    width = model.base_width * model.width_multipliers[0]
    return sinusoids(torch.arange(T) * (EMBEDDED_TIMESTEPS / T), width)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A context with a new folder, which is named `out` at the end, or removed on an error."""
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten; name a new folder")
    temporary = files.temporary(out)
    with as_user_error(f"cannot write {out}"), ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        files.make_folder(temporary)
        yield temporary
        files.sync_tree(temporary)
        temporary.rename(out)
        files.sync(out.parent)
