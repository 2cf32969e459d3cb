"""Train a small classifier of digits on Ray Train, with its curves in MLflow: python docs/examples/digits_mlp.py

Run the same command again to resume where it stopped, in the same MLflow run. It takes MLFLOW_TRACKING_URI from the
environment; without it curves go to mlflow.db in this folder.
"""

import os
import tempfile
from pathlib import Path

import ray.train
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from sklearn.datasets import load_digits

from ddpm.training.mlflow_callback import MlflowCallback

NAME, EPOCHS = "digits-mlp", 40


def train() -> None:
    torch.manual_seed(0)
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    images, labels = (torch.tensor(array)[rank::world_size] for array in load_digits(return_X_y=True))
    net = prepare_model(
        torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    )
    optimizer, epoch = torch.optim.SGD(net.parameters(), lr=0.1), 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), weights_only=True)
        net.load_state_dict(state["net"])
        epoch = state["epoch"]
    while epoch < EPOCHS:
        epoch += 1
        loss = torch.nn.functional.cross_entropy(net(images.float() / 16), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"net": net.state_dict(), "epoch": epoch}, Path(folder, "state.pt"))
            stored = Checkpoint.from_directory(folder) if rank == 0 and epoch % 5 == 0 else None
            ray.train.report({"step": epoch, "loss": loss.item(), "rank": rank}, checkpoint=stored)


if __name__ == "__main__":
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # of 2 s: a report waits until Ray looks
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
    with MlflowCallback("digits", NAME, spool="spool", params={"lr": 0.1}) as tracking:
        run = RunConfig(NAME, storage_path=str(Path("results").absolute()), callbacks=[tracking])
        TorchTrainer(train, scaling_config=scaling, run_config=run).fit()
