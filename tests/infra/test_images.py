"""infra/images/Dockerfile, checked without Docker: linter, copied files, and its steps in a virtual environment."""

import re
import sys
import sysconfig
from pathlib import Path

import pytest
from support.processes import REPO, program, run

DOCKERFILE = REPO / "infra/images/Dockerfile"


def read_stages() -> dict[str, str]:
    """Stage -> its instructions."""
    parts = re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE.read_text(), re.M | re.S)
    return dict(parts)


def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    done = run([program("hadolint"), "--no-color", DOCKERFILE], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_copied_files_exist_and_are_in_the_build_context() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split()
    build_context = [line[1:] for line in ignored if line.startswith("!")]
    copied_paths = re.findall(r"^COPY (?!--from=)(?:--\S+ )*(\S+) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert copied_paths
    for path in copied_paths:
        assert (REPO / path).exists(), path
        assert path in build_context, path


def test_the_image_runs_as_user_1000() -> None:
    assert re.findall(r"^USER (\S+)", read_stages()["cluster"], re.M) == ["1000"]


@pytest.mark.slow
@pytest.mark.long
def test_the_steps_install_a_program_that_samples(tmp_path: Path) -> None:
    """Packages of this environment in the versions that infra/requirements.txt pins are not downloaded again."""
    venv, packages, home = (tmp_path / name for name in ("venv", "packages", "home"))
    packages.mkdir()
    home.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("ddpm_on_ray", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    assert run([sys.executable, "-m", "venv", "--without-pip", venv], cwd=tmp_path).returncode == 0
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    env = {"PYTHONPATH": "", "PATH": f"{venv}/bin:/usr/bin:/bin", "HOME": str(home)}
    text = "".join(read_stages()[stage] for stage in ("wheel", "cluster")).replace("\\\n", " ")
    text = re.sub(r"(?<![\w.])/(src|wheels|opt)\b", rf"{tmp_path}/\1", text)
    steps = re.findall(r"^RUN pip .*|^COPY .*", text, re.MULTILINE)
    assert len(steps) == 9
    for step in steps:
        *_, source, target = step.split()
        copy = f"mkdir -p {target} && cp -r {source}/. {target} 2>/dev/null || cp {source} {target}"
        command = copy if step.startswith("COPY") else re.sub(r"\bpip (?=[a-z])", "python -m pip ", step[4:])
        done = run(["sh", "-c", command], cwd=REPO, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run([venv / "bin/ddpm", "sample", "builtin:digits", "--num-images", "4"], cwd=home, env=env)
    assert done.returncode == 0 and (home / "samples").is_dir(), done.stderr
