"""Exit codes and messages of jobs, for people and scripts."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import processes

from ddpm.cli import parsing
from ddpm.config import presets
from ddpm.config.tree import UNetConfig
from ddpm.utils.errors import UserError
from ddpm.utils.openmp import SPIN_COUNT


class ExpectedError(UserError):
    exit_code = 1


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "shown"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("no such bucket")), 2, "error: no such bucket\n"),
        (raising(ExpectedError("gave up")), 1, "error: gave up\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (raising(PermissionError(13, "Access to /x")), 2, "error: [Errno 13] Access to /x\n"),
        (raising(PermissionError(13, "No access", "/x")), 2, "error: /x: No access; make it accessible\n"),
        # external names must not inject lines or terminal commands
        (raising(UserError("no x\nerror: \x1b[2Jy\udc80")), 2, "error: no x\\nerror: \\x1b[2Jy\\udc80\n"),
    ],
)
def test_a_job_ends_with_an_exit_code_and_at_most_one_line(
    main: Callable[[], int | None], code: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsing.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == shown


def test_a_long_line_keeps_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsing.run(raising(UserError(f"{'a' * 400} and {'b' * 400}")))
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= 500 and line.startswith("error: aaa") and " ... " in line and line.endswith("bbb")


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        parsing.run(raising(ZeroDivisionError()))


STARTED = """
import time
from ddpm.cli import parsing
from ddpm.cluster import ray_init

def main():
    ray_init.connect()
    print("started", flush=True)
    time.sleep(600)

parsing.run(main)
"""


def test_sigterm_after_ray_has_started(tmp_path: Path) -> None:
    """Ray's own handler exits with 15."""
    with processes.Background([sys.executable, "-c", STARTED], log=tmp_path / "log") as job:
        job.wait_for(lambda: "started" in job.output)
        job.process.terminate()
        assert job.wait() == 128 + signal.SIGTERM, job.output
    assert "Traceback" not in job.output


@pytest.mark.parametrize(
    ("given", "spin_count"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_openmp_spin_count_can_be_overridden(given: dict[str, str], spin_count: str | None) -> None:
    """It is set before PyTorch is imported: jobs import PyTorch when they run."""
    program = "import os, sys; from ddpm.cli import compare, evaluate, export, prepare, sample, sync, train\n"
    program += "from ddpm.cli import parsing\n"
    program += (
        "assert 'torch' not in sys.modules\nparsing.run(lambda: print(os.environ.get('GOMP_SPINCOUNT')))"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=rest | given, cwd=processes.REPO, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{spin_count}\n", "")


CHATTY = """
import sys, time
from pathlib import Path
from ddpm.cli import parsing
from ddpm.utils.progress import Display

def main():
    print("begun", flush=True)
    sys.stdin.readline()  # until nobody reads any more
    with Display("images", 3) as display:
        for done in range(1, 4):
            display.update(done)
            print("x" * 100_000, "\u2248", file=sys.stderr)
    print("done", flush=True)
    Path("end").touch()

parsing.run(main)
"""


@pytest.mark.parametrize("reader", ["leaves", "full disk", "none from the start"])
def test_a_job_survives_a_closed_output_pipe(tmp_path: Path, reader: str) -> None:
    read_end, write_end = os.pipe()
    if reader == "full disk":
        os.close(write_end)
        write_end = os.open("/dev/full", os.O_WRONLY)
    with subprocess.Popen(
        [sys.executable, "-c", CHATTY],
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=write_end,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(processes.REPO)},
        preexec_fn=(lambda: os.closerange(1, 3)) if reader == "none from the start" else None,
    ) as job:
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            if reader == "leaves":
                assert pipe.readline() == b"begun\n"
        job.communicate(b"\n", timeout=600)
    assert job.returncode == 0
    assert (tmp_path / "end").exists()


def test_a_file_changes_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "best.json"
    file.write_text('{"schedule": {"kind": "sigmoid", "sigmoid_end": 2}, "optim": {"lr": 0.5}}')
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--config", str(file), "--optim.lr", "1"])
    digits = parsing.starting_point(presets.DIGITS)
    assert (digits.schedule.kind, digits.schedule.sigmoid_end, digits.optim.lr) == ("sigmoid", 2.0, 0.5)
    assert digits.schedule.num_timesteps == presets.DIGITS.schedule.num_timesteps
    monkeypatch.setattr(sys, "argv", ["train.py", "digits"])
    assert parsing.starting_point(presets.DIGITS) == presets.DIGITS


def test_a_net_can_be_chosen_for_every_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: Callable[[str], None]
) -> None:
    """The flag has precedence over the file, and keeps the file's settings that all nets share."""
    on_path("dit")
    file = tmp_path / "best.json"
    file.write_text('{"model": {"net": "dit", "depth": 3, "num_classes": 10}}')
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--config", str(file)])
    model = parsing.starting_point(presets.DIGITS).model
    assert (model.net, model.image_size, model.num_classes, vars(model)["depth"]) == ("dit", 8, 10, 3)
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--config", str(file), "--model.net=unet"])
    model = parsing.starting_point(presets.DIGITS).model
    assert model == UNetConfig(image_size=8, channels=1, num_classes=10)


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "is not JSON")])
def test_an_invalid_config_file_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    file = tmp_path / "best.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", "digits", "--config", str(file)])
    with pytest.raises(UserError, match=message) as raised:
        parsing.starting_point(presets.DIGITS)
    assert "best.json" in str(raised.value) and "\n" not in str(raised.value)
