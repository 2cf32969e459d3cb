"""Helpers that write a search's folder as its driver and its trials do."""

from collections.abc import Mapping
from typing import Any

from ddpm.config.presets import DIGITS
from ddpm.config.tree import Config
from ddpm.evaluation.rung import Evaluation, file_name
from ddpm.runs.storage import Location
from ddpm.search.trials import SearchFile, Trials, begin_search

SETTINGS: dict[str, Any] = {"config": {}, "space": {}, "rungs": [64, 128]}


def begin(
    folder: Location,
    settings: Mapping[str, Any] = SETTINGS,
    config: Config = DIGITS,
    kid: str = "KID-pixels",
    kid_images: int = 100,
) -> Trials:
    """The trials of a new search, or of one that exists."""
    return begin_search(folder, SearchFile.new(settings, config, kid, kid_images))


def measure(trials: Trials, name: str, evaluation: Evaluation) -> None:
    """Write a rung as a trial's process does, and take note of it as the driver does."""
    trials.folder.child(name).child(file_name(evaluation.images_seen)).write(evaluation.to_json())
    trials.reach(name, evaluation)
