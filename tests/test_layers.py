"""Layer rules that import-linter cannot check: parts of a package, allow lists, modules without a layer."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import REPO

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


def imports_of(path: Path) -> list[str]:
    return list(imported(ast.parse(path.read_text())))


def test_imported_finds_all_kinds_of_imports() -> None:
    code = """
from typing import TYPE_CHECKING
import a.b as c
if TYPE_CHECKING:
    import hidden
else:
    from d import e
def later():
    from f import g as h, i
"""
    assert list(imported(ast.parse(code))) == ["typing.TYPE_CHECKING", "a.b", "d.e", "f.g", "f.i"]


@pytest.mark.parametrize(
    ("part", "owners"),
    [
        # driver, controller and worker code
        (
            "ray.train",
            {f"ddpm.training.{name}" for name in ("worker_group", "failures", "worker", "mlflow_callback")},
        ),
        ("ray.data", {"ddpm.data.ray_dataset"}),
        ("ray.tune", {"ddpm.search.driver", "ddpm.search.study"}),
    ],
)
def test_each_part_of_ray_has_one_owner(part: str, owners: set[str]) -> None:
    users = {
        name_of(path)
        for path in MODULES
        for module in imports_of(path)
        if module == part or module.startswith(part + ".")
    }
    assert users <= owners


@pytest.mark.parametrize("package", ["ddpm/diffusion", "ddpm/models"])
def test_the_mathematics_imports_only_torch(package: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch"}
    own = package.replace("/", ".") + "."
    strangers = {
        f"{name_of(path)} -> {module}"
        for path in (REPO / package).glob("*.py")
        for module in imports_of(path)
        if module.split(".")[0] not in allowed and not f"{module}.".startswith(own)
    }
    assert strangers == set()


def test_every_module_is_in_a_layer() -> None:
    """A module that the layers contract in pyproject.toml does not name would be free to import anything."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {module.strip(" ()") for layer in layers for module in layer.split("|")}
    homeless = {
        name
        for path in MODULES
        if path.name != "__init__.py"
        and not any(f"{(name := name_of(path))}.".startswith(f"{f}.") for f in named)
    }
    assert homeless == set()


def test_no_module_uses_private_parts_of_ray() -> None:
    """Only Ray's documented API is used: no private module is imported, and nothing in Ray is patched."""
    private = re.compile(r"_internal\b|ray\._private|setattr\(.*\bray\b")
    assert [path for path in MODULES if private.search(path.read_text())] == []
