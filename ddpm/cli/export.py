"""Export a net: ddpm export CHECKPOINT DIR

CHECKPOINT is a checkpoint, a run (its newest checkpoint), models:/NAME@ALIAS or builtin:NAME. DIR is a new folder: a
pipeline for DDPMPipeline.from_pretrained, with a run's model card; a net of latents has a script instead.

    ddpm export PIPELINE DIR --format checkpoint

turns a diffusers folder into the checkpoint DIR; ddpm train --train.init-from DIR trains from its weights.
"""

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ddpm.cli import parsing
from ddpm.config.tree import NonEmptyStr
from ddpm.utils.errors import UserError

if TYPE_CHECKING:
    from ddpm.build import TrainedNet


@dataclass(frozen=True)
class Arguments:
    """Arguments of an export."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder or URI of a checkpoint or run, a registered or built-in net; --format checkpoint: a diffusers folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """New folder."""
    format: Literal["diffusers", "checkpoint"] = "diffusers"
    """diffusers: a DDPMPipeline. checkpoint: converts a diffusers folder."""
    ema: bool = True
    """Export the averaged (EMA) weights instead of the last ones."""
    label: NonEmptyStr | None = None
    """diffusers, conditional nets: the class that the pipeline generates, its name or number; num_classes: all."""
    register: NonEmptyStr | None = None
    """Also store the net in MLflow's registry (MLFLOW_TRACKING_URI), as the next version of the model of this name."""
    alias: NonEmptyStr | None = None
    """Point models:/NAME@ALIAS to that version."""


def main() -> None:
    if ("--format", "pt2") in pairwise(sys.argv) or "--format=pt2" in sys.argv:
        raise UserError(
            "--format pt2 is an example now: python examples/torch_export/export_program.py RUN DIR"
        )
    arguments: Arguments = parsing.parse(Arguments, __doc__)
    out = arguments.out.absolute()
    kind = str(arguments.format)
    if arguments.register is None and arguments.alias is not None:
        raise UserError("--alias needs a registered model; give its name with --register")
    if arguments.register is not None and not arguments.ema:
        raise UserError("--register: a registered model uses the averaged weights; leave out --no-ema")
    if arguments.label is not None and kind != "diffusers":
        raise UserError("--label has an effect with --format diffusers only; leave it out")
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten; name a new folder")
    from ddpm.data import latents
    from ddpm.export import card, export
    from ddpm.runs import names
    from ddpm.tracking import registry

    with ExitStack() as stack:
        if kind == "checkpoint":
            export.from_diffusers(Path(arguments.checkpoint), out)
            folder = out
            exported = {}
            print(f"checkpoint  {out}")
        else:
            folder = stack.enter_context(names.local_checkpoint(arguments.checkpoint))
            exported = {kind: out}
            trained = latents.load_net(folder, ema=arguments.ema)
            export.to_diffusers(trained, out, _class_of(trained, arguments.label))
            steps = trained.config.schedule.num_timesteps
            use = f"DDPMPipeline.from_pretrained({str(out)!r})(num_inference_steps={steps})"
            if trained.decoder is not None:
                use = f"python {out / export.SCRIPT} 0 1 2 3"
            print(f"pipeline    {out}")
            print(f"draw        {use}")
            with suppress(UserError):  # not a run
                text = card.card(arguments.checkpoint, use, None if arguments.ema else ())
                (out / "README.md").write_text(text)
        if arguments.register is not None:
            model, where = registry.register(arguments.register, folder, exported, arguments.alias)
            print(f"model       {model} in {where}")


def _class_of(trained: "TrainedNet", label: str | None) -> int | None:
    """The number of the class; num_classes stands for all of them."""
    from ddpm.sampling import generate

    if label == str(trained.config.model.num_classes):
        return trained.config.model.num_classes
    return generate.class_of(trained, label)
