"""Plugins of installed packages, by name: sources (ddpm.sources) and nets (ddpm.nets).

A package declares a plugin in its metadata, as an entry point of the group. A name in a config.json selects an
installed plugin: it is not an import path.
"""

from importlib.metadata import entry_points
from typing import Any

from ddpm.utils.errors import UserError


def names(group: str) -> list[str]:
    """The names of the plugins in the group."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load(group: str, name: str) -> Any:
    """The plugin `name`; None: no package declares it."""
    entry = next(iter(entry_points(group=group, name=name)), None)
    try:
        return entry.load() if entry else None
    except Exception as error:  # importing a package may raise anything
        package = entry.dist.name if entry and entry.dist else "unknown"
        raise UserError(
            f"{group}: {name!r} of the package {package} cannot be imported: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
