"""Fixtures of the examples."""

from collections.abc import Callable

import pytest
from support import examples


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put the folder of an example on this process's path: its entry points are found, though it is not installed."""
    return lambda name: monkeypatch.syspath_prepend(examples.FOLDER / name)
