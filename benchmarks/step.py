"""Training speed: our loop against diffusers' recipe and lucidrains', on the same net and batch.

    python benchmarks/step.py [--case cifar] [--turns 5] [--profile] [--only ours]

The whole training step is timed, from a batch in memory: noise, forward, loss, backward, clipping, AdamW, averaged
weights, and everything else that the loop does between two batches. Ours is `loop.train` itself. diffusers' is the
step of its `train_unconditional.py`, lucidrains' that of its `Trainer`; their batches are float32 already. Each
contestant is a separate process that waits for its turn, so that a machine that gets busy slows all of them. None takes
bfloat16 where the device has no instructions for it. The table goes to benchmarks/step.md (for another case to
step-CASE.md, for a GPU to gpu.md); with --profile it also has the time of each operator.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from harness import tables
from harness.arguments import read
from harness.turns import ended_after
from peers import step as contestants
from peers.step import BEFORE, DIFFUSERS, LUCIDRAINS, OURS, Case

from ddpm.build import build_net
from ddpm.cluster.ray_init import KEPT_MEMORY
from ddpm.config.tree import Config
from ddpm.models.precision import has_bfloat16
from ddpm.training import mfu
from ddpm.training.mfu import flops_per_image
from ddpm.training.state import parameter_count

KEPT = "memory kept"
"""Suffix of a peer with the C library settings that jobs/train.py gives its workers."""
BASE = "diffusers, float32 (its default)"


@dataclass(frozen=True)
class Arguments(Case):
    """What to measure, and for how long."""

    turns: int = 5
    """Turns of each contestant; the medians count."""
    turn_s: float = 4.0
    """Approximate length of a turn."""
    only: str = ""
    """Contestants whose name contains this."""
    without: str = ""
    """Contestants whose name does not contain this."""
    profile: bool = False
    """Also print the time of a step by operator."""
    losses: int = 0
    """Print only the losses of this many steps of ours, to show that a change does not affect them."""
    before: Path | None = None
    """Another checkout of this project, whose code is an additional contestant."""


class Contestant:
    """A process that trains during its turns.

    Args:
        case: the net, batch and images.
        name: one of OURS, DIFFUSERS, LUCIDRAINS, or BEFORE and one of OURS.
        folder: for its errors and compiled code.
        log_every_steps: steps between two losses that ours reports; 0: as in the case.
        before: checkout with the code of BEFORE.
    """

    def __init__(
        self, case: Case, name: str, folder: Path, log_every_steps: int = 0, before: Path | None = None
    ) -> None:
        script = Path(contestants.__file__)
        if name.startswith(BEFORE) and before is not None:
            script = before / "benchmarks" / "peers" / script.name  # it imports what that checkout has
        command = [sys.executable, str(script), name, *case.flags()]
        command += ["--log-every-steps", str(log_every_steps)]
        cache = str(folder / f"compiled-{abs(hash(name))}")
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, **os.environ}
        if name.removeprefix(BEFORE) in OURS or name.endswith(KEPT):
            environment |= KEPT_MEMORY
        if name.startswith(BEFORE):
            environment["PYTHONPATH"] = f"{before}:{environment.get('PYTHONPATH', '')}"
        if case.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.errors = folder / f"{name}.err"
        with self.errors.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, **pipes, env=environment, text=True)
        self.losses: dict[int, float] = {}

    def turn(self, steps: int, profile: bool = False) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps} profile\n" if profile else f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SAID "):
                said = json.loads(line.removeprefix("SAID "))
                if "seconds" in said:
                    return said
                self.losses[said["step"]] = said["loss"]
        raise RuntimeError(self.errors.read_text())

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# Results


def peak(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two matrices of 2048 (on a GPU 8192) rows and columns."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)

    def once() -> float:
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return 2 * n**3 / min(once() for _ in range(10)) / 1e9


def gigaflops(config: Config) -> float:
    """GFLOP of an image, forward and backward: matrix products and convolutions."""
    return flops_per_image(build_net(config).eval(), config) / 1e9


KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolution, backward", ("convolution_backward",)),
    ("convolution", ("convolution", "conv2d")),
    ("torch's group norm, backward", ("group_norm_backward",)),
    ("torch's group norm", ("group_norm",)),
    ("SiLU", ("silu",)),
    ("attention", ("attention", "softmax", "bmm")),
    ("linear layers", ("mm", "linear")),
    ("AdamW", ("adam",)),
    ("averaged weights", ("lerp",)),
    ("copies, casts, concatenation", ("copy_", "clone", "_to_copy", "aten::to", "contiguous", "aten::cat")),
    ("sums and products (our group norm)", ("add", "sum", "mul", "div", "sub", "mean", "square", "rsqrt")),
)
OTHER = "other (compiled: what is fused)"


def by_kind(operators: dict[str, float]) -> dict[str, float]:
    """Milliseconds a step by kind of operator, the largest first."""
    found: dict[str, float] = defaultdict(float)
    for name, ms in operators.items():
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), OTHER)
        found[kind] += ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    arguments = read(
        Arguments, __doc__, case="digits", turns=1, turn_s=0.1, only="float32", without="compiled"
    )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device is cuda, but there is no CUDA GPU here")
    before = [BEFORE + name for name in OURS if arguments.before and "compiled" not in name]
    peers = [] if arguments.losses else contestants.installed_peers()
    without = {arguments.without} - {""}
    if not has_bfloat16(torch.device(arguments.device)):
        without.add("bfloat16")
    names = [name for name in (*peers, *before, *OURS) if arguments.only in name]
    names = [name for name in names if not any(word in name for word in without)]
    with tempfile.TemporaryDirectory() as folder:
        every = 10 if arguments.losses else 0
        racing = {name: Contestant(arguments, name, Path(folder), every, arguments.before) for name in names}
        with ended_after(list(racing.values())):
            if arguments.losses:
                tell_losses(arguments, racing)
            else:
                measure(arguments, racing)


def tell_losses(arguments: Arguments, racing: dict[str, Contestant]) -> None:
    for name, contestant in racing.items():
        contestant.turn(arguments.losses)
        contestant.turn(1)  # the loss of the last step arrives with the next one
        losses = ", ".join(f"{loss:.6f}" for step, loss in contestant.losses.items())
        print(f"{arguments.case}: {name}: {losses}", flush=True)


def measure(arguments: Arguments, racing: dict[str, Contestant]) -> None:
    config = arguments.config()
    batch = config.train.batch_size
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start = {}
    steps = {}
    speed = defaultdict(list)
    memory = {}
    for name, contestant in racing.items():
        begin = time.perf_counter()
        contestant.turn(1)
        start[name] = time.perf_counter() - begin
        steps[name] = max(1, round(arguments.turn_s / contestant.turn(2)["seconds"] * 2))
    peaks = {torch.float32: 0.0}
    if has_bfloat16(torch.device(arguments.device)):
        peaks[torch.bfloat16] = 0.0
    for _ in range(arguments.turns):
        peaks = {dtype: max(found, peak(arguments.device, dtype)) for dtype, found in peaks.items()}
        for name, contestant in racing.items():
            said = contestant.turn(steps[name])
            speed[name].append(steps[name] * batch / said["seconds"])
            memory[name] = said.get("gib", float("nan"))
            print(f"{name}: {speed[name][-1]:.2f} images/s", flush=True)
    profiles = {}
    if arguments.profile:
        profiles = {name: by_kind(c.turn(3, profile=True)["operators"]) for name, c in racing.items()}
    write(arguments, config, start, speed, memory, peaks, profiles)


def write(
    arguments: Arguments,
    config: Config,
    start: dict[str, float],
    speed: dict[str, list[float]],
    memory: dict[str, float],
    peaks: dict[torch.dtype, float],
    profiles: dict[str, dict[str, float]],
) -> None:
    """The tables, as Markdown."""
    median = {name: statistics.median(found) for name, found in speed.items()}
    peers = {name: found for name, found in median.items() if name in DIFFUSERS}
    best = max(peers, key=peers.__getitem__, default=next(iter(median)))
    bases = [BASE if BASE in median else best, best]
    bases += sorted((name for name in LUCIDRAINS if name in median), key=median.__getitem__)[-1:]
    flops = gigaflops(config)
    reached = {str(dtype).removeprefix("torch."): found for dtype, found in peaks.items()}
    fastest = max(reached, key=reached.__getitem__)
    on_gpu = arguments.device == "cuda"
    lines = introduction(arguments, config, flops, reached)
    names = ["contestant", "images/s", f"of the {fastest} peak", "diffusers' default", "diffusers' best"]
    if len(bases) > 2:
        names.append("lucidrains' best")
    names.append("first step, s")
    if on_gpu:
        names.append("memory, GiB")
    rows = []
    for name, found in speed.items():
        share = "" if name in LUCIDRAINS else f"{median[name] * flops / reached[fastest]:.0%}"
        cells = [name, f"{median[name]:.2f}", share]
        for other in bases:
            ratio = statistics.median(a / b for a, b in zip(found, speed[other], strict=True))
            cells.append(f"{ratio:.2f}")
        cells.append(f"{start[name]:.1f}")
        if on_gpu:
            cells.append(f"{memory[name]:.1f}")
        rows.append(cells)
    lines += tables.table(names, rows)
    if profiles:
        kinds = dict.fromkeys(kind for profile in profiles.values() for kind in profile)
        rows = [[kind, *(f"{of.get(kind, 0):.1f}" for of in profiles.values())] for kind in kinds]
        lines += ["", "Where the time of a step goes, ms:", "", *tables.table(["operator", *profiles], rows)]
    script = Path(__file__)
    if on_gpu:
        script = script.with_stem("gpu")
        lines += utilisation(arguments, median, flops)
    elif arguments.case != "cifar":
        script = script.with_stem(f"step-{arguments.case}")
    tables.write(str(script), "How fast a net is trained", *lines)


def introduction(arguments: Arguments, config: Config, flops: float, reached: dict[str, float]) -> list[str]:
    """What was measured, and on what."""
    peers_here = []
    apart = ""
    if find_spec("diffusers"):
        peers_here = ["diffusers"]
        most = contestants.difference(config)
        apart = f" Outputs of our net and diffusers' differ by {most:.1e} at the most."
    return [
        f"Case {arguments.case}: {config.model.image_size}x{config.model.image_size} images, "
        f"{parameter_count(build_net(config)) / 1e6:.2f} M weights, {flops:.2f} GFLOP an image forward and "
        f"backward, batches of {config.train.batch_size}. Images/s of whole steps, medians of {arguments.turns} turns "
        f"(`python benchmarks/step.py --case {arguments.case}`); ratios of turns side by side, their medians. "
        f"{tables.machine(*peers_here, device=arguments.device)}; a product of large matrices reaches "
        f"{' and '.join(f'{found:.0f} GFLOP/s in {dtype}' for dtype, found in reached.items())}.{apart}",
        "",
    ]


def utilisation(arguments: Arguments, median: dict[str, float], flops: float) -> list[str]:
    """The MFU of our fastest contestant in the case cifar10, where the peak is known."""
    ours = max((name for name in median if name in OURS), key=median.__getitem__, default=None)
    known = mfu.peak_flops(torch.device(arguments.device), "bfloat16")
    if ours is None or not known or arguments.case != "cifar10":
        return []
    share = median[ours] * flops * 1e9 / known
    return [
        "",
        f"MFU of {ours}: {share:.1%} of the peak in the data sheet. For docs/design/scale.md:",
        f"`python benchmarks/scale.py --utilisation {share:.3f}`.",
    ]


if __name__ == "__main__":
    main()
