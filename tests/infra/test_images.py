"""infra/images/Dockerfile, checked without building it: linter and copied files."""

import re
from pathlib import Path

import pytest
from support.processes import REPO, program, run

DOCKERFILE = REPO / "infra/images/Dockerfile"


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    done = run([program("hadolint"), "--no-color", DOCKERFILE], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    build_context = [line[1:] for line in ignored if line.startswith("!")]
    copied_paths = re.findall(r"^COPY (?:--\S+ )*(\S+) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert copied_paths
    for path in copied_paths:
        assert (REPO / path).exists(), path
        assert path in build_context, path


@pytest.mark.parametrize("target", ["cpu", "gpu", "mlflow"])
def test_each_target_runs_as_user_1000_and_pins_its_base_image(target: str) -> None:
    parts = re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE.read_text(), re.M | re.S)
    stages = {name: (base, body) for base, name, body in parts}
    base, body = stages[target]
    assert re.findall(r"^USER (\S+)", body, re.M)[-1:] == ["1000"]
    while base in stages:
        base = stages[base][0]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
