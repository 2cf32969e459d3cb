"""Export a net as a torch.export program: python examples/torch_export/export_program.py RUN DIR

DIR, a new folder, gets net.pt2 and config.json. torch.export.load("DIR/net.pt2").module()(x_t, t) computes the net
without this package, for any batch size, in float32. The arguments are those of the net: x_t, t (None for
uniform_mix), and the label of a net with classes. config.json gives the meaning of the output. For edm and flow x_t is
scaled first: `Edm` and `Flow` in `ddpm.diffusion.objectives`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

import ddpm
from ddpm.build import TrainedNet, build_net
from ddpm.cli import parsing
from ddpm.config import kinds
from ddpm.config.json import to_json
from ddpm.utils.errors import UserError

BATCH = 2
"""Images in the example input; torch.export would take 1 for a constant."""


def export(trained: TrainedNet) -> torch.export.ExportedProgram:
    """The net as a program, for any batch size, in float32."""
    config = trained.config
    net = build_net(replace(config, train=replace(config.train, precision="float32")))
    net.load_state_dict(trained.net.state_dict())
    net.eval().requires_grad_(False)
    # Row-major: for channels-last weights torch.export.save warns that they may be parts of others (2.13).
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    side = config.model.image_size
    arguments: list[torch.Tensor | None] = [torch.zeros(BATCH, config.model.channels, side, side), None]
    if kinds.objective(config.objective.process).uses_time:
        arguments[1] = torch.zeros(BATCH, dtype=torch.int64)
    if config.model.num_classes:
        arguments.append(torch.zeros(BATCH, dtype=torch.int64))
    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple(None if argument is None else {0: batch} for argument in arguments)
    return torch.export.export(net, tuple(arguments), dynamic_shapes=dynamic)


def main(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
) -> None:
    """
    Args:
        run: Folder or URI of a run or checkpoint, a registered model, or a built-in net.
        out: New folder.
    """
    trained = ddpm.Run(run).trained
    program = export(trained)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(str(error)) from None
    torch.export.save(program, out / "net.pt2")
    (out / "config.json").write_text(to_json(trained.config))
    print(f"program     {out}/net.pt2")


if __name__ == "__main__":
    parsing.run(lambda: tyro.cli(main, description=__doc__))
