"""Nets that come with the package, builtin:NAME, made by infra/builtin_nets.py: averaged weights of a preset's run.

They are kept in float16, half the size, beside the config.json and state.json of a checkpoint and the model card.
"""

from pathlib import Path

import torch

from ddpm.build import TrainedNet, build_net
from ddpm.runs import checkpoint
from ddpm.utils.errors import UserError

SCHEME = "builtin:"
FOLDER = Path(__file__).parent / "nets"


def folder_of(uri: str) -> Path:
    """The package's folder of the net `uri`."""
    known = {f"{SCHEME}{file.parent.name}": file.parent for file in FOLDER.glob("*/net.safetensors")}
    if uri not in known:
        raise UserError(f"there is no net {uri}; the package has {' and '.join(sorted(known))}")
    return known[uri]


def unpack(uri: str, folder: Path) -> Path:
    """Write the net `uri` into `folder` as a checkpoint without a run, in float32; returns the checkpoint's folder."""
    packed = folder_of(uri)
    out = folder / uri.removeprefix(SCHEME)
    config = checkpoint.read_config(packed)
    net = build_net(config)
    tensors = checkpoint.read_tensors(packed / "net.safetensors", torch.device("cpu"))
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    checkpoint.write_net(TrainedNet(net, config), checkpoint.read_state(packed), out)
    return out
