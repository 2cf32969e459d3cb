"""The program `ddpm`: its commands, and the wheel in a folder of its own, which needs no checkout."""

import importlib
import re
import shutil
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from support.processes import REPO, run

from ddpm.cli.program import COMMANDS, EXAMPLES, main
from ddpm.config import presets

SMALL = """--total-images 640 --model.base-width 8 --model.width-multipliers 1 2 --model.norm-groups 4
    --schedule.num-timesteps 50 --sample.num-sample-steps 5 --sample.num-images 4""".split()


def test_every_command_has_a_script_in_the_checkout() -> None:
    scripts = {path.stem for folder in ("jobs", "tune") for path in (REPO / folder).glob("*.py")}
    assert scripts == set(COMMANDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_command_that_is_an_example_names_what_to_use(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm", name, "bash"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: there is no COMMAND {name}; {EXAMPLES[name]}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_program_and_no_script(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["folder"] if name == "prepare" else ["digits"]):
        monkeypatch.setattr(sys, "argv", [f"ddpm {name}", *words, "--help-all"])
        with suppress(SystemExit):
            importlib.import_module(f"ddpm.cli.{name}").main()
    text = capsys.readouterr().out
    assert f"usage: ddpm {name}" in text and not re.findall(r"\S*(?:jobs|tune)/\S*", text)


def test_the_presets_are_listed_without_docstrings() -> None:
    """`python -OO` removes them."""
    done = run([sys.executable, "-OO", REPO / "jobs/train.py", "--help"], cwd=REPO)
    assert done.returncode == 0 and all(f"{name} " in done.stdout for name in presets.PRESETS)


def test_the_changelog_begins_with_the_version() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert f"# Changelog\n\n## {version} " in (REPO / "CHANGELOG.md").read_text()


def install(folder: Path) -> Path:
    """Build the wheel from a copy of the repository, and install it alone into `folder`/site; returns the wheel."""
    source = folder / "source"
    wheels = folder / "wheels"
    shutil.copytree(REPO / "ddpm", source / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    for words in (build, ["install", "--no-deps", "--no-index", "--target", folder / "site"]):
        done = run([*pip, *words, *wheels.glob("*.whl")], cwd=folder)
        assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_trains_and_samples_without_a_checkout(tmp_path: Path) -> None:
    wheel = install(tmp_path)
    site = tmp_path / "site"

    def ddpm(*words: str) -> tuple[int, str]:
        done = run([sys.executable, site / "bin/ddpm", *words], cwd=tmp_path, env={"PYTHONPATH": str(site)})
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    assert ddpm("--version") == (0, f"ddpm-on-ray {wheel.name.split('-')[1]}\n")
    code, text = ddpm("--help")
    assert code == 0 and all(f"\n    {name} " in text for name in COMMANDS)
    assert ddpm("tain") == (2, f"error: there is no COMMAND tain; it must be one of {', '.join(COMMANDS)}\n")
    code, text = ddpm("train", "--help")
    assert code == 0 and "usage: ddpm train PRESET" in text and "Train a preset: ddpm train PRESET" in text
    code, text = ddpm("train", "cifar10")
    assert code == 2 and "`ddpm prepare torchvision" in text and "then `ddpm train cifar10 " in text
    code, text = ddpm("train", "digits", "--name", "one", *SMALL)
    assert code == 0 and "trained     640 images" in text, text
    code, text = ddpm("sample", "runs/one", "--num-images", "4")
    assert code == 0 and (tmp_path / "samples/one-seed0/grid.png").is_file(), text
