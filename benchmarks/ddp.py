"""The effect of DistributedDataParallel's options: images/s of two workers of one thread each, side by side.

    python benchmarks/ddp.py [--case fashion-mnist] [--turns 5]

Each contestant is a separate net with its options; all are in the same two processes (gloo) and take turns. A step is
noise, forward, backward with the all-reduce, clipping and AdamW. Gradients in bfloat16 are not measured: torch has that
hook only for NCCL and XCCL (2.13). The table goes to benchmarks/ddp.md.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from harness import processes, tables
from harness.arguments import read
from peers.step import Case, CaseName, pictures
from torch import nn

from ddpm.build import build_objective
from ddpm.training.state import State, parameter_count
from ddpm.utils import images
from ddpm.utils.generators import PhiloxGenerator

WORKERS = 2
ALONE: dict[str, Any] = {}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "the same, static_graph": {"gradient_as_bucket_view": True, "static_graph": True},
    "no all-reduce (for comparison)": ALONE,
}
OURS = "gradient_as_bucket_view"
"""The option that `RayRuntime.wrap` uses."""


@dataclass(frozen=True)
class Arguments:
    """What to measure, and for how long."""

    cases: tuple[CaseName, ...] = ("digits", "fashion-mnist", "cifar")
    turns: int = 5
    turn_s: float = 3.0
    """Approximate length of a turn."""
    contend: CaseName | None = None
    """Used by torchrun: run as a worker that trains this case."""


def stepper(case: Case, options: dict[str, Any]) -> Callable[[], None]:
    """A function that takes one step with a worker's share of the batch."""
    config = case.config()
    state = State.create(config, torch.device("cpu"))
    objective = build_objective(config)
    model: nn.Module = state.net
    if options is not ALONE:
        model = nn.parallel.DistributedDataParallel(state.net, **options)
    share = config.train.batch_size // WORKERS
    x_0 = images.to_model(torch.tensor(pictures(config)[:share]))
    generator = PhiloxGenerator(0)

    def step() -> None:
        objective.loss(model, x_0, None, generator).value.backward()
        nn.utils.clip_grad_norm_(state.net.parameters(), config.optim.grad_clip)
        state.optimizers[0].step()
        state.net.zero_grad(set_to_none=True)

    return step


def contend(arguments: Arguments) -> None:
    """Take the same turns in both workers; the first one reports their speeds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert arguments.contend is not None
    case = Case(case=arguments.contend)
    steps = {name: stepper(case, options) for name, options in OPTIONS.items()}

    def turn(step: Callable[[], None], count: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            step()
        dist.barrier()
        return time.perf_counter() - began

    counts = {}
    found = {name: list[float]() for name in steps}
    for name, step in steps.items():
        turn(step, 2)
        took = torch.tensor(turn(step, 2) / 2)
        dist.broadcast(took, 0)
        counts[name] = max(1, round(arguments.turn_s / took.item()))
    for _ in range(arguments.turns):
        for name, step in steps.items():
            images_each = counts[name] * case.config().train.batch_size
            found[name].append(images_each / turn(step, counts[name]))
    if dist.get_rank() == 0:
        processes.answer(found)
    dist.destroy_process_group()


def measure(arguments: Arguments, case: CaseName) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(WORKERS), __file__, "--contend", case]
    command += ["--turns", str(arguments.turns), "--turn-s", str(arguments.turn_s)]
    found: dict[str, list[float]] = processes.ask(command)
    return found


def main() -> None:
    arguments = read(Arguments, __doc__, cases=("digits",), turns=1, turn_s=0.1)
    if arguments.contend:
        contend(arguments)
        return
    lines = [
        f"{WORKERS} workers of one thread, float32, gloo; images/s of both, medians of {arguments.turns} turns side by "
        f"side, and their median ratio to what the runtime has (`python benchmarks/ddp.py`). "
        f"{tables.machine()}.",
    ]
    for case in arguments.cases:
        config = Case(case=case).config()
        weights = parameter_count(State.create(config, torch.device("cpu")).net)
        lines += ["", f"## {case}: {weights / 1e6:.2f} M weights, batches of {config.train.batch_size}", ""]
        found = measure(arguments, case)
        rows = []
        for name, speeds in found.items():
            ratio = statistics.median(a / b for a, b in zip(speeds, found[OURS], strict=True))
            every = ", ".join(f"{speed:.1f}" for speed in speeds)
            rows.append([name, f"{statistics.median(speeds):.1f}", f"{ratio:.3f}", every])
        lines += tables.table(["options", "images/s", "ratio", "all turns"], rows)
    tables.write(__file__, "What DistributedDataParallel's options are worth", *lines)


if __name__ == "__main__":
    main()
