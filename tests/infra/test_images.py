"""infra/images/Dockerfile, checked without building it: linter, copied files, versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import servers
from support.processes import REPO, run

DOCKERFILE = REPO / "infra/images/Dockerfile"
TARGETS = ("cpu", "gpu", "mlflow")


def pins(path: Path) -> dict[str, str]:
    """Package -> version; every line must pin one."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (version,) = requirement.specifier
        assert version.operator == "==", line
        found[requirement.name] = version.version
    return found


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    done = run([servers.program("hadolint"), "--no-color", DOCKERFILE], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    build_context = [
        line[1:]
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
        if line[0] == "!"
    ]
    copied_paths = re.findall(r"^COPY (?:--\S+ )*(\S+) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert copied_paths
    for path in copied_paths:
        assert (REPO / path).exists(), path
        assert path in build_context, path


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_as_user_1000_and_pins_its_base_image(target: str) -> None:
    stages = {
        match[2]: (match[1], match[3])
        for match in re.finditer(
            r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE.read_text(), re.M | re.S
        )
    }
    base, body = stages[target]
    assert re.findall(r"^USER (\S+)", body, re.M)[-1:] == ["1000"]
    while base in stages:
        base = stages[base][0]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)


@pytest.mark.parametrize("file", ["infra/requirements.txt", "infra/mlflow/requirements.txt"])
def test_pinned_versions_are_allowed_by_the_package(file: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["server"]]
    pinned = pins(REPO / file)
    for requirement in map(Requirement, wanted):
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
    if file == "infra/requirements.txt":
        assert {Requirement(line).name for line in project["dependencies"]} <= pinned.keys()


def test_the_mlflow_server_and_its_clients_have_the_same_version() -> None:
    clients, server = (pins(REPO / f"infra/{folder}requirements.txt") for folder in ("", "mlflow/"))
    assert {name: server[name] for name in ("mlflow", "boto3")} == {
        n: clients[n] for n in ("mlflow", "boto3")
    }
    stack = (REPO / "infra/aws/stack.yaml").read_text()
    for line in (REPO / "infra/mlflow/requirements.txt").read_text().splitlines():
        assert line.startswith("#") or line in stack
