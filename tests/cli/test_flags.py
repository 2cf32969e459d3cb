"""Command lines: short flags, short help, and one-line error messages."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm.build import build_net
from ddpm.cli import parsing
from ddpm.config import presets
from ddpm.config.json import flatten, override
from ddpm.config.tree import Config
from ddpm.data.sources import folder_preset
from ddpm.search import config as search_config
from ddpm.utils.errors import UserError

MISTAKES = {
    "train": "PRESET is missing",
    "train --lr 1 digits": "PRESET is missing",
    "train mnist": "there is no PRESET mnist",
    "train digits --lrr 1": "--lrr, 1 (did you mean --lr?)",
    "train digits --epochs 5": "--epochs, 5 (did you mean --total-images, which counts images, not passes?)",
    "train digits --num_epochs=5": "--num_epochs=5 (did you mean --total-images,",
    "train digits --data.held-out-images 5": "(did you mean `ddpm prepare --test-images`, which holds images out?)",
    "prepare digits a --epochs 5": "--epochs, 5; ",
    "train digits --num-timestep 8": "--num-timestep, 8 (did you mean --schedule.num-timesteps?)",
    "train digits --xyz": "--xyz; --help-all",
    "train digits more": "more; --help-all",
    "train digits --lr fast": "--lr/--optim.lr: ",
    "train digits --lr": "'--lr/--optim.lr'",
    "train digits --sampler dpm": "sample.sampler is 'dpm'; it must be one of auto, ddim, ddpm, ",
    "train digits --schedule lineer": "(did you mean linear?)",
    "train digits --model.net unett": "(did you mean unet?)",
    "evaluate runs/a --features inceptoin": "(did you mean inception?)",
    "evaluate runs/a --sampler heum": "sampler is 'heum'",
    "train folder nowhere": "nowhere is not a folder",
    "train folder": "--data.images FOLDER",
    "search digit": "there is no PRESET digit",
    "search digits --num-trails 4": "(did you mean --num-trials?)",
    "prepare digitss data": "there is no SOURCE digitss",
    "train digits --data.source digitss": "data.source is 'digitss'",
    "sample runs/a --seeds 1": "(did you mean --seed?)",
}


@pytest.mark.parametrize("command_line", MISTAKES)
def test_user_errors_are_one_line(user_error: Callable[..., str], command_line: str) -> None:
    assert MISTAKES[command_line] in user_error(*command_line.split())


def parsed(monkeypatch: pytest.MonkeyPatch, kind: Any, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["job.py", *words])
    if issubclass(kind, presets.PresetArguments):
        return parsing.parse_preset(kind, None, folder_preset.preset)
    return parsing.parse(kind, None)


def test_short_names_are_the_long_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "run.name": "a",
        "run.storage": "s3://b/c",
        "data.shards": "d",
        "data.image_size": 24,
        "data.autoencoder": "diffusers:vae",
        "schedule.kind": "linear",
        "optim.lr": 0.5,
        "train.total_images": 100,
        "train.batch_size": 64,
        "train.seed": 7,
        "sample.sampler": "heun",
        "cluster.num_workers": "1:4",
    }
    assert values.keys() == parsing.SHORT.keys()
    words = [word for key, value in values.items() for word in (parsing.SHORT[key], str(value))]
    short = parsed(monkeypatch, presets.PresetArguments, "digits", *words)
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    assert short == parsed(monkeypatch, presets.PresetArguments, "digits", *words)
    assert short.config == override(presets.DIGITS, values)


def test_a_search_keeps_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "digits --name n --storage s --seed 3 --lr 0.5 --workers 2".split()
    chosen = parsed(monkeypatch, search_config.Arguments, *words)
    assert (chosen.name, chosen.storage, chosen.seed) == ("n", "s", 3)
    changed = override(presets.DIGITS, {"optim.lr": 0.5, "cluster.num_workers": 2})
    assert chosen.config == changed


@pytest.mark.lowest
def test_help_shows_common_flags_and_help_all_shows_all(run_job: Callable[..., Any]) -> None:
    keys = flatten(presets.DIGITS)
    assert keys.keys() >= parsing.SHOWN_FIRST
    brief = run_job("train", "digits", "--help")
    whole = run_job("train", "digits", "--help-all")
    assert (brief.returncode, whole.returncode) == (0, 0)
    for names in ("--model.net {unet}", "--schedule.kind {linear,", "--sample.sampler {auto,ddim,"):
        assert names in " ".join(whole.stdout.replace("│", " ").split())
    for key in keys:
        flag = f"--{key.replace('_', '-')}"
        assert f" {flag} " in whole.stdout or f" {flag}, " in whole.stdout, flag
        named = parsing.SHORT.get(key, flag)
        assert (f"│ {named} " in brief.stdout) == (key in parsing.SHOWN_FIRST), flag
    assert brief.stdout.endswith("--help-all lists every flag.\n")
    assert len(brief.stdout.splitlines()) < 70


@pytest.mark.parametrize(
    ("files", "size", "channels"),
    [
        ([("L", 28)], 32, 1),
        ([("L", 8), ("I;16", 8)], 8, 1),
        ([("L", 12)] * 3 + [("RGB", 300)], 16, 3),
        ([("RGB", 300), ("P", 200)], 32, 3),
    ],
    ids=str,
)
def test_the_preset_folder_has_the_size_and_colours_of_the_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[tuple[str, int]], size: int, channels: int
) -> None:
    for i, (mode, side) in enumerate(files):
        Image.new(mode, (side + 5, side)).save(tmp_path / f"{i}.png")
    (tmp_path / "torn.png").write_bytes(b"nothing")
    config = parsed(monkeypatch, presets.PresetArguments, "folder", str(tmp_path), "--name", "a").config
    changes = {"data.images": str(tmp_path), "model.image_size": size, "model.channels": channels}
    changes["data.augment"] = 0.12
    assert config == override(presets.FOLDER, changes | {"run.name": "a"})
    flags = ("folder", str(tmp_path), "--model.image-size", "64", "--model.channels", "1")
    config = parsed(monkeypatch, presets.PresetArguments, *flags).config
    assert (config.model.image_size, config.model.channels) == (64, 1)
    assert build_net(config)(torch.zeros(1, 1, 64, 64), torch.zeros(1, dtype=torch.int64)).shape[2] == 64


def test_the_preset_folder_has_the_size_colours_and_classes_of_a_data_set(
    monkeypatch: pytest.MonkeyPatch, digits_uri: str
) -> None:
    config = parsed(monkeypatch, presets.PresetArguments, "folder", "--data", digits_uri).config
    changes = {"model.image_size": 8, "model.channels": 1, "model.num_classes": 10, "data.augment": 0.12}
    assert config == override(presets.FOLDER, changes | {"data.shards": digits_uri})
    with pytest.raises(UserError, match="no data set at"):
        parsed(monkeypatch, presets.PresetArguments, "folder", "--data", "x")


@pytest.mark.parametrize(("size", "net"), [(8, "small"), (64, "small"), (16, "medium"), (64, "medium")])
def test_every_size_has_a_net_and_eight_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, net: str
) -> None:
    for i in range(2):
        Image.new("RGB", (300, 300)).save(tmp_path / f"{i}.png")
    words = ("folder", str(tmp_path), "--size", str(size), "--net", net)
    config = parsed(monkeypatch, presets.PresetArguments, *words).config
    assert config.data.image_size == config.model.image_size == size
    assert config.train.batch_size // config.train.micro_batch_size >= 8
    with torch.device("meta"):
        net = build_net(config).eval()
        assert net(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64)).shape[2] == size


def test_the_preset_folder_has_the_classes_of_the_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Subfolders with images, however deep, if there are several."""

    def num_classes(*flags: str) -> int:
        words = ("folder", str(tmp_path), *flags)
        config: Config = parsed(monkeypatch, presets.PresetArguments, *words).config
        return config.model.num_classes

    for name in ("cats", "dogs"):
        (tmp_path / name / "2021/spring").mkdir(parents=True)
    for i in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"cats/2021/spring/{i}.png")
    assert num_classes() == 0  # the other one is empty
    Image.new("L", (8, 8)).save(tmp_path / "dogs/0.png")
    assert (num_classes(), num_classes("--model.num-classes", "0")) == (2, 0)
    Image.new("L", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match="stray"):
        num_classes()


def test_the_preset_folder_augments_few_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder_preset, "FEW", 4)
    for i in range(5):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    assert parsed(monkeypatch, presets.PresetArguments, "folder", str(tmp_path)).config.data.augment == 0.0
    (tmp_path / "4.png").unlink()
    words = "folder", str(tmp_path)
    assert parsed(monkeypatch, presets.PresetArguments, *words).config.data.augment == folder_preset.AUGMENT
    assert (
        parsed(monkeypatch, presets.PresetArguments, *words, "--data.augment", "0").config.data.augment == 0.0
    )
