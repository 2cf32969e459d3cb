"""The program `ddpm`: its completion, and the wheel in a folder of its own, which needs no checkout."""

import importlib
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support import wheels
from support.processes import REPO, run

from ddpm import cli, presets
from ddpm.commands import COMMANDS, completion
from ddpm.config_io import flatten
from ddpm.utils import command_line
from ddpm.utils.errors import UserError

SMALL = """--total-images 640 --model.base-width 8 --model.width-multipliers 1 2 --model.norm-groups 4
    --schedule.num-timesteps 50 --sample.num-sample-steps 5 --sample.num-images 4""".split()


def test_every_command_has_a_script_in_the_checkout() -> None:
    scripts = {path.stem for folder in ("jobs", "tune") for path in (REPO / folder).glob("*.py")}
    assert scripts == set(COMMANDS) - {"completion"}  # which is of `ddpm` alone


COMPLETED = {
    "ddpm tr": ["train"],
    "ddpm train dig": ["digits"],
    "ddpm train digits --train.tot": ["--train.total-images"],
    "ddpm search fashion-mnist --num-t": ["--num-trials"],
    "ddpm prepare folder pictures --si": ["--size"],
    "ddpm sample builtin:f": ["fashion-mnist"],  # bash replaces what is behind the colon
    "ddpm sample runs/one --num-images 4 --samp": ["--sampler"],
    "ddpm train digits --config ": [],  # bash completes files
    "ddpm completion ": ["bash", "zsh", "fish"],
}
BASH = 'for COMP_LINE; do COMP_POINT=${#COMP_LINE}; _ddpm; echo "${COMPREPLY[@]}"; done'
FISH = "for line in $argv[2..]; echo (complete -C $line); end"  # bash leaves $0 out by itself


@pytest.mark.parametrize(
    ("shell", "words", "each"),
    [("bash", ["-uc"], BASH), ("fish", ["--no-config", "-c"], FISH)],
    ids=["bash", "fish"],
)
def test_a_shell_completes_commands_names_and_flags(
    shell: str,
    words: list[str],
    each: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing; `apt-get install {shell}` brings it")
    monkeypatch.setattr(sys, "argv", ["ddpm completion", shell])
    monkeypatch.setenv("COLUMNS", "30")
    completion.main()
    script = capsys.readouterr().out + each

    def completed(*lines: str) -> list[list[str]]:
        done = run([shell, *words, script, shell, *lines], cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        return [line.split() for line in done.stdout.splitlines()]

    expected = COMPLETED
    if shell == "fish":  # which sorts, and replaces whole words
        expected = {line: sorted(found) for line, found in COMPLETED.items()}
        expected["ddpm sample builtin:f"] = ["builtin:fashion-mnist"]
    assert completed(*expected) == [*expected.values()]
    (flags,) = completed("ddpm train digits --")
    known = {f"--{key.replace('_', '-')}" for key in flatten(presets.DIGITS)} | {*cli.SHORT.values()}
    own = {"--help", "--help-all", "--config", "--verbose", "--no-verbose"}
    assert known | own == {flag for flag in flags if ".no-" not in flag}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("run `python jobs/sync.py runs/a`", "run `ddpm sync runs/a`"),
        ("it is no result of jobs/evaluate.py", "it is no result of ddpm evaluate"),
        ("/home/me/jobs/a.json and /home/me/jobs/a.py", "/home/me/jobs/a.json and /home/me/jobs/a.py"),
    ],
)
def test_without_a_checkout_messages_name_the_program(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command_line.installed(text) == text
    monkeypatch.setattr(command_line, "IN_CHECKOUT", False)
    assert command_line.installed(text) == shown


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_checkout_help_names_no_script_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "IN_CHECKOUT", False)
    for words in ([], ["folder"] if name == "prepare" else ["digits"]):
        monkeypatch.setattr(sys, "argv", [f"ddpm {name}", *words, "--help-all"])
        with suppress(SystemExit, UserError):  # no shell is called digits
            importlib.import_module(f"ddpm.commands.{name}").main()
    text = capsys.readouterr().out
    assert f"usage: ddpm {name}" in text and not re.findall(r"\S*(?:jobs|tune)/\S*", text)


@pytest.mark.slow
def test_the_wheel_trains_and_samples_without_a_checkout(tmp_path: Path) -> None:
    wheel, site = wheels.install(tmp_path), tmp_path / "site"

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
