"""examples/torch_export: the program computes what the net computes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import examples, processes
from support.tiny import TINY_NET

from ddpm.build import TrainedNet, build_net
from ddpm.config.json import override
from ddpm.runs import checkpoint

export = examples.load("torch_export", "export_program")


@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": "bfloat16", "schedule.num_timesteps": 20, "objective.variance": "learned"},
        {"model.net": "dit", "model.num_classes": 3},
        {"model.num_classes": 3, "data.augment": 0.1},
        {"objective.process": "uniform_mix", "sample.sampler": "mix"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable"
)  # PyTorch 2.10 and 2.11 read programs so
def test_the_program_equals_the_net_for_any_batch_size(
    changes: dict[str, Any], tmp_path: Path, on_path: Callable[[str], None]
) -> None:
    on_path("dit")
    config = override(TINY_NET, changes)
    net = build_net(override(config, {"train.precision": "float32"}))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    net.eval().requires_grad_(False)
    torch.export.save(export.export(TrainedNet(net, config)), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for count in (1, 2, 5):
        t = torch.randint(0, config.schedule.num_timesteps, (count,))
        arguments = [torch.randn(count, 1, 8, 8), t if net.time_conditional else None]
        if config.model.num_classes:
            arguments.append(torch.randint(0, 4, (count,)))
        assert (program(*arguments) - net(*arguments)).abs().max() < 1e-5


@pytest.mark.slow
def test_a_run_becomes_a_folder_that_needs_no_ddpm(tmp_path: Path) -> None:
    script = processes.REPO / "examples/torch_export/export_program.py"
    words = [sys.executable, script, "builtin:digits", "out"]
    done = processes.run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_config(tmp_path / "out").model.image_size == 8
    again = processes.run(words, cwd=tmp_path)
    assert again.returncode == 2 and "exists" in again.stderr
