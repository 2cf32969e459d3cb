"""Additions of installed packages, by name: sources (ddpm.sources) and nets (ddpm.nets).

A package enters what it adds in its metadata, as an entry point of the group. So a name out of a config.json, which
may come from anybody, finds what a person has installed for this purpose, and nothing else: it is no import path.
"""

from importlib.metadata import entry_points
from typing import Any

from ddpm.utils.errors import UserError


def names(group: str) -> list[str]:
    """The names that packages have entered in the group."""
    return sorted({found.name for found in entry_points(group=group)})


def load(group: str, name: str) -> Any:
    """The entry of a package under `name`; None: no package has one.

    Raises:
        UserError: it cannot be imported.
    """
    found = next(iter(entry_points(group=group, name=name)), None)
    try:
        return found.load() if found else None
    except Exception as error:  # whatever the code of a package raises when it is imported
        package = found.dist.name if found and found.dist else "unknown"
        raise UserError(
            f"{group}: {name!r} of the package {package} cannot be imported: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
