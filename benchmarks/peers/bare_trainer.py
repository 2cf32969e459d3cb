"""A minimal TorchTrainer by Ray Train's documentation: each worker takes one step on noise.

    python benchmarks/peers/bare_trainer.py WORKERS

It prints `images 128` when rank 0 has taken the step. benchmarks/start.py measures how long that takes.
"""

import sys
import tempfile
import time
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer


def work(config: dict[str, str]) -> None:
    net = ray.train.torch.prepare_model(torch.nn.Conv2d(1, 1, 3, padding=1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(128, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["folder"], "stepped").touch()
    time.sleep(1.0)  # gives the driver time to see it


def main() -> None:
    from concurrent.futures import ThreadPoolExecutor

    workers = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        trainer = TorchTrainer(
            work,
            train_loop_config={"folder": folder},
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, resources_per_worker={"CPU": 1 / workers}
            ),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        fit = pool.submit(trainer.fit)
        while not Path(folder, "stepped").exists() and not fit.done():
            time.sleep(0.05)
        print("images 128", flush=True)
        fit.result()
        print("trained", flush=True)


if __name__ == "__main__":
    main()
