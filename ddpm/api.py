"""Training and sampling in Python, for notebooks and scripts: what `import ddpm` offers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm.build import TrainedNet, with_sampler
from ddpm.cli import parsing
from ddpm.config.json import override
from ddpm.config.presets import PRESETS, PresetArguments
from ddpm.config.tree import Config
from ddpm.data import latents
from ddpm.diffusion.samplers import Sampler
from ddpm.runs import names
from ddpm.sampling import generate, workers
from ddpm.tracking import run_params
from ddpm.training.launch import launch
from ddpm.utils import command_line, images
from ddpm.utils.errors import UserError
from ddpm.utils.images import Pixels


@dataclass(frozen=True)
class Run:
    """A run, or what else ddpm sample takes: a checkpoint, models:/NAME@ALIAS, builtin:NAME."""

    uri: str

    @cached_property
    def trained(self) -> TrainedNet:
        """The averaged net of the newest checkpoint, with its config."""
        with names.local_checkpoint(str(self.uri)) as folder:
            return latents.load_net(folder)

    def sample(
        self,
        num_images: int = 16,
        seed: int = 0,
        label: int | str | None = None,
        sampler: str | Sampler | None = None,
        **settings: Any,
    ) -> Pixels:
        """The images of ddpm sample, uint8 [N, H, W, C]; `label` is the name or the number of a class.

        `sampler` is the name of one, or a function: examples/inpainting has one. Other settings are those of
        config.sample: num_sample_steps=20. A function reads only those of guidance.
        """
        function = None
        own = self.trained.config
        if isinstance(sampler, str):
            steps = with_sampler(own.sample, sampler, own.objective).num_sample_steps
            settings = {"num_sample_steps": steps, **settings, "sampler": sampler}
        else:
            function = sampler
        changes = {f"sample.{name}": value for name, value in {**settings, "seed": seed}.items()}
        trained = self.trained.sampled_with(override(own, changes).sample)
        given = [name for name, value in settings.items() if value is not None]
        run_params.check_effect([trained.config], given)
        job = workers.SampleJob(trained, generate.class_of(trained, label), function)
        return workers.in_memory(job, num_images)

    def show(self, *arguments: Any, **settings: Any) -> Image.Image:
        """The images of `sample` as a grid, which a notebook displays."""
        return Image.fromarray(images.grid(self.sample(*arguments, **settings)))


def train(preset: str | Config, data: Any = None, **settings: Any) -> Run:
    """Train or resume a run, as ddpm train does.

    `data` is the URI of shards or a data set in Python (ddpm/data/sources/items.py), by default the preset's. Settings
    have the short names of the command line (lr=1e-3), or are given by group (model={"base_width": 16}). The run of a
    Config is named by the preset with the fewest differences.
    """
    if isinstance(preset, Config):
        config = preset
        typed = "config"
        name, _ = run_params.nearest_preset(config)
    elif preset in PRESETS:
        config = PRESETS[preset]
        typed = preset
        name = preset
    else:
        raise UserError(f"there is no preset {preset}; it must be one of {', '.join(PRESETS)}")
    short = {flag.removeprefix("--").replace("-", "_"): key for key, flag in parsing.SHORT.items()}
    data = str(data) if isinstance(data, Path) else data
    values: dict[str, Any] = {"data.shards": data} if isinstance(data, str) else {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values |= {f"{key}.{field}": value[field] for field in value}
        else:
            values[short.get(key, key)] = value
    given = [repr(typed)]
    if data is not None:
        given.append("data=...")
    given += [f"{key}={value!r}" for key, value in settings.items()]
    token = command_line.CALL.set(f"ddpm.train({', '.join(given)})")
    try:
        result = launch(
            PresetArguments(name, override(config, values), base=PRESETS[name]),
            None if isinstance(data, str) else data,
        )
    finally:
        command_line.CALL.reset(token)
    return Run(result.run.location.uri)
