"""Every program of benchmarks/ runs, as small as it gets, and leaves nothing but its tables; known answers of some."""

import math
import re
import runpy
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cifar
import pytest
import scale
from filelock import FileLock
from harness import judged, turns
from support import autoencoders
from support.processes import REPO, python_path, run, run_job

from ddpm.config.presets import CIFAR10
from ddpm.runs import curves, storage
from ddpm.runs.curves import CurveRow

# The search whose results some of the programs read; its trials are runs.
SEARCH = """digits --name s --searcher random --num-trials 2 --num-rungs 1 --num-images 20
    --finalists 2 --drawn-images 40 --features pixels
    --schedule.num-timesteps 60 --model.base-width 8 --model.width-multipliers 1 2 --model.norm-groups 4
    --train.total-images 640 --train.log-every-images 320 --train.sample-every-images 0 --train.held-out-images 20
    --sample.num-images 4 --sample.num-sample-steps 4""".split()
LIBRARIES = {"data_sets", "data_table"}
INPUTS = {
    "honesty": ["learned", "{run}"],
    "latents": ["{latents}"],
    "samplers": ["builtin:digits"],
    "search": ["{search}"],
}
IN_CI = {"step"}
"""The others are left to the night."""
PROGRAMS = sorted(file.stem for file in (REPO / "benchmarks").glob("*.py") if file.stem not in LIBRARIES)
MORE = [("honesty", ["fewer", "{run}"]), ("honesty", ["search", "{search}"])]
MEASURED = scale.Measured(20_000, 5_000, 4, 1e9, 1e9, 100, 1e-6)
COUNT = """
import subprocess, sys, time
if sys.argv[1:] != ["child"]:
    subprocess.Popen([sys.executable, __file__, "child"])
with open("child" if sys.argv[1:] else "parent", "a", buffering=1) as file:
    while True:
        file.write(".")
        file.flush()
        time.sleep(0.001)
"""


@pytest.fixture(scope="module")
def search(common_folder: Path) -> Path:
    """A finished search: one for all pytest processes."""
    folder = common_folder / "search"
    with FileLock(f"{folder}.lock"):
        if not (folder / "runs/s/best.json").exists():
            folder.mkdir(exist_ok=True)
            done = run([sys.executable, REPO / "tune/search.py", *SEARCH], cwd=folder)
            assert done.returncode == 0, done.stderr
    return folder / "runs/s"


