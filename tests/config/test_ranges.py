"""A value outside its field's range is one line with key, value and range, before Ray or PyTorch starts."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import BaseMetadata, GroupedMetadata

from ddpm.cli import compare, evaluate, export, parsing, sample, sync
from ddpm.config import kinds
from ddpm.config.json import check_values, flatten, from_json, override, to_json
from ddpm.config.presets import DIGITS, PresetArguments
from ddpm.config.tree import Config, NumScoredImages
from ddpm.data.sources import folder_preset
from ddpm.evaluation.feature_scores import LEAST_IMAGES
from ddpm.search import config as search_config
from ddpm.utils.errors import UserError

BAD = {
    "data.split": ("", "have at least 1 character"),
    "data.stall_timeout_s": (0.0, "greater than 0"),
    "schedule.num_timesteps": (10**12, "at most 1000000"),
    "objective.label_dropout": (-0.1, "at least 0"),
    "model.dropout": (1.0, "less than 1"),
    "optim.lr": (-1.0, "greater than 0"),
    "train.seed": (10**20, "less than 9223372036854775808"),
    "cluster.gpus_per_worker": (1.5, "at most 1"),
    "run.storage": ("", "have at least 1 character"),
}


def with_value(key: str, value: Any) -> Config:
    """DIGITS with `value` at `key`, unchecked."""
    group, name = key.split(".")
    changed = dataclasses.replace(getattr(DIGITS, group), **{name: value})
    return dataclasses.replace(DIGITS, **{group: changed})


def error_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", *words])
    with pytest.raises(UserError) as raised:
        parsing.parse_preset(PresetArguments, None, folder_preset.preset)
    return str(raised.value)


@pytest.mark.parametrize("key", BAD)
@pytest.mark.lowest
def test_the_line_is_the_same_from_flag_file_and_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str
) -> None:
    value, right = BAD[key]
    line = f"{key} is {value!r}; it must {right if 'have' in right else f'be {right}'}"
    assert error_of(monkeypatch, f"--{key.replace('_', '-')}={value}") == line
    file = tmp_path / "config.json"
    file.write_text(to_json(with_value(key, value)))
    assert error_of(monkeypatch, "--config", str(file)) == f"{file}: {line}"
    with pytest.raises(UserError) as raised:
        from_json(file.read_text())
    assert str(raised.value) == f"config.json: {line}"


@pytest.mark.parametrize("key", [key for key, value in flatten(Config()).items() if isinstance(value, float)])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_every_number_is_finite(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    line = f"{key} is {value}; it must be a finite number"
    assert error_of(monkeypatch, f"--{key.replace('_', '-')}={value}") == line


def test_zero_turns_an_interval_off() -> None:
    keys = ("log_every_images", "checkpoint_every_images", "sample_every_images", "held_out_images")
    check_values(override(DIGITS, {f"train.{key}": 0 for key in keys}))


JOBS = {
    "search digits --num-trials 0": "num_trials is 0; it must be at least 1",
    "search digits --lr -1": "optim.lr is -1.0; it must be greater than 0",
    "sample a --num-images 0": "num_images is 0; it must be at least 1",
    "evaluate a --num-sample-steps 0": "num_sample_steps is 0; it must be at least 1",
    "evaluate a --data=": "shards is ''; it must have at least 1 character",
    "sync a --timeout-s 0": "timeout_s is 0.0; it must be greater than 0",
    "compare a --out=": "out is ''; it must have at least 1 character",
    "prepare digits a --test-images 0": "test_images is 0; it must be at least 1",
}


@pytest.mark.parametrize("command_line", JOBS)
def test_jobs_check_their_own_flags(
    user_error: Callable[..., str], tmp_path: Path, command_line: str
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").touch()
    assert user_error(*command_line.split()) == JOBS[command_line]


UNBOUNDED = {"sigmoid_start", "sigmoid_end", "guidance_interval", "num_workers"}
"""Any number, or checked with another: schedules.sigmoid, guidance.check_interval, ClusterConfig.world_sizes."""


def unbounded(kind: Any) -> bool:
    """Whether `kind` allows a number or a text without a range."""
    if typing.get_origin(kind) is Annotated:
        inner, *marks = typing.get_args(kind)
        return not any(isinstance(mark, (BaseMetadata, GroupedMetadata)) for mark in marks) and unbounded(
            inner
        )
    if typing.get_origin(kind) in (typing.Union, types.UnionType, tuple):
        return any(map(unbounded, typing.get_args(kind)))
    return kind in (int, float)


def test_every_number_has_a_range() -> None:
    groups = [kind for kind in typing.get_type_hints(Config).values() if kind is not Config]
    classes = [*groups, search_config.Arguments]
    classes += [kind.load() for kind in [*kinds.NETS.values(), *kinds.SOURCES.values()]]
    classes += [job.Arguments for job in (compare, evaluate, export, sample, sync)]
    found = {
        f.name
        for cls in classes
        for f in dataclasses.fields(cls)
        if f.init and unbounded(typing.get_type_hints(cls, include_extras=True)[f.name])
    }
    assert found <= UNBOUNDED
    assert typing.get_args(NumScoredImages)[1].ge == LEAST_IMAGES
