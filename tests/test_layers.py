"""Rules for modules that no linter checks: parts of a package, allow lists, modules without a layer."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import REPO, run

from ddpm.config.kinds import OBJECTIVES

MODULES = sorted(path for folder in ("ddpm", "jobs", "tune") for path in (REPO / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def imported(node: ast.AST) -> Iterator[str]:
    """Every module imported when `node` runs, that is, except under `if TYPE_CHECKING:`."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), names=names):
            yield from (f"{module}.{alias.name}" for alias in names)
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
            for statement in orelse:
                yield from imported(statement)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from imported(child)


IMPORTS = {name_of(path): list(imported(ast.parse(path.read_text()))) for path in MODULES}
"""Module -> the modules that it imports."""


@pytest.mark.parametrize(
    ("part", "owners"),
    [
        # driver, controller and worker code
        ("ray.train", r"ddpm\.training\.(worker_group|failures|worker)"),
        ("ray.data", r"ddpm\.data\.(ray_stream|encode)"),
        ("ray.tune", r"ddpm\.search\.(study|trainables|tune_callbacks)"),
    ],
)
def test_each_part_of_ray_has_its_owners(part: str, owners: str) -> None:
    users = [
        name for name, imports in IMPORTS.items() if any(f"{i}.".startswith(f"{part}.") for i in imports)
    ]
    assert [name for name in users if not re.fullmatch(owners, name)] == []


def test_git_ignores_no_file_of_the_repository() -> None:
    """Linters skip an ignored file, and `ray job submit` does not upload it."""
    listed = run(["git", "ls-files", "--cached", "--ignored", "--exclude-standard"], cwd=REPO)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == ""


@pytest.mark.parametrize("package", ["ddpm.diffusion", "ddpm.models"])
def test_the_mathematics_imports_only_torch(package: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    strangers = {
        (name, module)
        for name, imports in IMPORTS.items()
        for module in imports
        if name.startswith(package)
        and module.split(".")[0] not in allowed
        and not module.startswith(f"{package}.")
    }
    assert strangers == set()


def test_every_module_is_in_a_layer() -> None:
    """A module that the layers contract in pyproject.toml does not name would be free to import anything."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {module.strip(" ()") for layer in layers for module in layer.split("|")}
    homeless = [
        name
        for name in map(name_of, MODULES)
        if "." in name
        and not any(f"{name}.".startswith(f"{module}.") for module in named)
        and not any(module.startswith(f"{name}.") for module in named)
    ]
    assert homeless == []


def test_no_module_uses_private_parts_of_ray() -> None:
    """Only Ray's documented API is used: no private module is imported, and nothing in Ray is patched."""
    private = re.compile(r"_internal\b|ray\._private|setattr\(.*\bray\b")
    assert [path for path in MODULES if private.search(path.read_text())] == []


def test_process_names_are_compared_in_one_place_only() -> None:
    quoted = re.compile("|".join(f"[\"']{name}[\"']" for name in OBJECTIVES))
    found = {path.name for path in MODULES if quoted.search(path.read_text())}
    assert found == {"tree.py", "kinds.py"}
