"""The page that compares runs: as HTML, as the job writes it, in a browser."""

import base64
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.compared import Page, make_run, png, run, shown_text
from support.reported import drawn, made, result

from ddpm.evaluation import comparison, comparison_page
from ddpm.evaluation.compared_run import read
from ddpm.evaluation.comparison import Cell, Ranking
from ddpm.evaluation.plots import ChartPoint
from ddpm.runs import run_folder
from ddpm.utils import images
from ddpm.utils.errors import UserError

NASTY = "<script>alert(1)</script>&amp;\"'$x_{"


def test_only_settings_that_differ_are_shown() -> None:
    one = {"schedule.kind": "cosine", "optim.lr": "0.1", "data.shards": "x", "model.depth": "3"}
    two = {"schedule.kind": "linear", "optim.lr": "0.1", "data.shards": "y"}
    a = run("a", settings=one)
    b = run("b", settings=two)
    differing = comparison_page.differences([a, b, run("c")])
    assert differing == {"schedule.kind": ["cosine", "linear", None], "model.depth": ["3", None, None]}
    assert comparison_page.differences([a, a]) == {}
    text = shown_text([a, b])
    assert "schedule.kind cosine linear model.depth 3 not set" in text
    assert "optim.lr" not in text and "data.shards" not in text


def test_grids_are_shown_side_by_side_at_common_positions() -> None:
    long = run("long", grids={at: png(at) for at in range(10, 250, 10)})
    short = run("short", grids={25: png(1), 35: png(2)})
    assert comparison_page.shared_positions([short]) == [25, 35]
    positions = comparison_page.shared_positions([long, short])
    assert (
        len(positions) == comparison_page.MAX_GRIDS
        and positions[-1] == 240
        and positions == sorted(positions)
    )
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
        curves={"train/loss": [ChartPoint(1, 1.0), ChartPoint(2, 0.5)]},
        evaluations=[made(result(1, drawn(1), run="a", checkpoint=NASTY))],
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
    curves = {"train/loss": [ChartPoint(1, 1.0), ChartPoint(2, 0.5)]}
    a = run("a", images_seen=2, curves=curves, grids={1: png(3)})
    compared = [a, dataclasses.replace(a, name="b", key="keyb")]
    data = comparison_page.render(compared)
    assert data == comparison_page.render(compared)
    page = Page(data)
    assert page.all("html")[0]["lang"] == "en" and all(image["alt"] for image in page.all("img"))
    sections = ["answer", "samples", "runs", "curves"]
    assert [section["id"] for section in page.all("section")] == sections
    assert [link["href"] for link in page.all("a")] == [f"#{section}" for section in sections]
    assert any("last values: A: 0.5000, B: 0.5000" in str(image["alt"]) for image in page.all("img"))


def test_too_many_runs_are_a_user_error() -> None:
    with pytest.raises(UserError, match="21 runs"):
        comparison_page.render([run(str(i)) for i in range(21)])


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    return [make_run(str(tmp_path / "runs"), "a")[0], make_run(str(tmp_path / "runs"), "b", 90)[0]]


@pytest.mark.lowest
def test_the_job_writes_a_page(run_job: Callable[..., Any], two_runs: list[str], tmp_path: Path) -> None:
    done = run_job("compare", *two_runs, "--out", "pages/report.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"comparison  {tmp_path}/pages/report.html"
    assert "held-out images, in training: " in done.stdout
    page = Page((tmp_path / "pages/report.html").read_bytes())
    assert "All settings are equal." in page.text and "Comparison of a, b" in page.text
    assert len([image for image in page.all("img") if "data-at" in image]) == 6


@pytest.fixture
def page_file(two_runs: list[str], tmp_path: Path) -> Path:
    results = [
        result(i, drawn(1), run=name * 30, run_key=run_folder.existing_run(uri).key)
        for name, uri in zip("ab", two_runs, strict=True)
        for i in (1, 3)
    ]
    file = tmp_path / "results.json"
    long = "a-very-long-name-without-any-space-" * 6
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
    broken = (
        "[...document.querySelectorAll('#runs thead th')].filter(e => e.scrollWidth > e.clientWidth "
        "|| e.getBoundingClientRect().height > 3 * parseFloat(getComputedStyle(e).lineHeight)).map(e => e.innerText)"
    )
    assert width < 800 or page.evaluate(broken) == []
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
