"""What is compared of runs: rankings, the answer and the next command, charts."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.compared import run, shown_text
from support.reported import drawn, made, near, result

from ddpm.evaluation import comparison, comparison_page
from ddpm.evaluation.compared_run import ComparedRun
from ddpm.evaluation.comparison import SuggestedCommand, results_alike
from ddpm.evaluation.plots import ChartPoint
from ddpm.runs.evaluations import Report, Score
from ddpm.utils.errors import UserError


def test_a_report_is_read_back_as_it_was() -> None:
    odd = Score("KID-pixels", math.nan, math.nan, 500, 90)
    sampled = drawn(2, 10, own=False, guidance_interval=(0.1, 2.0))
    report = made(result(1, sampled), result(2, near(0.03, 20)), result(3, bits=None))
    assert Report.from_json(report.to_json(), "x.json") == report
    unknown = dataclasses.replace(drawn(1), scores=(odd, *near(0.03).scores))
    back = Report.from_json(made(result(1, unknown)).to_json(), "x.json")
    assert [score.is_finite for score in back.results[0].drawn.scores] == [False, True]
    alike = results_alike([run("a", evaluations=[back])])
    assert {chart.title for chart in comparison_page.charts([run("a")], alike)} == {"bits/dim"}
    wrong_type = report.to_json().replace('"n": 90', '"n": "a"')
    for damaged in ("", "[]", "{}", '{"format": "x"}', wrong_type, "[" * 100_000):
        with pytest.raises(UserError, match=r"^x\.json ") as raised:
            Report.from_json(damaged, "x.json")
        assert "\n" not in str(raised.value)


def test_ranks_have_ties_and_need_equal_evaluation_settings() -> None:
    unscored = dataclasses.replace(drawn(2), scores=())
    bits = {"a": (3.0, 0.01), "b": (2.0, 0.01), "c": (2.001, 0.01)}
    results = [
        result(2, unscored, run=name, bits=Score("bits/dim", value, error, 90))
        for name, (value, error) in bits.items()
    ]
    older = result(1, unscored, run="a", bits=Score("bits/dim", 1.0, 0.01, 90))
    other = Report({**made().settings, "num_images": 7}, (result(9, run="a"), result(9, run="b")))
    shared = [made(older, *results), other]
    compared = [run(name, evaluations=shared) for name in "abc"]
    alike = results_alike(compared)
    positions = {key: sorted(of_run) for key, of_run in alike.items()}
    assert positions == {"keya": [1000, 2000], "keyb": [2000], "keyc": [2000]}
    (ranking,) = comparison.ranked(compared, alike)
    ranked = {key: (cell.value, str(cell.rank)) for key, cell in ranking.cells.items()}
    assert ranked == {"keya": (3.0, "3"), "keyb": (2.0, "1-2"), "keyc": (2.001, "1-2")}
    assert "3.0000 ± 0.0100, rank 3 (2,000 images seen)" in shown_text(compared)


def test_of_evaluations_of_equally_many_runs_the_one_with_most_images_counts() -> None:
    """Unless it has older checkpoints; so evaluating with more images, as the page says, changes the answer."""
    few, many = (
        Report({**made().settings, "num_images": n}, (result(2, weights_sha256=str(n)), result(1)))
        for n in (60, 240)
    )
    stale = Report({**made().settings, "num_images": 999}, (result(1),))
    compared = [run("a", images_seen=2000, evaluations=[few, many, stale])]
    (of_run,) = results_alike(compared).values()
    assert sorted(of_run) == [1000, 2000] and of_run[2000].weights_sha256 == "240"


def test_the_neighbour_search_does_not_affect_ranks_and_the_sampler_does() -> None:
    """Results of the runs' own samplers count, if there are equally many of others."""
    first = made(result(1, drawn(1)), result(2, drawn(2)))
    second = Report({**first.settings, "num_train_images": 0}, (result(3, drawn(3)),))
    other = made(*(result(i, drawn(i, 10, own=False)) for i in (1, 2, 3)))
    for evaluations in ([first, second, other], [other, second, first]):
        (of_run,) = results_alike([run("a", evaluations=evaluations)]).values()
        assert sorted(of_run) == [1000, 2000, 3000]
        assert {found.drawn.name for found in of_run.values()} == {"ddim-50"}


def test_without_evaluations_held_out_bits_of_training_are_ranked() -> None:
    def curve(value: float) -> dict[str, list[ChartPoint]]:
        return {"held_out/bits_per_dim": [ChartPoint(10, 9.0, 0.1), ChartPoint(20, value, 0.1)]}

    compared = [run("a", curves=curve(3.0)), run("b", curves=curve(2.0)), run("c")]
    (ranking,) = comparison.ranked(compared, {})
    assert {key: str(cell.rank) for key, cell in ranking.cells.items()} == {"keya": "2", "keyb": "1"}
    losses = [run(name, curves={"train/loss": [ChartPoint(1, 0.1, 0.1)]}) for name in "ab"]
    assert comparison.ranked(losses, {}) == []  # losses of different schedules are not comparable


