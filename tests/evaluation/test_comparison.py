"""Runs read back from folders, buckets and MLflow, and the page that compares them."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.reported import drawn, made, near, result

from ddpm.checkpoints import runs
from ddpm.config import flatten, from_json, override, to_json
from ddpm.evaluation import comparison, comparison_page
from ddpm.evaluation.compared_run import GIF, RATE, ComparedRun, Point, read
from ddpm.evaluation.comparison import Cell, Ranking, results_alike
from ddpm.evaluation.report import Report
from ddpm.evaluation.scores import Score
from ddpm.presets import DIGITS
from ddpm.storage import locations
from ddpm.tracking.metrics_buffer import Artifact, MetricsBuffer, segment_name
from ddpm.tracking.mlflow_client import tracking_uri
from ddpm.tracking.mlflow_runs import Address, MlflowRun
from ddpm.tracking.uploader import Uploader
from ddpm.utils import images
from ddpm.utils.errors import UserError
from jobs import compare

EXPERIMENT = "compared"
STEPS = (1000, 2000, 3000)
NASTY = "<script>alert(1)</script>&amp;\"'$x_{"


def grid(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, np.uint8)


def make_run(storage: str, name: str, level: int = 0, **changes: Any) -> tuple[str, str]:
    """Write a run's folder as training does while MLflow is down; returns its URI and its run key."""
    run = runs.open_run(name, storage)
    config = override(DIGITS, {"run.experiment": EXPERIMENT, "run.name": name, **changes})
    kept = run.location.child(f"checkpoint-{STEPS[-1]:012d}")
    kept.child("config.json").write(to_json(config).encode())
    kept.child("checksums.json").write(b"{}")
    buffer = MetricsBuffer()
    buffer.artifact("config.json", to_json(config).encode())
    for i, at in enumerate(STEPS):
        values = {"train/loss": 1 / (i + 1 + level), RATE: 100.0, "held_out/loss": 0.5 - i / 10, "other": 1.0}
        buffer.metrics(values, at)
        buffer.image("samples", grid(level + i), at)
        run.location.child(f"samples/{at:012d}.png").write(images.png_bytes(grid(level + i)))
    gif = images.gif_bytes([grid(level), grid(level + 9)])
    buffer.artifact(GIF, gif)
    run.location.child(GIF).write(gif)
    segment = buffer.take()
    assert segment is not None
    run.location.child(f"tracking/{segment_name(STEPS[-1])}").write(segment)
    return run.location.uri, run.key


def deliver(uri: str, key: str) -> str:
    """Deliver the run's spool to MLflow; returns the MLflow run ID."""
    run = runs.existing_run(uri)
    card = run.location.child(f"checkpoint-{STEPS[-1]:012d}").child("config.json")
    params = flatten(from_json(card.read().decode()))
    uploader = Uploader(
        Address(tracking_uri(), EXPERIMENT, run.name, key), params, run.location.child("tracking")
    )
    uploader.committed(STEPS[-1])
    done = uploader.close("FINISHED", timeout_s=60)
    assert done.undelivered == 0 and done.run_id is not None
    return done.run_id


def content_of(run: ComparedRun) -> tuple[Any, ...]:
    """Everything about a run that does not depend on where it was read from."""
    assert run.trajectory is not None
    digests = {at: hashlib.sha256(grid()).hexdigest() for at, grid in run.grids.items()}
    return run.name, run.key, dict(run.settings), dict(run.curves), digests, run.trajectory()


