"""A report: its table, JSON, metrics, remarks agree."""

import json
import re
from dataclasses import replace

import pytest
from support.reported import METRICS, drawn, made, near, result

from ddpm.evaluation import results, results_table
from ddpm.evaluation.results import CheckpointResult, Report, Score

ONE = made(result(1, drawn(1)))
SEVERAL = made(
    *(result(i, drawn(i), drawn(i, 10, own=False)) for i in (1, 2, 3)),
    result(1, drawn(9), drawn(9, 10, own=False), run="b"),
)


def printed(reported: Report, width: int = 250) -> str:
    return results_table.table(reported).text(width)


@pytest.mark.parametrize("reported", [ONE, SEVERAL], ids=["one", "several"])
def test_table_and_json_agree_on_any_terminal(reported: Report) -> None:
    parsed = json.loads(reported.to_json())
    assert parsed["format"] == "ddpm-evaluation/1"
    wide = printed(reported)
    narrow = printed(reported, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    for checkpoint in parsed["checkpoints"]:
        drawn_scores = (score for sampling in checkpoint["drawn"] for score in sampling["scores"])
        for score in (*checkpoint["bits"], *drawn_scores):
            shown = f"{score['value']:.4f} ± {score['error']:.4f}"
            assert shown in wide and shown in narrow
    for part in ("0.2000 ± 0.0300", "real against real", "1,000", "ddim-50"):
        assert part in wide
    counts = " ".join(results_table.remarks(reported, "out.json"))
    assert "500 generated and 90 held-out" in counts and "400 training" in counts


def test_the_table_has_a_row_for_each_metric_and_a_column_for_each_checkpoint_and_sampler() -> None:
    made_table = results_table.table(SEVERAL)
    assert made_table.names == ["run", *"aaaaaabb", "real against real"]
    words = {row[0].strip(): list(row[1:]) for row in made_table.rows}
    assert words["images seen"][:6] == ["1,000", "1,000", "2,000", "2,000", "3,000", "3,000"]
    assert words["sampler"][:2] == ["ddim-50", "ddim-10"]
    assert len(words) == 2 + 4 + len(METRICS)
    assert len(set(words["KID-pixels"])) == 9
    missing = results_table.table(made(result(1, drawn(1), near(0.03))))
    assert dict(zip(missing.names, missing.rows[-1], strict=False))["run"].startswith("nearer")
    assert missing.rows[-1][1] == ""


def test_results_of_earlier_versions_have_more_metrics() -> None:
    """Density and coverage are no longer computed; a file that has them is read, and shown."""
    old = replace(drawn(1), scores=(*drawn(1).scores, Score("density-pixels", 0.75, 0.125, 500, 90)))
    report = Report.from_json(made(result(1, old)).to_json(), "x.json")
    assert "0.7500 ± 0.1250" in printed(report)
    assert results.curve_values(report.results[0])["eval/density-pixels"] == 0.75


def test_run_names_cannot_inject_markup() -> None:
    name = "a\nerror: b \x1b[2J[red]c[/red]"
    one = result(1, drawn(1), run=name)
    other = result(2, drawn(2), run="b")
    for reported in (made(one), made(one, other)):
        assert "a\\nerror: b \\x1b[2J[red]c[/red]" in printed(reported)


def test_metric_names_say_how_they_were_measured() -> None:
    points = results.curve_values(
        result(1, drawn(1), drawn(1, 10, own=False), drawn(1, 10, own=False, eta=0.5))
    )
    right = {
        "eval/bits_per_dim": pytest.approx(4.4678901),
        "eval_error/bits_per_dim": 0.05,
        "eval/bits_per_dim-decoder": pytest.approx(7.4678901),
        "eval/KID-pixels": drawn(1).scores[1].value,
        "eval_floor/KID-pixels": 1.2,
        "eval/ddim-10/KID-pixels": drawn(1, 10).scores[1].value,
    }
    assert {name: points[name] for name in right} == right
    assert "eval/ddim-10 eta 0.5/KID-pixels" in points and len(points) == 2 * 4 + 3 * 3 * 4
    broken = replace(result(1), bits=(Score("bits/dim", float("nan"), float("inf"), 90),))
    assert results.curve_values(broken) == {}
    (score,) = json.loads(made(broken).to_json())["checkpoints"][0]["bits"]
    assert (score["value"], score["error"], score["n"]) == (None, None, 90)


def test_the_report_key_depends_on_checkpoints_and_settings_only() -> None:
    assert re.fullmatch(r"000000001000-[0-9a-f]{8}", ONE.key)
    assert made(result(1, replace(drawn(5), scores=()))).key == ONE.key
    others = [
        made(result(1, drawn(1, 10))),
        made(result(1, drawn(1), weights_sha256="other")),
        Report({**ONE.settings, "num_images": 7}, ONE.results),
        made(result(1, drawn(5), variance="beta_tilde", variance_is_default=False)),
    ]
    assert len({ONE.key, *(other.key for other in others)}) == 5
    assert [v.run for v in SEVERAL.of_run("keyb").results] == ["b"]


def remarks(reported: Report, out: str = "out.json") -> list[str]:
    """All remarks but those on the numbers of images and on what bits/dim depends on."""
    lines = results_table.remarks(reported, out)
    usual = r".* held-out images( are few: .*)?|real against real: .*|bits/dim: the variance is measured.*"
    return [line for line in lines if not re.fullmatch(usual, line)]


def test_the_variance_of_the_bound_is_reported() -> None:
    """If it is not the default, it is also part of the metric's name in MLflow."""
    fixed = result(1, variance="beta_tilde", variance_is_default=False)
    lines = results_table.remarks(made(fixed), "out.json")
    assert f"bits/dim: the variance is beta_tilde, {results_table.FIXED}" in lines
    assert results.curve_values(fixed)["eval/bits_per_dim-beta_tilde"] == pytest.approx(4.4678901)
    learned = result(2, run="b", variance="learned")
    lines = results_table.remarks(made(fixed, learned), "out.json")
    assert [line.partition(":")[0] for line in lines[-2:]] == ["bits/dim of a", "bits/dim of b"]
    assert json.loads(made(fixed).to_json())["checkpoints"][0]["variance"] == "beta_tilde"


def test_few_held_out_images_are_remarked() -> None:
    few = replace(drawn(1), scores=(Score("KID-pixels", 1.0, 0.1, 640, 20),))
    many = replace(drawn(1), scores=(Score("KID-pixels", 1.0, 0.1, 640, 100),))
    lines = results_table.remarks(made(result(1, few, bits=())), "out.json")
    assert [line for line in lines if line.startswith("20 held-out images are few")]
    lines = results_table.remarks(made(result(1, many, bits=())), "out.json")
    assert not [line for line in lines if "are few" in line]


def test_remarks() -> None:
    few, other = remarks(made(result(1, drawn(1), saw_this_data=False)), "found.json")
    assert few.startswith("FID-pixels: 90 images")
    assert other.startswith("trained on data other") and other.endswith(": a")
    many = replace(drawn(1), scores=(Score("FID-pixels", 1.0, 0.1, 640, 640),))
    assert remarks(made(result(1, many)), "found.json") == []


def test_memorisation_is_reported_with_its_interval() -> None:
    reported = made(result(1, near(0.03)))
    for part in ("0.0423 [0.0300, 0.0700]", "0.0100 ± 0.0030"):
        assert part in printed(reported)
    (sampling,) = json.loads(reported.to_json())["checkpoints"][0]["drawn"]
    assert set(sampling) == {"sample", "is_own", "scores"}  # the plot is a separate file
    (score,) = sampling["scores"]
    right = {"low": 0.03, "high": 0.07, "n": 500, "n_real": 1000, "n_train": 1500, "threshold": 12.5}
    assert score.items() >= (right | {"space": "pixels"}).items()
    points = results.curve_values(reported.results[0])
    groups = [points[f"{group}/nearer_than_held_out-pixels"] for group in ("eval", "eval_low", "eval_high")]
    assert groups == [score["value"], 0.03, 0.07]


def test_a_remark_is_made_if_memorisation_is_clearly_above_the_expected() -> None:
    (line,) = remarks(made(result(1, near(0.03))), "s3://b/out.json")
    assert line.startswith("a, 1,000 images seen, ddim-50: 4.2 % (95 % interval 3.0 % to 7.0 %)")
    assert line.endswith("s3://b/out-nearest.png")
    assert remarks(made(result(1, near(0.019))), "out.json") == []
    (other,) = remarks(made(result(1, near(0.03), saw_this_data=False)), "out.json")
    assert other.startswith("trained on data other than")
    (few,) = remarks(made(result(1, near(0.0, n_real=90))), "out.json")
    assert few.startswith("nearer_than_held_out: 90 held-out images")


def test_each_plot_of_nearest_images_has_its_own_name() -> None:
    def names(*found: CheckpointResult) -> list[str]:
        return [name for name, _, _ in results.nearest_pictures(made(*found), "s3://b.c/d/out.json")]

    assert names(result(1, near(0.0))) == ["s3://b.c/d/out-nearest.png"]
    assert names(result(1, near(0.0), near(0.0, 10)), result(2, drawn(2), run="b c")) == [
        "s3://b.c/d/out-nearest-a-1000-ddim-50.png",
        "s3://b.c/d/out-nearest-a-1000-ddim-10.png",
    ]
    twins = [result(1, near(0.0), weights_sha256=sha * 8) for sha in ("x", "y")]
    assert [name[-12:] for name in names(*twins)] == ["xxxxxxxx.png", "yyyyyyyy.png"]
    assert names(result(1, drawn(1))) == []


def test_bits_with_and_without_labels_are_distinguished() -> None:
    plain = result(1)
    ten = result(1, run="ten", num_classes=10)
    (line,) = remarks(made(plain, ten))
    assert line.startswith("bits/dim: nets with labels (ten) ")
    assert "add log2(10) = 3.32 bits per image" in line  # p(x) >= p(x | y) / 10
    assert remarks(made(ten, replace(ten, run="too"))) == remarks(made(plain, plain)) == []
    assert remarks(made(replace(plain, bits=()), ten)) == []  # uniform_mix has no bound
    assert [v["num_classes"] for v in json.loads(made(plain, ten).to_json())["checkpoints"]] == [0, 10]


def test_few_grey_levels_are_reported_with_the_cost_of_a_uniform_code() -> None:
    (line,) = remarks(made(result(1), grey_levels=17))
    assert "17 grey levels, not 256" in line and "log2(17) = 4.09" in line
    assert remarks(made(replace(result(1), bits=()), grey_levels=17)) == []
