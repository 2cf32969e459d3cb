"""Fixtures: scikit-learn's digits as a data set, and a cache per test."""

from pathlib import Path

import pytest
import torch

from ddpm.data.prepare import prepare
from ddpm.data.reading import DataSet
from ddpm.data.sources.sources import Digits
from ddpm.evaluation import classifier
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.features import Cache
from ddpm.runs.storage import resolve


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train_digits(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    location = resolve(str(tmp_path_factory.mktemp("digits")))
    return DataSet(location, prepare(Digits(), location), "train")


@pytest.fixture(scope="session")
def held_out_digits(train_digits: DataSet) -> DataSet:
    held_out = train_digits.held_out()
    assert held_out is not None
    return held_out


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(resolve(str(tmp_path_factory.mktemp("cache"))))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(resolve(str(tmp_path / "cache")))


@pytest.fixture(scope="session")
def digits_classifier(train_digits: DataSet, session_cache: Cache) -> Classifier:
    return classifier.build(train_digits, session_cache, train_images=32_000)