BITS = 3 + np.random.default_rng(0).normal(size=90)
"""Bits/dim of 90 held-out images: their standard error is 0.1."""


def scored(*levels: float, paired: bool = True) -> list[ComparedRun]:
    """Runs that were evaluated alike; the bits/dim of all images differ by the difference of their levels."""
    results = []
    for i, level in enumerate(levels):
        each = BITS + level + 0.01 * np.sin(np.arange(90) * (i + 1))
        bits = Score("bits/dim", each.mean(), each.std() / 90**0.5, 90)
        own = tuple(each) if paired else ()
        unscored = dataclasses.replace(drawn(2), scores=())
        results.append(result(2, unscored, run="abc"[i], bits=bits, bits_of_image=own))
    report = made(*results)
    return [run(name, images_seen=2000, evaluations=[report]) for name in "abc"[: len(levels)]]


def answer(compared: Sequence[ComparedRun]) -> tuple[list[str], SuggestedCommand | None]:
    """Headlines, and the command that evaluates the runs."""
    results = results_alike(compared)
    names = {run.key: run.name for run in compared}
    rankings = comparison.ranked(compared, results)
    step = next(comparison.evaluation_step(compared, results, names), None)
    return [f"{verdict.metric}: {verdict.headline}" for verdict in comparison.verdicts(rankings, names)], step


def test_the_answer_compares_image_by_image_where_it_can() -> None:
    """Two runs whose errors overlap widely differ on every image alike; without images they are tied."""
    assert answer(scored(0.02, 0)) == (["held-out bits/dim: b is better than a"], None)
    tied = "held-out bits/dim: No winner: b and a are tied"
    assert answer(scored(0.02, 0, paired=False)) == ([tied], None)
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


def test_metrics_of_training_on_different_data_have_no_winner() -> None:
    curves = [{"held_out/bits_per_dim": [ChartPoint(64, bits, 0.01)]} for bits in (3.0, 4.0)]
    for data, headline in ("xx", "a is better than b"), ("xy", "Not comparable"):
        compared = [run(n, curves=c, data=d) for n, c, d in zip("ab", curves, data, strict=True)]
        assert answer(compared)[0] == [f"bits/dim of a few held-out images, in training: {headline}"]


def test_the_next_step_is_the_command_that_evaluates_the_runs() -> None:
    one = scored(0.02, 0)
    late = [one[0], dataclasses.replace(one[1], images_seen=3000, data="x")]
    step = answer(late)[1]
    assert step and step.text.startswith("Not evaluated alike at the newest checkpoint: b.")
    assert step.command == "ddpm evaluate runs/a runs/b"
    late[0] = dataclasses.replace(late[0], data="y")
    page = shown_text(late)
    assert "The runs were trained on different data" in page and step.command in page
    assert "different data" not in shown_text(one)
    never = answer([run("a", images_seen=7), run("b", images_seen=7), run("without a checkpoint")])
    assert never[0] == [] and never[1] and "the newest checkpoint: a, b." in never[1].text
    assert never[1].command == "ddpm evaluate runs/a runs/b"
    assert answer([run("without a checkpoint")]) == ([], None)


def test_curves_over_images() -> None:
    curves = {"train/loss": [ChartPoint(3600, 0.5), ChartPoint(7200, 0.25)]}
    (loss,) = comparison_page.charts([run("a", curves=curves)], {})
    assert loss.curves == {"keya": [(3600.0, 0.5, 0.0), (7200.0, 0.25, 0.0)]}
    evaluated = [run("a", evaluations=[made(result(1, drawn(1)), result(2, drawn(2)))])]
    charts = {chart.title: chart for chart in comparison_page.charts(evaluated, results_alike(evaluated))}
    assert set(charts) == {"bits/dim", "FID-pixels", "KID-pixels"}
    (bits,) = charts["bits/dim"].curves.values()
    assert [point[0] for point in bits] == [1000, 2000] and [point[2] for point in bits] == [0.05, 0.05]


def test_the_answer_as_lines_is_that_of_the_page() -> None:
    compared = scored(0.02, 0)
    found = comparison.compare(compared)
    (verdict, about) = comparison.lines(found)
    page = shown_text(compared)
    headline, _, detail = verdict.partition(": ")[2].partition(". ")
    assert headline == "B (b) is better than A (a)"
    assert headline in page and detail in page and "standard error" in about
    unevaluated = [run("a", images_seen=7), run("b", images_seen=7)]
    *_, command = comparison.lines(comparison.compare(unevaluated))
    assert command.strip() == "ddpm evaluate runs/a runs/b"


