"""A soak test: half an hour of faults in the cluster, S3 and MLflow of a run, one every minute.

    make soak                      (or: python tests/soak.py --minutes 30 --every-s 60 --seed 0)

First the run is trained undisturbed, then again and again while a random fault is injected every minute. At the end
of each, net, EMA and optimizer must be bitwise those of the undisturbed run, and MLflow must have every metric once.
It prints a line for each fault and each run, and a summary at the end; the exit code is 1 if something differs.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import tyro
from support.faulted import Run, metric, mlflow_run_of, write_digits
from support.processes import Job, kill_tree
from support.proxy import FaultyProxy, Mode
from support.servers import MlflowServer, RayHead, RayNode, S3Server, ray_head_env

from ddpm.runs import storage

WORKER_CPUS = ("--cluster.cpus-per-worker", "1.5")
NODE_CPUS = (1, 2, 2)
"""One node for data tasks, two for a worker each."""
LOG_EVERY = 6_400
SAMPLE_EVERY = 128_000
WIDTH = 32
"""A larger net than in the tests, which trains too fast for a soak."""


@dataclass(frozen=True)
class Arguments:
    """Duration and intensity."""

    minutes: float = 30.0
    """No fault is injected later; the current run still trains to its end."""
    every_s: float = 60.0
    """Time between two faults."""
    seed: int = 0
    images: int = 192_000
    """Length of a run: about 5 minutes undisturbed, on two cores."""

    @property
    def flags(self) -> list[str]:
        every = f"--train.checkpoint-every-images {LOG_EVERY} --train.log-every-images {LOG_EVERY}"
        length = f"--train.sample-every-images {SAMPLE_EVERY} --train.total-images {self.images}"
        return f"{every} {length} --model.base-width {WIDTH} --cluster.max-failures 10".split()


class Soak:
    """All parts that can fail, and the run."""

    def __init__(self, arguments: Arguments, folder: Path, stack: ExitStack) -> None:
        self.arguments = arguments
        self.folder = folder
        self.stack = stack
        self.rng = random.Random(arguments.seed)
        self.s3 = stack.enter_context(S3Server(folder / "s3"))
        self.proxy = stack.enter_context(FaultyProxy(self.s3.endpoint))
        self.mlflow = stack.enter_context(MlflowServer(folder / "mlflow"))
        os.environ |= {**self.s3.client_env, "MLFLOW_TRACKING_URI": self.mlflow.uri}
        self.injected: Counter[str] = Counter()
        self.start_cluster()
        import boto3

        boto3.client("s3").create_bucket(Bucket="soak")
        self.started = time.monotonic()
        self.todo = list[str]()
        self.run: Run
        self.job: Job

    def start_cluster(self) -> None:
        env = ray_head_env() | {"AWS_ENDPOINT_URL": self.proxy.endpoint}
        self.head = self.stack.enter_context(RayHead(self.folder / f"ray-{time.time():.0f}", 0, env))
        self.nodes = [self.add(num_cpus) for num_cpus in NODE_CPUS]

    def add(self, num_cpus: int) -> RayNode:
        return self.stack.enter_context(self.head.add_node(num_cpus))

    def start_job(self) -> None:
        env = {"RAY_ADDRESS": self.head.address, "AWS_ENDPOINT_URL": self.proxy.endpoint}
        self.job = self.run.start(*WORKER_CPUS, *self.arguments.flags, env=env)

    @property
    def faults(self) -> dict[str, Callable[[], object]]:
        """Each restores what it took away before it returns."""
        return {
            "worker killed": lambda: self.kill("RayTrainWo"),
            "controller killed": lambda: self.kill("TrainContr"),
            "run-state actor killed": lambda: self.kill("RunState"),
            "node of a worker lost": lambda: self.replace(self.rng.choice((1, 2))),
            "node of the data tasks lost": lambda: self.replace(0),
            "node preempted": self.preempt,
            "driver killed": lambda: self.end_job(signal.SIGKILL),
            "stopped": lambda: self.end_job(signal.SIGTERM),
            "cluster killed": self.kill_cluster,
            "MLflow killed": self.kill_mlflow,
            "S3 resets": lambda: self.disturb_s3("reset", every=3),
            "S3 slows down": lambda: self.disturb_s3("slow_down", every=2),
            "S3 delays": lambda: self.disturb_s3("delay", every=2),
            "S3 down": lambda: self.disturb_s3("down"),
        }

    def kill(self, title: str) -> None:
        """Kill a process by the beginning of its title, of which the kernel keeps 15 characters."""
        found = [process for process in psutil.process_iter() if process.name().startswith(f"ray::{title}")]
        self.rng.choice(found).send_signal(signal.SIGKILL)

    def preempt(self) -> None:
        which = self.rng.choice((1, 2))
        self.head.drain(self.nodes[which].node_id, within_s=20)
        time.sleep(20)
        self.replace(which)

    def replace(self, which: int) -> None:
        self.nodes[which].kill()
        time.sleep(8)
        self.nodes[which] = self.add(NODE_CPUS[which])

    def end_job(self, how: signal.Signals) -> None:
        self.job.process.send_signal(how)
        self.job.wait(180)
        self.start_job()

    def kill_cluster(self) -> None:
        kill_tree(self.job.process)
        self.head.kill()
        for node in self.nodes:
            node.kill()
        self.start_cluster()
        self.start_job()

    def kill_mlflow(self) -> None:
        self.mlflow.kill()
        time.sleep(self.rng.uniform(5, 30))
        self.mlflow.start()

    def disturb_s3(self, mode: Mode, every: int = 1) -> None:
        self.proxy.switch(mode, every=every)
        time.sleep(20)
        self.proxy.switch("pass")

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def train_through_faults(self, name: str) -> None:
        """Train to the end with a fault every `every_s`: each kind once in random order, then again."""
        self.run = Run(name, "s3://soak/runs", "s3://soak/data", self.folder / f"{name}.log")
        self.start_job()
        while True:
            fault_at = time.monotonic() + self.arguments.every_s
            while time.monotonic() < fault_at:
                code = self.job.process.poll()
                if code == 0:
                    return
                if code is not None:
                    raise SystemExit(f"the job ended with {code}:\n{self.job.output[-4000:]}")
                time.sleep(0.2)
            if self.minutes < self.arguments.minutes:
                self.inject_fault()

    def inject_fault(self) -> None:
        self.todo = self.todo or self.rng.sample(list(self.faults), len(self.faults))
        fault = self.todo.pop()
        when = f"{self.minutes:5.1f} min  at {self.run.images_seen():7,}  {fault}"
        try:
            self.faults[fault]()
        except IndexError:  # still recovering from the last fault: try this one later
            print(f"{when}: nothing there to strike", flush=True)
            self.todo.insert(0, fault)
            return
        print(when, flush=True)
        self.injected[fault] += 1


def reference(arguments: Arguments, data: str, folder: Path) -> Run:
    run = Run("undisturbed", str(folder), data, folder / "undisturbed.log")
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "RAY_ADDRESS": ""}
    with run.start(*arguments.flags, env=env) as job:
        if code := job.wait(4 * 3600):
            raise SystemExit(f"the undisturbed run ended with {code}:\n{job.output[-4000:]}")
    return run


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        data = write_digits(folder / "data")
        started = time.monotonic()
        undisturbed = reference(arguments, data, folder)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        soak = Soak(arguments, folder, stack)
        upload = storage.resolve("s3://soak/data")
        storage.pafs.copy_files(data, upload.path, destination_filesystem=upload.filesystem)
        outcomes: list[bool] = []
        while soak.minutes < arguments.minutes:
            soak.train_through_faults(f"soak-{len(outcomes) + 1}")
            outcomes.append(compare(soak, undisturbed))
        print(f"{sum(soak.injected.values())} faults in {soak.minutes:.1f} minutes: {dict(soak.injected)}")
        print(f"{len(outcomes)} runs, of which {outcomes.count(True)} ended as if nothing had happened")
        return int(not all(outcomes))


def compare(soak: Soak, undisturbed: Run) -> bool:
    """Compare with the undisturbed run; returns whether nothing differs."""
    total = soak.arguments.images
    first = soak.run.tensors(total)
    second = undisturbed.tensors(total)
    differing = sum(not torch.equal(first[name], second[name]) for name in second)
    differing += len(first) != len(second)
    steps = [step for step, _ in metric(soak.run, "train/loss")]
    once = steps == list(range(LOG_EVERY, total + 1, LOG_EVERY))
    _, goodput = (metric(soak.run, "train/goodput") or [(0, 1.0)])[-1]
    print(
        f"{soak.minutes:5.1f} min  end of {soak.run.location.uri}: {differing} of {len(first)} tensors differ; "
        f"{len(steps)} points of train/loss, {'each once' if once else 'NOT each once'}; MLflow run "
        f"{mlflow_run_of(soak.run).info.status}; goodput {goodput:.3f}",
        flush=True,
    )
    return not differing and once


if __name__ == "__main__":
    sys.exit(main())
