"""Train a classifier with Ray Train on shards. Whatever is killed, the final weights stay the same.

python jobs/prepare.py digits shards
python examples/classifier/train_classifier.py shards results     # run it again to resume where it stopped
"""

import itertools
import math
import sys
import tempfile
from pathlib import Path

import ray.train.collective
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch import nn

from ddpm.data import ray_stream
from ddpm.data.plan import ReadOrder
from ddpm.runs.storage import absolute

ORDER = ReadOrder(batch_size=128, micro_batch_size=32, total_images=128 * 800, seed=0)


def train(shards: str) -> None:
    rank = ray.train.get_context().get_world_rank()
    world_size = ray.train.get_context().get_world_size()
    data_set = ray_stream.open_data_set(shards)
    torch.manual_seed(0)
    num_classes = len(data_set.manifest.class_names)
    net = nn.Sequential(nn.Linear(math.prod(data_set.shape), 64), nn.ReLU(), nn.Linear(64, num_classes))
    optimizer = torch.optim.Adam(net.parameters())
    images_seen = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        images_seen = state["images_seen"]
    model = prepare_model(net)
    share = ORDER.share(rank, world_size)
    broadcast = ray.train.collective.broadcast_from_rank_zero
    batches = ray_stream.micro_batches(
        data_set, ORDER, images_seen, rank=rank, world_size=world_size, broadcast=broadcast
    )
    while images_seen < ORDER.total_images:
        for batch in itertools.islice(batches, len(share)):
            image = torch.from_numpy(batch.image).flatten(1) / 255
            loss = nn.functional.cross_entropy(model(image), torch.from_numpy(batch.label))
            (loss * len(image) * world_size / ORDER.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        images_seen += ORDER.batch_size
        if images_seen % (100 * ORDER.batch_size) == 0:
            with tempfile.TemporaryDirectory() as folder:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"images_seen": images_seen}, Path(folder, "state.pt"))
                checkpoint = Checkpoint.from_directory(folder) if rank == 0 else None
                ray.train.report({"images_seen": images_seen, "loss": loss.item()}, checkpoint=checkpoint)


if __name__ == "__main__":
    shards, results = map(absolute, sys.argv[1:])
    result = TorchTrainer(
        lambda: train(shards),
        # Less than a CPU a worker: reading tasks need some, too.
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="classifier", storage_path=results, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()
    assert result.checkpoint is not None, "training reports one every 100 steps"
    print(f"trained: {result.metrics}, {result.checkpoint.path}")
