"""Runs read back from folders and buckets, and the page that compares them."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import evaluated
from support.reported import drawn, made, near, result

from ddpm.checkpoints import checkpoint, runs
from ddpm.config_io import override, to_json
from ddpm.evaluation import comparison, comparison_page, publish
from ddpm.evaluation.compared_run import GIF, RATE, ComparedRun, Remark, read
from ddpm.evaluation.comparison import Cell, Ranking, results_alike
from ddpm.evaluation.plots import Point
from ddpm.evaluation.report import Report
from ddpm.evaluation.scores import Score
from ddpm.presets import DIGITS
from ddpm.sampling import generate
from ddpm.tracking import curves
from ddpm.tracking.metrics_buffer import Metrics
from ddpm.utils import images
from ddpm.utils.errors import UserError

STEPS = (1280, 2560, 3840)
NEWEST = 4480
"""The newest checkpoint, after the last logged step."""
COMMAND = "python jobs/train.py digits --name a"
NASTY = "<script>alert(1)</script>&amp;\"'$x_{"


def grid(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, np.uint8)


def make_run(storage: str, name: str, level: int = 0, status: runs.StatusName = "STOPPED") -> tuple[str, str]:
    """Write a run's folder as training does; returns its URI and its run key."""
    run = runs.open_run(name, storage)
    config = override(DIGITS, {"run.name": name, "data.source": "digits"})
    state = {"step": NEWEST // 128, "images_seen": NEWEST, "best_held_out_loss": 0.1, "run_key": run.key}
    newest = run.location.child(checkpoint.name_at(NEWEST))
    newest.child("config.json").write(to_json(config).encode())
    newest.child("state.json").write(json.dumps({**state, "data_fingerprint": "0123456789ab"}).encode())
    newest.child("checksums.json").write(b"{}")
    records = []
    for i, at in enumerate(STEPS):
        bits = {"held_out/bits_per_dim": 5.0 - i, "held_out_error/bits_per_dim": 0.25}
        values = {"train/loss": 1 / (i + 1 + level), RATE: 128.0, "other": 1.0, **bits}
        records.append(Metrics({**values, "held_out/loss": math.nan}, at, i))
        run.location.child(f"samples/{at:012d}.png").write(images.png_bytes(grid(level + i)))
    table = curves.extended(curves.SCHEMA.empty_table(), records)
    run.location.child(curves.FILE).write(curves.to_bytes(table))
    tags = {"command": COMMAND, "hardware": "2 cores", "version.torch": "2.13.0", "git.commit": "0123"}
    run.location.child(runs.STATUS).write(runs.status_json(runs.Status(status, NEWEST, 0, 0.75, tags)))
    run.location.child(GIF).write(images.gif_bytes([grid(level), grid(level + 9)]))
    return run.location.uri, run.key


def content_of(run: ComparedRun) -> tuple[Any, ...]:
    """Everything about a run that does not depend on where it was read from."""
    assert run.trajectory is not None
    digests = {at: hashlib.sha256(grid()).hexdigest() for at, grid in run.grids.items()}
    curves = dict(run.curves)
    return run.name, dict(run.settings), dict(run.facts), curves, digests, run.trajectory(), run.remarks


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


def shown_text(compared: Sequence[ComparedRun], rankings: Sequence[Ranking] | None = None) -> str:
    """The text of the page, with single spaces."""
    return " ".join(Page(comparison_page.render(compared, rankings)).text.split())


def test_a_copied_folder_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    uri, _ = make_run(str(tmp_path), "a")
    (first,) = read([uri, uri])
    assert first.curves["held_out/bits_per_dim"] == [Point(at, 5.0 - i, 0.25) for i, at in enumerate(STEPS)]
    assert set(first.curves) == {"train/loss", "held_out/bits_per_dim", RATE}
    assert first.settings["schedule.kind"] == "cosine" and list(first.grids) == list(STEPS)
    assert first.images_seen == NEWEST
    assert first.facts == {
        "status": "stopped",
        "images seen": f"4,480 of {DIGITS.train.total_images:,}",
        "minutes": "0.8",
        "images/s": "128",
        "weights": "627,433",
        "seed": "0",
        "hardware": "2 cores",
        "versions": "torch 2.13.0, commit 0123",
        "data": "digits (01234567)",
    }
    text = f"stopped at 4,480 of {DIGITS.train.total_images:,} images; this resumes it:"
    assert first.remarks == [Remark(text, COMMAND)]
    content = content_of(first)
    shutil.copytree(uri, tmp_path / "copies/a")
    shutil.rmtree(uri)
    assert content_of(read([str(tmp_path / "copies/a")])[0]) == content


def test_a_run_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    there, here = make_run(f"{s3_bucket}/runs", "a")[0], make_run(str(tmp_path), "a")[0]
    (of_bucket,), (of_folder,) = read([there]), read([here])
    assert content_of(of_bucket) == content_of(of_folder)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    new = runs.open_run("new", str(tmp_path)).location
    new.child(f"samples/{1:012d}.png").write(images.png_bytes(grid(0)))
    running = runs.status_json(runs.Status("RUNNING", 1, 0, 1.0, {"command": COMMAND}))
    new.child(runs.STATUS).write(running)
    uri, _ = make_run(str(tmp_path), "torn", status="RUNNING")
    Path(uri, curves.FILE).write_bytes(b"no parquet")
    Path(uri, "status.json").write_bytes(b"{")
    Path(uri, "evaluations").mkdir()
    Path(uri, "evaluations/bad.json").write_bytes(b"[")
    shutil.rmtree(Path(uri, "samples"))
    fresh, torn = read([new.uri, uri])
    assert list(fresh.grids) == [1] and fresh.remarks[-1].command == COMMAND
    assert "no checkpoint yet" in fresh.remarks[-1].text
    page = shown_text([fresh, torn])
    damage = (
        "metrics.parquet is damaged",
        "bad.json is not a result of jobs/evaluate.py",
        "status.json is damaged",
    )
    for part in (*damage, "no curves", "no samples yet; without --no-sample they are made now"):
        assert len([remark for remark in torn.remarks if part in remark.text]) == 1
        assert part in page
    Path(uri, "status.json").write_bytes(running)
    (killed,) = read([uri])
    assert killed.remarks[-2].text.endswith("if it was killed, this resumes it:")


def test_a_run_without_grids_is_sampled_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = evaluated.make_run(tmp_path / "runs", evaluated.make_data(tmp_path / "data"))
    ((at, grid),) = read([run.location.uri], sample=True)[0].grids.items()
    assert at == evaluated.POSITIONS[-1]
    folder = Path(runs.checkpoints(run.location)[-1].path)
    one_batch = generate.draw(checkpoint.load_net(folder), range(64))
    difference = images.from_png(grid()).astype(int) - images.grid(one_batch.numpy())
    assert abs(difference).max() <= 1  # batches of another size are rounded otherwise
    assert read([run.location.uri])[0].grids == {}
    weights = bytearray((folder / "ema.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(weights)
    (damaged,) = read([run.location.uri], sample=True)
    assert damaged.grids == {} and "ema.safetensors is damaged" in str(damaged.remarks[-1])


def test_evaluations_are_found_in_the_run_and_in_files(tmp_path: Path) -> None:
    uri, key = make_run(str(tmp_path), "a")
    png, of_image = images.png_bytes(grid(7)), tuple(i / 7 for i in range(90))
    samplings = dataclasses.replace(near(0.03), nearest=png), drawn(2, 20)
    report = made(
        result(3, *samplings, run_key=key, checkpoint=f"{uri}/checkpoint-3", bits_of_image=of_image)
    )
    assert len(list(publish.keep(report))) == 1
    file = tmp_path / "y.json"
    file.write_text(report.to_json())
    (tmp_path / "y-nearest.png").write_bytes(png)
    (both,) = read([uri], [str(file)])
    assert both.evaluations == [report, report]
    for back in both.evaluations:
        assert [sampling.nearest for sampling in back.results[0].drawn] == [png, b""]
    page = Page(comparison_page.render([both]))
    (shown,) = [image for image in page.all("img") if "nearest training images" in str(image["alt"])]
    assert base64.b64decode(str(shown["src"]).partition(",")[2]) == png
    assert "4.2% (95 % interval 3.0% to 7.0%) are nearer to a training image, by pixels" in " ".join(
        page.text.split()
    )


def test_a_report_is_read_back_as_it_was() -> None:
    odd = Score("KID-pixels", math.nan, math.nan, 500, 90)
    samplings = drawn(2, 10, own=False, guidance_interval=(0.1, 2.0)), near(0.03, 20)
    report = made(result(1, *samplings), result(2))
    assert Report.from_json(report.to_json(), "x.json") == report
    unknown = dataclasses.replace(drawn(1), scores=(odd, *near(0.03).scores))
    few = dataclasses.replace(drawn(1, 10), scores=(odd,))
    back = Report.from_json(made(result(1, unknown, few)).to_json(), "x.json")
    assert [score.is_finite for score in back.results[0].drawn[0].scores] == [False, True]
    alike = results_alike([run("a", evaluations=[back])])[0]
    shown = comparison.charts([run("a")], alike), comparison.step_charts([run("a")], alike)
    assert {chart.title for charts in shown for chart in charts} == {"bits/dim"}
    wrong_type = report.to_json().replace('"n": 90', '"n": "a"')
    for damaged in ("", "[]", "{}", '{"format": "x"}', wrong_type, "[" * 100_000):
        with pytest.raises(UserError, match=r"^x\.json is not a result of jobs/evaluate\.py: .") as raised:
            Report.from_json(damaged, "x.json")
        assert "\n" not in str(raised.value)


def run(name: str, **parts: Any) -> ComparedRun:
    return ComparedRun(name, f"key{name}", f"runs/{name}", **parts)


def test_only_settings_that_differ_are_shown() -> None:
    one = {"schedule.kind": "cosine", "optim.lr": "0.1", "data.shards": "x", "model.depth": "3"}
    two = {"schedule.kind": "linear", "optim.lr": "0.1", "data.shards": "y"}
    a, b = run("a", settings=one), run("b", settings=two)
    differing = comparison.differences([a, b, run("c")])
    assert differing == {"schedule.kind": ["cosine", "linear", None], "model.depth": ["3", None, None]}
    assert comparison.differences([a, a]) == {}
    text = shown_text([a, b])
    assert "schedule.kind cosine linear model.depth 3 not set" in text
    assert "optim.lr" not in text and "data.shards" not in text


def test_hours_count_training_time_only() -> None:
    """3,600 images at 100 images/s take 0.01 hours, the next 3,600 at 50 images/s take 0.02."""
    a = run("a", curves={RATE: [Point(3600, 100.0), Point(7200, 50.0)]})
    hours = [a.hours(at) for at in (0, 1800, 3600, 7200, 7201)]
    assert hours == pytest.approx([0, 0.005, 0.01, 0.03, None])
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
    alike, _ = results_alike(compared)
    positions = {key: sorted(of_run) for key, of_run in alike.items()}
    assert positions == {"keya": [1000, 2000], "keyb": [2000], "keyc": [2000]}
    (ranking,) = comparison.rankings(compared, alike)
    ranked = {key: (cell.value, str(cell.rank)) for key, cell in ranking.cells.items()}
    assert ranked == {"keya": (3.0, "3"), "keyb": (2.0, "1-2"), "keyc": (2.001, "1-2")}
    assert "3.0000 ± 0.0100, rank 3 (2,000 images seen)" in shown_text(compared)


def test_of_evaluations_of_equally_many_runs_the_one_with_most_images_counts() -> None:
    """Unless it has older checkpoints; so evaluating with more images, as the page says, changes the answer."""
    few, many = (
        Report({**made().settings, "num_images": n}, (result(2, num_classes=n), result(1))) for n in (60, 240)
    )
    stale = Report({**made().settings, "num_images": 999}, (result(1),))
    compared = [run("a", images_seen=2000, evaluations=[few, many, stale])]
    (of_run,) = results_alike(compared)[0].values()
    assert sorted(of_run) == [1000, 2000] and of_run[2000].num_classes == 240


def test_evaluations_that_differ_only_in_the_neighbour_search_are_merged() -> None:
    """Paths of the data and --num-train-images do not affect the ranked scores."""
    first, second = made(result(1, drawn(1))), made(result(1, drawn(1, 10, own=False)))
    second = Report({**second.settings, "num_train_images": 0}, second.results)
    second.settings["data"]["shards"] = "elsewhere"
    (of_run,) = results_alike([run("a", evaluations=[first, second])])[0].values()
    assert sorted(sampling.name for sampling in of_run[1000].drawn) == ["ddim-10", "ddim-50"]


def test_without_evaluations_held_out_bits_of_training_are_ranked() -> None:
    def curve(value: float) -> dict[str, list[Point]]:
        return {"held_out/bits_per_dim": [Point(10, 9.0, 0.1), Point(20, value, 0.1)]}

    compared = [run("a", curves=curve(3.0)), run("b", curves=curve(2.0)), run("c")]
    (ranking,) = comparison.rankings(compared, {})
    assert {key: str(cell.rank) for key, cell in ranking.cells.items()} == {"keya": "2", "keyb": "1"}
    losses = [run(name, curves={"train/loss": [Point(1, 0.1, 0.1)]}) for name in "ab"]
    assert comparison.rankings(losses, {}) == []  # losses of different schedules are not comparable


BITS = 3 + np.random.default_rng(0).normal(size=90)
"""Bits/dim of 90 held-out images: their standard error is 0.1."""


def scored(*levels: float, n: int = 90, held_out: int = 90, paired: bool = True) -> list[ComparedRun]:
    """Runs that were evaluated alike; the bits/dim of all images differ by the difference of their levels."""
    results = []
    for i, level in enumerate(levels):
        each = BITS + level + 0.01 * np.sin(np.arange(90) * (i + 1))
        bits = (Score("bits/dim", each.mean(), each.std() / 90**0.5, n),)
        own = tuple(each) if paired else ()
        results.append(result(2, run="abc"[i], bits=bits, bits_of_image=own))
    report = made(*results)
    report.settings["data"]["num_images"] = held_out
    facts = {"seed": "4"}
    return [
        run(name, images_seen=2000, evaluations=[report], command=f"train {name}", facts=facts)
        for name in "abc"[: len(levels)]
    ]


def answer(compared: Sequence[ComparedRun]) -> tuple[list[str], Remark | None]:
    """Headlines, and what to run next."""
    (results, num_held_out), names = results_alike(compared), {run.key: run.name for run in compared}
    rankings = comparison.rankings(compared, results)
    step = comparison.next_step(compared, results, num_held_out, rankings, names)
    return [f"{verdict.metric}: {verdict.headline}" for verdict in comparison.verdicts(rankings, names)], step


def test_the_answer_compares_image_by_image_where_it_can() -> None:
    """Two runs whose errors overlap widely differ on every image alike; without images they are tied."""
    assert answer(scored(0.02, 0)) == (["held-out bits/dim: b is better than a"], None)
    (headline,), step = answer(scored(0.02, 0, paired=False))
    assert headline == "held-out bits/dim: No winner: b and a are tied"
    again = "train a --run.name a-again --train.seed 5\ntrain b --run.name b-again --train.seed 5"
    assert step and step.command == again
    text = shown_text(scored(0.02, 0))
    assert re.search(r"B \(b\) is better than A \(a\) B \(b\) has \d\.\d{4}, A \(a\) has", text)
    assert re.search(r"they differ by 0\.0\d\d\d ± 0\.001\d, outside the errors\.", text)


def test_the_answer_of_three_runs() -> None:
    assert answer(scored(0.02, 0, 0.04))[0] == ["held-out bits/dim: b is better than a and all others"]
    (headline,), _ = answer(scored(0, 2, 0.0001))
    assert re.search("No winner: (a and c|c and a) are tied$", headline)


def test_bits_of_nets_with_and_without_labels_have_no_winner() -> None:
    compared = [
        dataclasses.replace(run, settings={"model.num_classes": classes})
        for run, classes in zip(scored(0.02, 0), ("10", "0"), strict=True)
    ]
    assert answer(compared) == (["held-out bits/dim: Not comparable"], None)
    assert "bounds log p(x | y)" in shown_text(compared)


def test_the_next_step_is_the_exact_command() -> None:
    few = answer(scored(0, 0, held_out=1000))[1]
    assert few and few.command == "python jobs/evaluate.py runs/a runs/b --num-images 360"
    one = scored(0.02, 0)
    its = {"data.shards": "its shards"}
    late = [one[0], dataclasses.replace(one[1], images_seen=3000, data="x", settings=its)]
    step = answer(late)[1]
    assert step and step.text.startswith("Not evaluated alike at the newest checkpoint: b.")
    assert step.command == "python jobs/evaluate.py runs/a runs/b"
    late[0] = dataclasses.replace(late[0], data="y", settings={"data.shards": "my shards"})
    step = answer(late)[1]
    assert step and step.command == "python jobs/evaluate.py runs/a runs/b --data.shards 'my shards'"
    page = shown_text(late)
    assert "The runs were trained on different data" in page and step.command in page
    assert "different data" not in shown_text(one)
    never = answer([run("a", images_seen=7), run("b", images_seen=7), run("without a checkpoint")])
    assert never[0] == [] and never[1] and "the newest checkpoint: a, b." in never[1].text
    assert never[1].command == "python jobs/evaluate.py runs/a runs/b"
    assert answer([run("without a checkpoint")]) == ([], None)


def test_curves_over_images_and_over_time() -> None:
    curves = {"train/loss": [Point(3600, 0.5), Point(7200, 0.25)], RATE: [Point(7200, 100.0)]}
    images_seen, minutes = comparison.charts([run("a", curves=curves)], {})
    assert images_seen.curves == {("keya", ""): [(3600.0, 0.5, 0.0), (7200.0, 0.25, 0.0)]}
    assert [x for x, _, _ in minutes.curves["keya", ""]] == pytest.approx([0.6, 1.2])
    assert (images_seen.x_label, minutes.x_label) == ("images seen", "minutes of training")
    _, hours = comparison.charts([run("a", curves={**curves, RATE: [Point(7200, 1.0)]})], {})
    assert [x for x, _, _ in hours.curves["keya", ""]] == [1, 2] and hours.x_label == "hours of training"
    evaluated = [run("a", evaluations=[made(result(1, drawn(1)), result(2, drawn(2)))])]
    charts = {chart.title: chart for chart in comparison.charts(evaluated, results_alike(evaluated)[0])}
    assert set(charts) == {"bits/dim", "FID-pixels", "KID-pixels"}
    (bits,) = charts["bits/dim"].curves.values()
    assert [point[0] for point in bits] == [1000, 2000] and [point[2] for point in bits] == [0.05, 0.05]


def test_sampling_steps_against_kid() -> None:
    evaluated = [run("a", evaluations=[made(result(1, drawn(1), drawn(1, 10)), result(2, drawn(1)))])]
    (chart,) = comparison.step_charts(evaluated, results_alike(evaluated)[0])
    ((label, points),) = chart.curves.items()
    assert label == ("keya", "ddim") and [steps for steps, _, _ in points] == [10, 50]
    assert chart.title == "KID-pixels" and chart.x_label == "sampling steps"
    once = [run("a", evaluations=[made(result(1, drawn(1)))])]
    assert list(comparison.step_charts(once, results_alike(once)[0])) == []


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
    text = shown_text([run("a"), run("b")], rankings)
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
        remarks=[Remark(NASTY, NASTY)],
        facts={NASTY: NASTY},
    )
    data = comparison_page.render([hostile, run("b", settings={"x": "1"})])
    page = Page(data)
    (script,) = re.findall(r"<script>(.*?)</script>", data.decode(), re.DOTALL)
    assert len(page.all("script")) == 1 and script.startswith("const slider = ")
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
    a = run("a", images_seen=2, curves=curves, grids={1: png(3)}, trajectory=lambda: b"GIF89a")
    compared = [a, dataclasses.replace(a, name="b", key="keyb")]
    data = comparison_page.render(compared)
    assert data == comparison_page.render(compared)
    page = Page(data)
    assert page.all("html")[0]["lang"] == "en" and all(image["alt"] for image in page.all("img"))
    sections = ["answer", "samples", "runs", "curves", "trajectories"]
    assert [section["id"] for section in page.all("section")] == sections
    assert [link["href"] for link in page.all("a")] == [f"#{section}" for section in sections]
    assert any("last values: A: 0.5000, B: 0.5000" in str(image["alt"]) for image in page.all("img"))


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


@pytest.fixture
def page_file(two_runs: list[str], tmp_path: Path) -> Path:
    samplings = drawn(1), drawn(1, 10, own=False), near(0.02, 20)
    results = [
        result(i, *samplings, run=name * 30, run_key=runs.existing_run(uri).key)
        for name, uri in zip("ab", two_runs, strict=True)
        for i in (1, 3)
    ]
    file, long = tmp_path / "results.json", "a-very-long-name-without-any-space-" * 6
    file.write_text(made(*results).to_json())
    compared = read(two_runs, [str(file)])
    settings = {**compared[0].settings, "x." + long: long}
    compared[0] = dataclasses.replace(compared[0], name=long, settings=settings)
    out = tmp_path / "report.html"
    out.write_bytes(comparison_page.render(compared))
    return out


@pytest.fixture(params=[390, 1600])
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
    plots = page.evaluate("[...document.querySelectorAll('.plots img')].map(i => i.clientWidth)")
    assert plots and min(plots) > (700 if width == 1600 else 350)
    top = page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", "samples")
    assert top < page.evaluate("id => document.getElementById(id).getBoundingClientRect().top", "settings")
    digests = "[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)"
    assert (
        page.evaluate(f"Promise.all([...document.images].map(i => i.decode())).then(() => {digests})") == []
    )

    def shown() -> list[str]:
        return page.evaluate(
            "[...document.querySelectorAll('figure.grid img')].filter(i => !i.hidden).map(i => i.alt)"
        )

    assert [alt.rpartition(" after ")[2] for alt in shown()] == ["3,840 images seen"] * 2
    slider = page.get_by_role("slider", name="Images seen")
    slider.focus()
    slider.press("Home")
    assert [alt.rpartition(" after ")[2] for alt in shown()] == ["1,280 images seen"] * 2
    assert page.locator("output").text_content() == "1,280"
    slider.press("ArrowRight")
    assert page.locator("figure.grid .at").all_text_contents() == ["2,560 images seen"] * 2
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert np.median(np.asarray(shot)) == 255  # white