@pytest.fixture
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of latents."""
    folder = tmp_path_factory.mktemp("latents")
    autoencoders.write_photos(folder / "photos")
    autoencoders.write_autoencoder(folder / "vae")
    stages = (
        ("prepare", "folder", "pixels", "--path", "photos", "--size", autoencoders.SIZE),
        ("encode", "pixels", "latents", "--autoencoder", "diffusers:vae"),
    )
    for words in stages:
        done = run_job(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "latents"


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_benchmark_imports_exists(program: str) -> None:
    runpy.run_path(str(REPO / "benchmarks" / f"{program}.py"), run_name="imported")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param(name, words, marks=() if name in IN_CI else pytest.mark.long)
        for name, words in [*((name, INPUTS.get(name, [])) for name in PROGRAMS), *MORE]
    ],
    ids=str,
)
def test_a_benchmark_runs(
    program: str, words: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    inputs = {}
    if "{latents}" in words:
        inputs["latents"] = request.getfixturevalue("latents")
    elif any("{" in word for word in words):
        folder: Path = request.getfixturevalue("search")
        inputs = {"search": folder, "run": min(folder.glob("*/trial.json")).parent}
    script = REPO / "benchmarks" / f"{program}.py"
    command = [sys.executable, script, *(word.format(**inputs) for word in words), "--smoke"]
    tables = {file: file.read_bytes() for file in script.parent.glob("*.*")}
    with tempfile.TemporaryDirectory(dir="/tmp") as temp_dir:  # short, since paths of sockets are limited
        env = python_path(REPO / "tests", REPO / "benchmarks", REPO / "examples/consistency") | {
            "TMPDIR": temp_dir
        }
        done = run(command, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        if program != "honesty":  # which prints its tables
            assert list(Path(temp_dir).glob("smoke-*/*.md"))
    assert {file: file.read_bytes() for file in script.parent.glob("*.*")} == tables
    assert {file.name for file in tmp_path.iterdir()} <= {"runs"}


@pytest.mark.slow
def test_the_losses_that_show_that_a_change_does_not_affect_them(tmp_path: Path) -> None:
    words = ["--case", "digits", "--losses", "20", "--only", "ours, float32", "--without", "compiled"]
    done = run([sys.executable, REPO / "benchmarks/step.py", *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "digits: ours, float32: 0.9" in done.stdout and done.stdout.count(", 0.") == 1


def test_a_contestant_and_its_children_are_suspended_between_turns(tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    contestant = turns.Contestant([sys.executable, str(script)], tmp_path, {})
    files = [tmp_path / "parent", tmp_path / "child"]

    def sizes() -> list[int]:
        return [file.stat().st_size if file.exists() else 0 for file in files]

    with turns.ended_after([contestant]):
        while 0 in sizes():
            contestant.turn(0.2)
        time.sleep(0.3)  # a signal takes effect a moment later
        stopped = sizes()
        time.sleep(0.3)
        assert sizes() == stopped
        while any(now <= then for now, then in zip(sizes(), stopped, strict=True)):
            contestant.turn(0.2)
    time.sleep(0.3)
    ended = sizes()
    time.sleep(0.1)
    assert sizes() == ended
    assert all(a.ended <= b.began for a, b in pairwise(contestant.turns))


def test_a_contestant_that_ends_by_itself(tmp_path: Path) -> None:
    for code in (0, 3):
        contestant = turns.Contestant(["sh", "-c", f"exit {code}"], tmp_path, {})
        contestant.turn(30)
        assert contestant.ended and contestant.failed == (code > 0)


def test_the_time_to_a_value_is_interpolated_in_log_log() -> None:
    curve = [(4.0, 0.25), (1.0, 4.0), (2.0, 1.0), (8.0, 0.3)]
    assert judged.crossing(curve, 1.0) == pytest.approx(2)
    assert judged.crossing(curve, 0.5) == pytest.approx(2 * math.sqrt(2))  # half way from 1 to 1/4
    assert judged.crossing(curve, 5.0) == 1  # reached at the first point
    assert judged.crossing(curve, 0.2) == math.inf
    points = [judged.Judged("ours", 0, minutes, 0.0, kid, kid / 10, 500) for minutes, kid in curve]
    assert judged.span(points, 0.5) == "2.8 (2.7 to 3.0)"
    assert judged.span(points, 0.24) == "> 8.0"


def test_training_time_is_that_of_the_steps_on_however_many_workers(tmp_path: Path) -> None:
    """1,000 images at 10/s by two workers; 1,000 at 5/s, with a checkpoint; 1,000 at 10/s by one; later ones."""
    rates = ((1000, 10, 2), (2000, 5, 2), (3000, 10, 1), (4000, 1, 1))
    rows = list[CurveRow]()
    for seen, rate, workers in rates:
        rows += [CurveRow("train/images_per_s", seen, rate, 0), CurveRow("train/workers", seen, workers, 0)]
    name, data = curves.part(0, rows, 1)
    run = storage.resolve(str(tmp_path))
    run.child(name).write(data)
    minutes, of_all, slower = cifar.trained(run, 3000, workers=4)
    assert (minutes * 60, of_all * 60) == pytest.approx((400, 700))
    assert slower == pytest.approx(1 / 4)  # 300 s at the median rate


def test_an_all_reduce_of_one_costs_nothing_and_of_many_twice_the_gradient() -> None:
    assert scale.all_reduce_s(1, 1e9) == 0
    sending = scale.all_reduce_s(8, 1e9) - 2 * 3 * scale.public("latency")
    assert sending * scale.public("nvlink") * scale.public("bus_share") == pytest.approx(2 * 7 / 8 * 1e9)
    assert scale.all_reduce_s(256, 1e9) > scale.all_reduce_s(8, 1e9)


def test_the_flops_of_a_net_are_those_of_its_convolutions() -> None:
    """The net of Ho et al. for CIFAR-10 has 6.1 G multiply-adds: Fang et al. 2023 (arXiv:2305.10924), Table 1."""
    assert scale.flops_per_image(CIFAR10) / 3 / 2 == pytest.approx(6.1e9, rel=0.03)


def test_a_slow_link_shows_once_the_backward_pass_no_longer_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = scale.plan(CIFAR10, 256, 0.2, MEASURED)
    assert hidden.step_s == scale.plan(CIFAR10, 1, 0.2, MEASURED).step_s
    monkeypatch.setitem(scale.PUBLIC, "network", (1e9, "a slow one"))
    shown = scale.plan(CIFAR10, 256, 0.2, MEASURED)
    assert shown.step_s - hidden.step_s == pytest.approx(shown.all_reduce_s - 2 / 3 * hidden.step_s)


def test_faster_reading_needs_fewer_cores() -> None:
    plans = [scale.plan(CIFAR10, 8, 0.2, replace(MEASURED, raw_rows=rows)) for rows in (20_000, 40_000)]
    assert plans[0].cores == pytest.approx(2 * plans[1].cores)
    assert plans[0].bytes == plans[1].bytes == pytest.approx(plans[0].images * 32 * 32 * 3)


def test_the_page_has_the_numbers_of_this_script() -> None:
    text = scale.OUT.read_text()
    assert [gpus for gpus in scale.GPUS if not re.search(rf"^\| `cifar10` \| {gpus} \|", text, re.M)] == []
    assert all(source in text for _, source in scale.PUBLIC.values())
