"""The same command is the same run: which settings make a run's name, and whose folder it is."""

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm.cli import parsing
from ddpm.config import presets
from ddpm.config.json import override
from ddpm.config.presets import PresetArguments
from ddpm.data.sources import folder_preset
from ddpm.runs import run_folder, settings
from ddpm.utils.errors import UserError

OWN = "1" * 64
"""A fingerprint of data."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures."""
    where = tmp_path / "My photos (2)"
    where.mkdir()
    for level in (0, 9):
        Image.new("L", (8, 8), level).save(where / f"{level}.png")
    return where


def name_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The name of the run of a command line, as jobs/train.py makes it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    arguments: PresetArguments = parsing.parse_preset(PresetArguments, None, folder_preset.preset)
    config = run_folder.with_storage(arguments.config)
    preset = arguments.base
    fingerprint = OWN if settings.has_own_data(config, preset) is False else ""
    changed = settings.differences(config, preset, fingerprint)
    return settings.run_name(arguments.preset, preset.data.images, changed)


def test_a_run_is_named_by_its_preset(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    assert name_of(monkeypatch, "digits") == "digits"
    assert name_of(monkeypatch, "folder", str(pictures)) == "folder-My-photos-2-"
    monkeypatch.chdir(pictures)
    assert name_of(monkeypatch, "folder", ".") == "folder-My-photos-2-"


@pytest.mark.parametrize(
    "words",
    [
        "--storage elsewhere",
        "--workers 4 --cluster.cpus-per-worker 2",
        "--sampler ddpm --sample.num-images 9 --sample.seed 3",
        "--train.log-every-images 64 --train.checkpoint-every-images 64 --train.sample-every-images 0",
        "--train.keep-checkpoints 9 --train.compile True --train.forward-images 64",
        "--run.experiment other --run.storage-timeout-s 9",
        "--lr 0.004",  # the preset's
    ],
)
def test_what_changes_no_weight_is_not_in_the_name(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    assert name_of(monkeypatch, "digits", *words.split()) == "digits"


def test_what_changes_weights_or_the_task_makes_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = (
        "--total-images 64000",
        "--lr 0.5",
        "--schedule linear",
        "--seed 1",
        "--seed 2",
        "--train.init-from builtin:digits",
        "--model.base-width 8",
        "--data elsewhere",
        "--lr 0.5 --seed 1",
    )
    names = [name_of(monkeypatch, "digits", *words.split()) for words in changes]
    assert len({*names}) == len(changes)
    assert all(len(name) == len("digits-") + settings.DIGITS and name.startswith("digits-") for name in names)
    again = name_of(monkeypatch, "digits", "--train.seed=1", "--optim.lr", "0.5", "--workers", "2")
    assert again == names[-1]  # in another order


def test_the_length_of_a_folders_name_is_limited() -> None:
    name = settings.run_name("folder", "/x/" + "a" * 200, {"optim.lr": 0.5})
    assert len(name) == len("folder-") + settings.MAX_NAME + 1 + settings.DIGITS


@pytest.mark.parametrize(
    ("began", "now", "named"),
    [
        ({"optim.lr": 0.5}, {"optim.lr": 0.25}, ("optim.lr 0.5", "now 0.25")),
        ({}, {"train.seed": 1}, ("train.seed", "now 1")),
        ({"train.seed": 1}, {}, ("train.seed 1",)),
        ({settings.DATA: OWN}, {}, ("data 1111",)),
    ],
)
def test_the_folder_of_another_run_is_refused(
    began: dict[str, Any], now: dict[str, Any], named: tuple[str, ...]
) -> None:
    settings.check_same(began, dict(began), "runs/digits", "0.2")
    with pytest.raises(UserError) as error:
        settings.check_same(began, now, "runs/digits", "0.2")
    assert error.value.exit_code == 2
    for part in ("runs/digits", "0.2", "--run.name", *named):
        assert part in str(error.value)


def test_flags_that_a_finished_run_was_trained_without() -> None:
    trained = override(presets.DIGITS, {"optim.lr": 0.5, "run.name": "a"})
    typed = {"optim.lr": 0.5, "train.log_every_images": 64, "sample.sampler": "ddpm", "run.name": "a"}
    config = override(presets.DIGITS, typed | {"run.storage": "elsewhere", "data.shards": "there"})
    flags = settings.flags_without_effect(config, presets.DIGITS, trained)
    assert flags == ["--train.log-every-images 64", "--sample.sampler ddpm"]
