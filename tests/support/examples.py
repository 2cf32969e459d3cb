"""The examples: modules of one, and the environment of a program that finds them."""

import importlib
from types import ModuleType

import pytest

from support import processes

FOLDER = processes.REPO / "examples"


def load(name: str, module: str) -> ModuleType:
    """The module `module` of the example `name`; its entry points stay unknown to this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER / name)
        return importlib.import_module(module)


def env(name: str) -> dict[str, str]:
    """The environment of a program that has the example `name` on its path."""
    return processes.python_path(FOLDER / name)
