"""Sample in the browser: python jobs/demo.py RUN [RUN]

Images appear as they are denoised, of two runs side by side. RUN is what jobs/sample.py takes, such as builtin:digits.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

import tyro

from ddpm import cli
from ddpm.config import Port, SmallCount
from ddpm.utils.errors import UserError


@dataclass(frozen=True)
class Arguments:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN]")]
    """Folders or URIs of runs or checkpoints, registered models, or built-in nets."""
    num_images: SmallCount = 16
    """Images of each."""
    port: Port = 7860
    """Port on this machine; 0: any free one."""


def main() -> None:
    arguments: Arguments = cli.parse(Arguments, __doc__)
    if len(arguments.runs) not in (1, 2):
        raise UserError(f"{len(arguments.runs)} runs are given; expected one, or two to compare")
    if find_spec("gradio") is None:
        raise UserError("gradio is not installed; run pip install 'ddpm-on-ray[demo]'")
    from ddpm.checkpoints import checkpoint
    from ddpm.hub import demo
    from ddpm.hub.resolve import local_checkpoint
    from ddpm.utils import devices

    runs = {}
    for uri in arguments.runs:
        with local_checkpoint(uri) as folder:
            runs[uri] = checkpoint.load_net(folder, devices.default())
    demo.serve(demo.build(runs, arguments.num_images), arguments.port)
