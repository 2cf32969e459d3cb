"""A report: its table, JSON, metrics, remarks agree."""

import json
import re
from dataclasses import replace

import pytest
from support.reported import METRICS, drawn, made, near, result

from ddpm.evaluation import results_table
from ddpm.runs.evaluations import CheckpointResult, Report, Score, nearest_pictures
from ddpm.tracking.evaluations import curve_values

ONE = made(result(1, drawn(1)))
SEVERAL = made(
    *(result(i, drawn(i)) for i in (1, 2, 3)),
    result(1, drawn(9, 10, own=False), run="b"),
)


def printed(reported: Report, width: int = 250) -> str:
    return results_table.table(reported).text(width)


@pytest.mark.parametrize("reported", [ONE, SEVERAL], ids=["one", "several"])
def test_table_and_json_agree_on_any_terminal(reported: Report) -> None:
    parsed = json.loads(reported.to_json())
    assert parsed["format"] == "ddpm-evaluation/3"
    wide = printed(reported)
    narrow = printed(reported, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    for checkpoint in parsed["checkpoints"]:
        for score in (checkpoint["bits"], *checkpoint["drawn"]["scores"]):
            shown = f"{score['value']:.4f} ± {score['error']:.4f}"
            assert shown in wide and shown in narrow
    for part in ("0.2000 ± 0.0300", "real against real", "1,000", "ddim-50"):
        assert part in wide
    assert "500 generated and 90 held-out" in " ".join(results_table.remarks(reported, "out.json"))


def test_the_table_has_a_row_for_each_metric_and_a_column_for_each_checkpoint() -> None:
    made_table = results_table.table(SEVERAL)
    assert made_table.names == ["run", *"aaab", "real against real"]
    words = {row[0]: list(row[1:]) for row in made_table.rows}
    assert words["images seen"] == ["1,000", "2,000", "3,000", "1,000", ""]
    assert words["sampler"] == ["ddim-50", "ddim-50", "ddim-50", "ddim-10", ""]
    assert len(words) == 2 + 1 + len(METRICS)
    assert len(set(words["KID-pixels"])) == 5
    missing = results_table.table(made(result(1, drawn(1)), result(1, near(0.03))))
    assert dict(zip(missing.names, missing.rows[-1], strict=False))["run"].startswith("nearer")
    assert missing.rows[-1][1] == ""


def test_run_names_cannot_inject_markup() -> None:
    name = "a\nerror: b \x1b[2J[red]c[/red]"
    one = result(1, drawn(1), run=name)
    other = result(2, drawn(2), run="b")
    for reported in (made(one), made(one, other)):
        assert "a\\nerror: b \\x1b[2J[red]c[/red]" in printed(reported)


def test_metric_names_say_how_they_were_measured() -> None:
    points = curve_values(result(1, drawn(1)))
    right = {
        "eval/bits_per_dim": pytest.approx(4.4678901),
        "eval_error/bits_per_dim": 0.05,
        "eval/KID-pixels": drawn(1).scores[1].value,
        "eval_floor/KID-pixels": 1.2,
    }
    assert {name: points[name] for name in right} == right
    assert len(points) == 2 + 3 * len(METRICS)
    other = curve_values(result(1, drawn(1, 10, own=False, eta=0.5)))
    assert other["eval/ddim-10 eta 0.5/KID-pixels"] == drawn(1, 10).scores[1].value
    assert other["eval/bits_per_dim"] == points["eval/bits_per_dim"]
    nothing = replace(drawn(1), scores=())
    broken = result(1, nothing, bits=Score("bits/dim", float("nan"), float("inf"), 90))
    assert curve_values(broken) == {}
    score = json.loads(made(broken).to_json())["checkpoints"][0]["bits"]
    assert (score["value"], score["error"], score["n"]) == (None, None, 90)


def test_the_report_key_depends_on_checkpoints_and_settings_only() -> None:
    assert re.fullmatch(r"000000001000-[0-9a-f]{8}", ONE.key)
    assert made(result(1, replace(drawn(5), scores=()))).key == ONE.key
    others = [
        made(result(1, drawn(1, 10))),
        made(result(1, drawn(1), weights_sha256="other")),
        Report({**ONE.settings, "num_images": 7}, ONE.results),
    ]
    assert len({ONE.key, *(other.key for other in others)}) == 4
    assert [v.run for v in SEVERAL.of_run("keyb").results] == ["b"]


def remarks(reported: Report, out: str = "out.json") -> list[str]:
    """All remarks but those on the numbers of images."""
    return [line for line in results_table.remarks(reported, out) if not line.endswith(" held-out images")]


def test_other_training_data_are_remarked() -> None:
    (other,) = remarks(made(result(1, drawn(1), saw_this_data=False)))
    assert other.startswith("trained on data other") and other.endswith(": a")
    assert remarks(ONE) == []


def test_memorisation_is_reported_with_its_interval() -> None:
    reported = made(result(1, near(0.03)))
    for part in ("0.0423 [0.0300, 0.0700]", "0.0100 ± 0.0030"):
        assert part in printed(reported)
    sampling = json.loads(reported.to_json())["checkpoints"][0]["drawn"]
    assert set(sampling) == {"sample", "is_own", "scores"}  # the picture is a separate file
    (score,) = sampling["scores"]
    assert score.items() >= {"low": 0.03, "high": 0.07, "n": 500, "n_real": 1000}.items()
    points = curve_values(reported.results[0])
    groups = [points[f"{group}/nearer_than_held_out-pixels"] for group in ("eval", "eval_low", "eval_high")]
    assert groups == [score["value"], 0.03, 0.07]


def test_a_remark_is_made_if_memorisation_is_clearly_above_the_expected() -> None:
    (line,) = remarks(made(result(1, near(0.03))), "s3://b/out.json")
    assert line.startswith(
        "a, 1,000 images seen, nearer_than_held_out-pixels: 4.2 % (95 % interval 3.0 % to 7.0 %)"
    )
    assert line.endswith("s3://b/out-nearest.png")
    assert remarks(made(result(1, near(0.019)))) == []
    (other,) = remarks(made(result(1, near(0.03), saw_this_data=False)))
    assert other.startswith("trained on data other than")


def test_each_picture_of_nearest_images_has_its_own_name() -> None:
    def names(*found: CheckpointResult) -> list[str]:
        return [name for name, _ in nearest_pictures(made(*found), "s3://b.c/d/out.json")]

    assert names(result(1, near(0.0))) == ["s3://b.c/d/out-nearest.png"]
    several = result(1, near(0.0)), result(2, drawn(2)), result(3, near(0.0))
    assert names(*several) == ["s3://b.c/d/out-nearest-1.png", "s3://b.c/d/out-nearest-2.png"]
    assert names(result(1, drawn(1))) == []