class Page(HTMLParser):
    """Parses text, tags and images of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_run_is_the_same_from_its_spool_and_from_mlflow(tmp_path: Path) -> None:
    uri, key = make_run(str(tmp_path), "a")
    (waiting,) = read([uri])
    assert waiting.curves["train/loss"] == [Point(1000, 1.0), Point(2000, 0.5), Point(3000, 1 / 3)]
    assert waiting.settings["schedule.kind"] == "cosine" and "other" not in waiting.curves
    assert list(waiting.grids) == list(STEPS) and waiting.images_seen == 3000
    assert len(waiting.remarks) == 1 and "does not have this run" in waiting.remarks[0]
    run_id = deliver(uri, key)
    assert not list(Path(uri, "tracking").iterdir())
    delivered, again = read([uri, run_id, uri])[0], read([run_id])[0]
    assert content_of(delivered) == content_of(waiting) and delivered.remarks == []
    assert content_of(again) == content_of(waiting) and run_id in again.where
    assert len(read([uri, run_id])) == 1  # one run, given twice


def test_a_run_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    there, here = make_run(f"{s3_bucket}/runs", "a")[0], make_run(str(tmp_path), "a")[0]
    (of_bucket,), (of_folder,) = read([there]), read([here])
    assert content_of(of_bucket)[2:] == content_of(of_folder)[2:]


def test_without_mlflow_curves_come_from_the_spool_with_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [make_run(str(tmp_path), name)[0] for name in "ab"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setattr("ddpm.evaluation.compared_run.MLFLOW_TIMEOUT_S", 0.5)
    for run in read(uris):
        (remark,) = run.remarks
        assert "MLflow at http://127.0.0.1:9 cannot be read" in remark and "secret" not in remark
        assert run.curves  # from the spool


def test_a_run_without_a_checkpoint_and_a_damaged_spool(tmp_path: Path) -> None:
    new = runs.open_run("new", str(tmp_path)).location
    new.child(f"samples/{1:012d}.png").write(images.png_bytes(grid(0)))
    uri, _ = make_run(str(tmp_path), "torn")
    Path(uri, "tracking", segment_name(1)).write_bytes(b"no zip")
    fresh, torn = read([new.uri, uri])
    assert list(fresh.grids) == [1] and "has no checkpoint yet" in fresh.remarks[0]
    assert any("is damaged" in remark for remark in torn.remarks) and torn.curves["train/loss"]
    page = Page(comparison_page.render([fresh, torn]))
    assert "new: " in page.text and "has no checkpoint yet" in page.text


def test_evaluations_are_found_in_mlflow_and_in_files(tmp_path: Path) -> None:
    uri, key = make_run(str(tmp_path), "a")
    deliver(uri, key)
    found = made(dataclasses.replace(result(3, near(0.03), drawn(2, 20)), run="a", run_key=key))
    png = images.png_bytes(grid(7))
    address = Address(tracking_uri(), EXPERIMENT, "a", key)
    mlflow = MlflowRun(address, {}, 60)
    assert mlflow.find()
    stored = found.to_json().encode()
    records = [Artifact("evaluation/x.json", stored), Artifact("evaluation/bad.json", b"[")]
    # Only the first of two sampling configs has a plot, so its file name has no suffix.
    assert mlflow.add([*records, Artifact("evaluation/x-nearest.png", png)])
    (run,) = read([uri])
    assert [remark for remark in run.remarks if "bad.json in MLflow is not a result" in remark]
    Path(tmp_path, "y.json").write_bytes(stored)
    Path(tmp_path, "y-nearest.png").write_bytes(png)
    (both,) = read([uri], [str(tmp_path / "y.json")])
    for report in both.evaluations:
        (of_report,) = report.results
        assert [way.nearest for way in of_report.drawn] == [png, b""]
        assert dataclasses.replace(of_report, drawn=found.results[0].drawn) == found.results[0]
    assert len(both.evaluations) == 2
    page = Page(comparison_page.render([both]))
    (shown,) = [image for image in page.all("img") if "nearest training images" in str(image["alt"])]
    assert base64.b64decode(str(shown["src"]).partition(",")[2]) == png
    assert "4.2% (95 % interval 3.0% to 7.0%) are nearer to a training image, by pixels" in page.text


def test_a_report_is_read_back_as_it_was() -> None:
    odd = Score("KID-pixels", math.nan, math.nan, 500, 90)
    ways = drawn(2, 10, own=False, guidance_interval=(0.1, 2.0)), near(0.03, 20)
    found = made(result(1, *ways), result(2))
    assert Report.from_json(found.to_json(), "x.json") == found
    unknown = dataclasses.replace(drawn(1), scores=(odd, *near(0.03).scores))
    (back,) = Report.from_json(made(result(1, unknown)).to_json(), "x.json").results
    assert back.drawn[0].scores == near(0.03).scores
    for damaged in (
        "",
        "[]",
        "{}",
        '{"format": "x"}',
        found.to_json().replace('"n": 90', '"n": "a"'),
        "[" * 100_000,
    ):
        with pytest.raises(UserError, match=r"^x\.json is not a result of jobs/evaluate\.py: .") as raised:
            Report.from_json(damaged, "x.json")
        assert "\n" not in str(raised.value)


def run(name: str, **parts: Any) -> ComparedRun:
    return ComparedRun(name, f"key{name}", f"runs/{name}", **parts)


def test_only_settings_that_differ_are_shown() -> None:
    one = {
        "schedule.kind": "cosine",
        "optim.lr": "0.1",
        "run.name": "a",
        "run.storage": "x",
        "model.depth": "3",
    }
    two = {"schedule.kind": "linear", "optim.lr": "0.1", "run.name": "b", "run.storage": "y"}
    found = comparison.differences([run("a", settings=one), run("b", settings=two), run("c")])
    assert found == {"schedule.kind": ["cosine", "linear", None], "model.depth": ["3", None, None]}
    assert comparison.differences([run("a", settings=one), run("b", settings=one)]) == {}
    page = Page(comparison_page.render([run("a", settings=one), run("b", settings=two)]))
    assert "schedule.kind" in page.text and "optim.lr" not in page.text and "run.storage" not in page.text


def test_hours_count_training_time_only() -> None:
    """3,600 images at 100 images/s take 0.01 hours, the next 3,600 at 50 images/s take 0.02."""
    found = run("a", curves={RATE: [Point(3600, 100.0), Point(7200, 50.0)]})
    assert [found.hours(at) for at in (0, 1800, 3600, 7200, 7201)] == pytest.approx(
        [0, 0.005, 0.01, 0.03, None]
    )
    assert run("b").hours(100) is None


def test_ranks_have_ties_and_need_equal_evaluation_settings() -> None:
    bits = {"a": (3.0, 0.01), "b": (2.0, 0.01), "c": (2.001, 0.01)}
    results = [
        result(2, run=name, bits=(Score("bits/dim", value, error, 90),))
        for name, (value, error) in bits.items()
    ]
    older = result(1, run="a", bits=(Score("bits/dim", 1.0, 0.01, 90),))
    other = Report({**made().settings, "num_images": 7}, (result(9, run="a"), result(9, run="b")))
    shared = [made(older, *results), other]
    compared = [run(name, evaluations=shared) for name in "abc"]
    found = results_alike(compared)
    assert {key: sorted(of_run) for key, of_run in found.items()} == {
        "keya": [1000, 2000],
        "keyb": [2000],
        "keyc": [2000],
    }
    (ranking,) = comparison.rankings(compared, found)
    assert {key: (cell.value, str(cell.rank)) for key, cell in ranking.cells.items()} == {
        "keya": (3.0, "3"),
        "keyb": (2.0, "1-2"),
        "keyc": (2.001, "1-2"),
    }
    assert "3.0000 ± 0.0100, rank 3 (2,000 images seen)" in " ".join(
        Page(comparison_page.render(compared)).text.split()
    )


def test_evaluations_that_differ_only_in_the_neighbour_search_are_merged() -> None:
    """Paths of the data and --num-train-images do not affect the ranked scores."""
    first, second = made(result(1, drawn(1))), made(result(1, drawn(1, 10, own=False)))
    second = Report({**second.settings, "num_train_images": 0}, second.results)
    second.settings["data"]["shards"] = "elsewhere"
    (of_run,) = results_alike([run("a", evaluations=[first, second])]).values()
    assert sorted(of_run[1000].ways) == ["ddim-10", "ddim-50"]


def test_without_evaluations_held_out_bits_of_training_are_ranked() -> None:
    def curve(value: float) -> dict[str, list[Point]]:
        return {"held_out/bits_per_dim": [Point(10, 9.0, 0.1), Point(20, value, 0.1)]}

    compared = [run("a", curves=curve(3.0)), run("b", curves=curve(2.0)), run("c")]
    (ranking,) = comparison.rankings(compared, {})
    assert {key: str(cell.rank) for key, cell in ranking.cells.items()} == {"keya": "2", "keyb": "1"}
    losses = [run(name, curves={"train/loss": [Point(1, 0.1, 0.1)]}) for name in "ab"]
    assert comparison.rankings(losses, {}) == []  # losses of different schedules are not comparable


def test_curves_over_images_and_over_hours() -> None:
    curves = {"train/loss": [Point(3600, 0.5), Point(7200, 0.25)], RATE: [Point(7200, 100.0)]}
    images_seen, hours = comparison.charts([run("a", curves=curves)], {})
    assert images_seen.curves == {("keya", ""): [(3600.0, 0.5, 0.0), (7200.0, 0.25, 0.0)]}
    assert [x for x, _, _ in hours.curves["keya", ""]] == pytest.approx([0.01, 0.02])
    assert (images_seen.x_label, hours.x_label) == ("images seen", "hours of training")
    evaluated = [run("a", evaluations=[made(result(1, drawn(1)), result(2, drawn(2)))])]
    found = {chart.title: chart for chart in comparison.charts(evaluated, results_alike(evaluated))}
    assert set(found) == {"bits/dim", "FID-pixels", "KID-pixels"}
    (bits,) = found["bits/dim"].curves.values()
    assert [point[0] for point in bits] == [1000, 2000] and [point[2] for point in bits] == [0.05, 0.05]


def test_sampling_steps_against_kid() -> None:
    evaluated = [run("a", evaluations=[made(result(1, drawn(1), drawn(1, 10)), result(2, drawn(1)))])]
    (chart,) = comparison.step_charts(evaluated, results_alike(evaluated))
    ((label, points),) = chart.curves.items()
    assert label == ("keya", "ddim") and [steps for steps, _, _ in points] == [10, 50]
    assert chart.title == "KID-pixels" and chart.is_log_x
    once = [run("a", evaluations=[made(result(1, drawn(1)))])]
    assert list(comparison.step_charts(once, results_alike(once))) == []


def png(level: int) -> Callable[[], bytes]:
    return lambda: images.png_bytes(grid(level))


def test_grids_are_shown_side_by_side_at_common_positions() -> None:
    long = run("long", grids={at: png(at) for at in range(10, 250, 10)})
    short = run("short", grids={25: png(1), 35: png(2)})
    assert comparison.shared_positions([short]) == [25, 35]
    positions = comparison.shared_positions([long, short])
    assert len(positions) == comparison.MAX_GRIDS and positions[-1] == 240 and positions == sorted(positions)
    page = Page(comparison_page.render([long, short]))
    (slider,) = page.all("input")
    assert slider["data-positions"] == " ".join(map(str, positions))
    shown = [image for image in page.all("img") if "data-at" in image]
    visible = [image for image in shown if "hidden" not in image]
    assert [image["data-at"] for image in visible] == ["240", "35"]  # the newest grid of each run
    assert visible[1]["alt"] == "Images sampled by run B (short) after 35 images seen"
    data = base64.b64decode(str(visible[0]["src"]).removeprefix("data:image/png;base64,"))
    assert (images.from_png(data) == 240).all()


def test_ranks_of_a_search_are_shown_unchanged() -> None:
    rankings = [Ranking("bits/dim", {"keya": Cell(2.5, 0.1, 64, comparison.Rank(1, 3))}, "among all trials")]
    text = " ".join(Page(comparison_page.render([run("a"), run("b")], rankings)).text.split())
    assert "bits/dim among all trials 2.5000 ± 0.1000, rank 1-3 (64 images seen)" in text


def test_hostile_names_and_settings_are_escaped() -> None:
    hostile = dataclasses.replace(
        run("a"),
        name=NASTY,
        where=NASTY,
        settings={NASTY: NASTY},
        grids={1: lambda: b"<svg onload='alert(1)'>"},
        curves={"train/loss": [Point(1, 1.0), Point(2, 0.5)]},
        evaluations=[made(result(1, drawn(1), run="a", checkpoint=NASTY))],
        remarks=[NASTY],
    )
    data = comparison_page.render([hostile, run("b", settings={"x": "1"})])
    page = Page(data)
    (script,) = re.findall(r"<script>(.*?)</script>", data.decode(), re.DOTALL)
    assert script == comparison_page.SCRIPT and len(page.all("script")) == 1
    assert page.text.count(NASTY) >= 5
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for source in [str(image["src"]) for image in page.all("img")]:
        assert source == "" or source.startswith("data:image/")
    assert not [tag for tag in ("link", "iframe", "object", "svg") if page.all(tag)]
    for address in re.findall(r'(?:src|href)="([^"]*)"', data.decode()):
        assert address == "" or address[0] == "#" or address.startswith("data:")


def test_every_image_has_an_alt_text_and_the_page_is_reproducible() -> None:
    curves = {"train/loss": [Point(1, 1.0), Point(2, 0.5)], RATE: [Point(2, 1.0)]}
    parts: Mapping[str, Any] = {"curves": curves, "grids": {1: png(3)}, "trajectory": lambda: b"GIF89a"}
    compared = [run("a", **parts), run("b", **parts)]
    data = comparison_page.render(compared)
    assert data == comparison_page.render(compared)
    page = Page(data)
    assert page.all("html")[0]["lang"] == "en" and all(image["alt"] for image in page.all("img"))
    assert {section["id"] for section in page.all("section")} == {"runs", "samples", "curves", "trajectories"}
    assert {link["href"] for link in page.all("a")} == {"#runs", "#samples", "#curves", "#trajectories"}
    assert any("last values: A 0.5, B 0.5" in str(image["alt"]) for image in page.all("img"))


def test_too_many_runs_are_a_user_error() -> None:
    with pytest.raises(UserError, match="21 runs are too many for one page; name at most 20"):
        comparison_page.render([run(str(i)) for i in range(21)])


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    return [make_run(str(tmp_path / "runs"), "a")[0], make_run(str(tmp_path / "runs"), "b", 90)[0]]


def test_the_job_writes_a_page(run_job: Callable[..., Any], two_runs: list[str], tmp_path: Path) -> None:
    done = run_job("compare", *two_runs, "--out", "pages/report.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"comparison  {tmp_path}/pages/report.html"
    page = Page((tmp_path / "pages/report.html").read_bytes())
    assert "All settings are equal." in page.text and "Comparison of a, b" in page.text
    assert len([image for image in page.all("img") if "data-at" in image]) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no RUN is given; expected folders or URIs of runs, or their ids in MLflow"),
        (("nowhere",), "nowhere does not exist; expected a run's folder or URI, or a run's id in MLflow"),
        (("0" * 32,), f"{'0' * 32} is neither a run's folder nor a run's id in MLflow at sqlite:///"),
        (("empty",), "empty is not a run's folder: it has no run.json"),
        (("empty", "--out", "empty"), "--out empty is a folder; name a file, such as empty/report.html"),
        (("empty", "--evaluations", "nowhere.json"), "--evaluations nowhere.json cannot be read: "),
        (("empty", "--evaluations", "card.json"), "card.json is not a result of jobs/evaluate.py: "),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "card.json").write_text(json.dumps({"format": "another"}))
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(UserError) as raised:
        compare.main()
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
    assert raised.value.exit_code == 2 and not (tmp_path / "report.html").exists()


def test_a_missing_run_is_a_one_line_error(run_job: Callable[..., Any], tmp_path: Path) -> None:
    done = run_job("compare", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: nowhere does not exist; expected a run's folder or URI, or a run's id in MLflow\n"
    )


@pytest.fixture
def page_file(two_runs: list[str], tmp_path: Path) -> Path:
    keys = [runs.existing_run(uri).key for uri in two_runs]
    ways = drawn(1), drawn(1, 10, own=False), near(0.02, 20)
    results = [
        result(i, *ways, run=name * 30, run_key=key)
        for name, key in zip("ab", keys, strict=True)
        for i in (1, 3)
    ]
    file = tmp_path / "found.json"
    found = made(*results)
    file.write_text(found.to_json())
    compared = read(two_runs, [str(file)])
    long = "a-very-long-name-without-any-space-" * 6
    compared[0] = dataclasses.replace(
        compared[0], name=long, settings={**compared[0].settings, "x." + long: long}
    )
    out = tmp_path / "report.html"
    comparison_page.store(compared, locations.resolve(str(out)))
    return out


@pytest.fixture(params=[400, 1400])
def page(request: Any, browser: Any, page_file: Path, tmp_path: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": request.param, "height": 900}, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_file.as_uri())
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()
    assert problems == []


@pytest.mark.slow
def test_the_page_on_phone_and_desktop_screens(page: Any) -> None:
    """No horizontal scrolling, every image is decoded, and the slider changes all grids at once."""
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate(
        "[...document.body.querySelectorAll('*')].filter(e => !e.closest('thead') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName)"
    )
    assert wide == []
    digests = "[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)"
    assert (
        page.evaluate(f"Promise.all([...document.images].map(i => i.decode())).then(() => {digests})") == []
    )

    def shown() -> list[str]:
        return page.evaluate(
            "[...document.querySelectorAll('figure.grid img')].filter(i => !i.hidden).map(i => i.alt)"
        )

    assert [alt.rpartition(" after ")[2] for alt in shown()] == ["3,000 images seen"] * 2
    slider = page.get_by_role("slider", name="Images seen")
    slider.focus()
    slider.press("Home")
    assert [alt.rpartition(" after ")[2] for alt in shown()] == ["1,000 images seen"] * 2
    assert page.locator("output").text_content() == "1,000"
    slider.press("ArrowRight")
    assert page.locator("figure.grid .at").all_text_contents() == ["2,000 images seen"] * 2
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert np.median(np.asarray(shot)) == 255  # white
