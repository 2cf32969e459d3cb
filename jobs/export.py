"""Take a net elsewhere: python jobs/export.py CHECKPOINT DIR [--format diffusers|pt2]

CHECKPOINT is the folder or s3:// URI of a checkpoint or of a run (its newest), or models:/NAME@ALIAS. DIR is a new
folder: of format diffusers one for DDPMPipeline.from_pretrained, of format pt2 one with a torch.export program.

    python jobs/export.py PIPELINE DIR --format checkpoint

makes the checkpoint DIR of a diffusers folder; jobs/train.py --train.init-from DIR goes on from its weights.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ddpm import cli
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """What is taken where."""

    checkpoint: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    format: Literal["diffusers", "pt2", "checkpoint"] = "diffusers"
    ema: bool = True
    """The averaged weights, or the last ones."""
    label: int | None = None
    """diffusers, of a conditional net: the class its pipeline draws; num_classes: all."""
    register: str | None = None
    """Also store it in MLflow's registry (MLFLOW_TRACKING_URI), as the next version of the model of this name."""
    alias: str | None = None
    """Let models:/NAME@ALIAS mean that version."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    out, kind = arguments.out.absolute(), str(arguments.format)
    if arguments.register is None and arguments.alias is not None:
        raise UserError("--alias is of a registered model; give its name with --register")
    if arguments.register is not None and not arguments.ema:
        raise UserError("--register: a registered model draws with the averaged weights; leave --no-ema out")
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten; name a new folder")
    import torch

    from ddpm.checkpoints import checkpoint
    from ddpm.hub import export, registry, resolve

    with ExitStack() as stack:
        if kind == "checkpoint":
            export.from_diffusers(Path(arguments.checkpoint), out)
            folder, exported = out, {}
            print(f"checkpoint  {out}")
        else:
            folder, exported = (
                stack.enter_context(resolve.local_checkpoint(arguments.checkpoint)),
                {kind: out},
            )
            net, config = checkpoint.load_net(folder, torch.device("cpu"), ema=arguments.ema)
            if kind == "pt2":
                export.to_pt2(net, config, out)
                print(f"program     {out}/net.pt2")
            else:
                export.to_diffusers(net, config, out, arguments.label)
                steps = config.schedule.num_timesteps
                print(f"pipeline    {out}")
                print(f"draw        DDPMPipeline.from_pretrained({str(out)!r})(num_inference_steps={steps})")
        if arguments.register is not None:
            model, where = registry.register(arguments.register, folder, exported, arguments.alias)
            print(f"model       {model} in {where}")


if __name__ == "__main__":
    cli.run(main)