def of_seeds(*levels: float, **parts: Any) -> list[ComparedRun]:
    """Trainings of the configurations "cosine" and "linear" in turn, with these levels of bits/dim."""
    compared = []
    for i, level in enumerate(levels):
        name = f"{('cosine', 'linear')[i % 2]}-{i // 2}"
        each = BITS + level
        bits = Score("bits/dim", each.mean(), each.std() / 90**0.5, 90)
        unscored = dataclasses.replace(drawn(2), scores=())
        found = made(result(2, unscored, run=name, bits=bits, bits_of_image=tuple(each)))
        facts = {"configuration": name.split("-")[0], "seed": i // 2, "images_seen": 2000, **parts}
        command = f"ddpm train digits --name {name} --schedule {name.split('-')[0]} --seed {i // 2}"
        compared.append(run(name, command=command, evaluations=[found], **facts))
    return compared


def test_three_seeds_of_each_configuration_are_compared_as_configurations() -> None:
    """Known answers: the paired test of nets claims a difference that the spread between seeds explains."""
    alike = comparison.compare(of_seeds(0.00, 0.01, 0.02, 0.03, 0.04, 0.05))
    (verdict,) = alike.verdicts
    assert verdict.is_of_configurations and not verdict.has_winner
    assert verdict.headline == "No winner: cosine (A, C, E) and linear (B, D, F) are tied"
    mean = BITS.mean()
    assert f"cosine (A, C, E) has {mean + 0.02:.4f} on average of 3 trainings" in verdict.detail
    # Welch: sqrt(2 * 0.02^2 / 3)
    assert "they differ by 0.0100 ± 0.0163, inside the errors" in verdict.detail
    assert "between seeds their standard deviation is 0.0200" in verdict.detail
    assert alike.remark == comparison.OF_CONFIGURATIONS and alike.steps == []
    (apart,) = comparison.compare(of_seeds(0.00, 0.21, 0.02, 0.23, 0.04, 0.25)).verdicts
    assert apart.headline == "cosine (A, C, E) is better than linear (B, D, F)"
    assert "0.2100 ± 0.0163, outside the errors" in apart.detail


def test_fewer_seeds_give_a_verdict_about_nets_and_the_command_for_more() -> None:
    found = comparison.compare(of_seeds(0.00, 0.01, 0.02, 0.03))
    (verdict,) = found.verdicts
    assert verdict.headline == "A (cosine-0) is better than B (linear-0) and all others"
    assert "about these trained nets" in found.remark
    (step,) = found.steps
    assert step.command.splitlines() == [
        "ddpm train digits --schedule cosine --name cosine-1-seed-2 --seed 2",
        "ddpm train digits --schedule linear --name linear-1-seed-2 --seed 2",
        "ddpm evaluate runs/cosine-0 runs/linear-0 runs/cosine-1 runs/linear-1 runs/cosine-1-seed-2 "
        "runs/linear-1-seed-2",
    ]
    text = shown_text(of_seeds(0.00, 0.01, 0.02, 0.03))
    assert "--name cosine-1-seed-2 --seed 2" in text and "about these trained nets" in text
    seeds_twice = of_seeds(0.00, 0.21, 0.02, 0.23, 0.04, 0.25, seed=0)
    assert not comparison.compare(seeds_twice).verdicts[0].is_of_configurations


def test_runs_that_differ_in_their_seeds_alone_are_one_configuration() -> None:
    found = comparison.compare(of_seeds(0.00, 0.01, 0.02, 0.03, 0.04, 0.05)[::2])
    (verdict,) = found.verdicts
    assert verdict.headline == "One configuration: cosine (A, B, C) differ in their seeds alone"
    assert "standard deviation is 0.0200" in verdict.detail and not verdict.has_winner and found.steps == []


def test_kid_of_configurations_is_tested_by_its_values() -> None:
    compared = []
    for i, value in enumerate((0.10, 0.50, 0.12, 0.52, 0.14, 0.54)):
        name = f"{('cosine', 'linear')[i % 2]}-{i // 2}"
        score = Score("KID-pixels", value, 0.3, 90)
        found = made(result(2, dataclasses.replace(drawn(2), scores=(score,)), run=name, bits=None))
        facts = {"configuration": name.split("-")[0], "seed": i // 2, "images_seen": 2000}
        compared.append(run(name, evaluations=[found], **facts))
    (verdict,) = comparison.compare(compared).verdicts
    assert verdict.headline == "cosine (A, C, E) is better than linear (B, D, F)"
    assert "they differ by 0.4000 ± 0.0163" in verdict.detail
