"""infra/template, the template for Ray's gallery: its form, and that its notebook names what exists.

tests/test_notebooks.py runs the notebook.
"""

import ast
import importlib
import shlex
import sys
import tomllib
from typing import Any

import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from support.processes import REPO, program, run

from ddpm import api, cli

FOLDER = REPO / "infra/template"
(ENTRY,) = yaml.safe_load((FOLDER / "BUILD.yaml").read_text())
CONTENT = FOLDER / ENTRY["dir"]
NOTEBOOK = nbformat.read(CONTENT / "README.ipynb", 4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_the_entry_names_the_files_of_the_template() -> None:
    name, image = ENTRY["name"], ENTRY["cluster_env"]["byod"]
    assert ENTRY["dir"] == f"templates/{name}" and ENTRY["test"]["tests_path"] == f"tests/{name}/"
    assert (FOLDER / ENTRY["test"]["tests_path"] / ENTRY["test"]["command"].split()[-1]).is_file()
    assert ENTRY["compute_config"] == {"AWS": f"configs/{name}/aws.yaml", "GCP": f"configs/{name}/gce.yaml"}
    aws, gcp = (yaml.safe_load((FOLDER / path).read_text()) for path in ENTRY["compute_config"].values())
    for node in (*aws["worker_nodes"], *gcp["worker_nodes"], aws["head_node"], gcp["head_node"]):
        node.pop("instance_type")
    assert aws == gcp
    needed = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = (wants for wants in map(Requirement, needed) if wants.name == "ray")
    assert image["ray_version"] in ray.specifier
    assert image["docker_image"].endswith(f"/{name}:{image['ray_version']}")
    dockerfile = CONTENT / "Dockerfile"
    assert f"\nFROM anyscale/ray:{image['ray_version']}-" in dockerfile.read_text()
    linted = run([program("hadolint"), "--no-color", dockerfile], cwd=REPO)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_the_readme_is_made_from_the_notebook() -> None:
    nbconvert = pytest.importorskip("nbconvert")
    names = {"unique_key": "README", "output_files_dir": "README_files"}
    text, made = nbconvert.MarkdownExporter().from_notebook_node(NOTEBOOK, resources=names)
    assert (CONTENT / "README.md").read_text() == text
    pictures = {str(file.relative_to(CONTENT)): file.read_bytes() for file in CONTENT.glob("README_files/*")}
    assert pictures == made["outputs"] != {}


class Parsed(Exception):
    pass


def test_each_cell_compiles_and_names_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*args: Any, **kwargs: Any) -> None:
        raise Parsed

    monkeypatch.setattr(api, "launch", parsed)  # what ddpm.train calls with a config that it has checked
    cells = [TransformerManager().transform_cell(source) for source in CODE]
    with pytest.raises(Parsed):
        exec(cells[0], names := {})
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    for node in nodes:
        if isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert all(
                hasattr(importlib.import_module(node.module or ""), alias.name) for alias in node.names
            )
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    trainings = [call for call in calls if call.startswith("ddpm.train(")]
    assert len(trainings) == 3
    for training in trainings:
        with pytest.raises(Parsed):
            eval(training, names)


def test_its_commands_have_these_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = cli.parse

    def parse_only(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(cli, "parse", parse_only)
    cells = [source.replace("\\\n", "") for source in CODE if source.startswith("%%bash")]
    commands = [shlex.split(line) for cell in cells for line in cell.splitlines()[1:]]
    assert commands
    for program_name, command, *words in commands:
        assert program_name == "ddpm"
        monkeypatch.setattr(sys, "argv", [f"ddpm {command}", *words])
        with pytest.raises(Parsed):
            importlib.import_module(f"ddpm.commands.{command}").main()
