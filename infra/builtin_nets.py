"""Tested: how a net is packed (tests/runs/test_builtin_nets.py). Not tested: the training, which made today's nets.

Retrains the built-in nets: python infra/builtin_nets.py [digits fashion-mnist]. It trains each preset with two
workers on CPUs, keeps its averaged weights in ddpm/runs/nets, evaluates these, and writes their model card. The same
commit and versions give the same bits on one kind of CPU; each card names its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from ddpm.config.json import to_json
from ddpm.config.tree import RunConfig
from ddpm.export import card
from ddpm.runs import checkpoint, names
from ddpm.runs.evaluations import Report

NAMES = ("digits", "fashion-mnist")
STORAGE = Path("runs/builtin")


def job(name: str, *words: str) -> None:
    subprocess.run([sys.executable, f"jobs/{name}.py", *words], check=True)


def pack(uri: str, name: str) -> Path:
    """Keep the averaged weights at `uri` as builtin:NAME; returns its folder."""
    with names.local_checkpoint(uri) as folder:
        trained = checkpoint.load_net(folder)
        position = checkpoint.read_state(folder) | {"run_key": ""}
    packed = names.NETS / name
    run = RunConfig(name=name, storage="runs")
    packed.mkdir(parents=True, exist_ok=True)
    half = {key: tensor.half().contiguous() for key, tensor in trained.net.state_dict().items()}
    save_file(half, packed / "net.safetensors")
    (packed / "net.safetensors").chmod(0o644)
    config = replace(trained.config, data=replace(trained.config.data, shards=None), run=run)
    (packed / "state.json").write_text(json.dumps(position, indent=2) + "\n")
    (packed / "config.json").write_text(to_json(config))
    return packed


def main() -> None:
    os.chdir(Path(__file__).parents[1])
    STORAGE.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{STORAGE.absolute()}/mlflow.db"
    for name in sys.argv[1:] or NAMES:
        run = str(STORAGE / name)
        scores = STORAGE / f"{name}.json"
        uri = f"{names.BUILTIN}{name}"
        on_cpus = ("--workers", "2", "--cluster.gpu", "False")
        job("train", name, *on_cpus, "--name", name, "--storage", str(STORAGE))
        packed = pack(run, name)
        job("evaluate", uri, "--out", str(scores))
        report = Report.from_json(scores.read_bytes(), str(scores))
        text = card.card(run, f"ddpm sample {uri} --num-images 64", [report])
        (packed / "README.md").write_text(text.replace("---\n", "---\nlicense: apache-2.0\n", 1))


if __name__ == "__main__":
    main()
