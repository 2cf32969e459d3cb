"""Train a linear classifier of digits with NumPy on Ray Train: python docs/examples/digits_numpy.py

It needs no PyTorch: `pip install packages/ddpm-on-ray-callback` installs enough. Its curves go to
MLFLOW_TRACKING_URI, or to mlflow.db in this folder.
"""

from pathlib import Path

import numpy as np
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from sklearn.datasets import load_digits

from ddpm.training.mlflow_callback import MlflowCallback

NAME, LR, EPOCHS = "digits-numpy", 0.5, 20


def train() -> None:
    images, labels = load_digits(return_X_y=True)
    images, targets = images / 16, np.eye(10)[labels]
    weights = np.zeros((64, 10))
    for epoch in range(1, EPOCHS + 1):
        scores = np.exp(images @ weights)
        shares = scores / scores.sum(1, keepdims=True)
        loss = -np.log((shares * targets).sum(1)).mean()
        weights -= LR * images.T @ (shares - targets) / len(images)
        ray.train.report({"step": epoch, "loss": loss})


if __name__ == "__main__":
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})
    with MlflowCallback("digits", NAME, spool="spool", params={"lr": LR}) as tracking:
        run = RunConfig(NAME, storage_path=str(Path("results").absolute()), callbacks=[tracking])
        DataParallelTrainer(train, scaling_config=scaling, run_config=run).fit()
