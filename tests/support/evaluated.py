"""A run to evaluate: three checkpoints of a tiny net, each a little further from the start, and its data set."""

from pathlib import Path

import torch

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.manifest import read_manifest
from ddpm.data.prepare import prepare
from ddpm.data.reading import DataSet
from ddpm.data.sources.sources import Digits
from ddpm.runs import checkpoint, run_folder, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training.state import State
from support.checkpoints import checkpoint_name
from support.tiny import TINY_NET

POSITIONS = (64, 128, 192)
CONFIG = override(
    TINY_NET,
    {
        "model.zero_init": False,
        "schedule.num_timesteps": 20,
        "schedule.kind": "cosine",
        "sample.num_sample_steps": 4,
        "train.batch_size": 64,
        "run.name": "judged",
        "run.experiment": "evaluated",
    },
)


def make_data(folder: Path) -> str:
    """Write the digits as shards: 1,500 to train on, 297 held out."""
    location = storage.resolve(str(folder))
    prepare(Digits(), location)
    return location.uri


def make_run(folder: Path, shards: str, config: Config = CONFIG) -> RunFolder:
    """Write a run to `folder` whose checkpoints claim to be trained on `shards`."""
    config = override(config, {"data.shards": shards, "run.storage": str(folder)})
    place = storage.resolve(shards)
    manifest = read_manifest(place)
    train = DataSet(place, manifest, "train")
    run = run_folder.open_run(str(config.run.name), str(folder))
    state = State.create(config, torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    extra = {"run_key": run.key, "data_fingerprint": train.rows.fingerprint}
    for images_seen in POSITIONS:
        with torch.no_grad():
            for weight in state.ema.net.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=noise))
        state.step = images_seen // config.train.batch_size
        state.images_seen = images_seen
        checkpoint.write(state.snapshot(config, extra), Path(run.location.path, checkpoint_name(images_seen)))
    return run
