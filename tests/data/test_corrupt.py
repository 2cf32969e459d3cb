"""Unreadable images are counted once, listed, reloaded, and stop the run above a maximum share."""

import dataclasses
import json
from typing import Any

import pytest

from ddpm.data.corrupt import (
    CorruptData,
    CorruptImages,
    Substitution,
    substitutions_from_json,
    substitutions_to_json,
)
from ddpm.utils.errors import UserError


def substitution(row: int, position: int = 0) -> Substitution:
    return Substitution(
        position, "train/00002.parquet", 3, row, "no ünïcode at all", "train/00000.parquet", 1, 7
    )


def test_an_image_counts_once_however_often_it_is_read() -> None:
    images = CorruptImages(num_rows=100, max_share=0.5)
    assert not images.add([]) and images.count == 0
    assert images.add([substitution(1, position=5), substitution(2), substitution(1, position=9)])
    assert not images.add([substitution(1, position=77)])
    assert images.add([substitution(1, position=78), substitution(3)]) and images.count == 3
    assert [json.loads(line)["position"] for line in images.to_jsonl().splitlines()] == [5, 0, 0]


def test_the_list_survives_a_reload() -> None:
    images = CorruptImages(100, 0.5)
    assert CorruptImages.from_jsonl(images.to_jsonl(), 100, 0.5).count == 0
    images.add([substitution(2), substitution(1)])
    text = images.to_jsonl()
    assert text.count("\n") == 2
    again = CorruptImages.from_jsonl(text, 100, 0.5)
    assert again.to_jsonl() == text and not again.add([substitution(1, position=3)])
    listed = [substitution(2), substitution(1)]
    assert substitutions_from_json(substitutions_to_json(listed)) == listed


def test_above_the_maximum_share_the_run_stops() -> None:
    images = CorruptImages(num_rows=1000, max_share=0.004)
    images.add(substitution(i) for i in range(4))
    images.check()  # exactly as many as allowed
    images.add([substitution(4)])
    with pytest.raises(CorruptData) as caught:
        images.check()
    error_text = str(caught.value)
    assert error_text.startswith(
        "5 of the split's 1000 images (0.50%) cannot be read, more than --data.max-corrupt-share 0.004 allows. "
        "train/00002.parquet, row group 3, row 0: no ünïcode at all; "
    )
    assert error_text.count("row group") == 3 and error_text.endswith("; ...")
    nothing_allowed = CorruptImages(10**6, 0)
    nothing_allowed.check()
    nothing_allowed.add([substitution(0)])
    with pytest.raises(CorruptData, match=r"1 of the split's 1000000 images \(0\.00%\).*all$"):
        nothing_allowed.check()


GOOD = dataclasses.asdict(substitution(1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "it is \\[\\]; it must be an object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "row"}), "it lacks 'row'"),
        (json.dumps(GOOD | {"extra": 1}), "unknown key 'extra'; known are position, shard"),
        (json.dumps(GOOD | {"row": "1"}), "row is '1'; it must be a valid integer"),
        (json.dumps(GOOD | {"row": True}), "row is True"),
        (json.dumps(GOOD | {"position": -1}), "position is -1"),
        (json.dumps(GOOD | {"reason": None}), "reason is None; it must be a valid string"),
        ("", "is not JSON"),
    ],
)
def test_an_invalid_list_is_a_user_error(line: Any, message: str) -> None:
    text = json.dumps(GOOD) + "\n" + line + "\n"
    with pytest.raises(UserError, match=rf"^runs/a/corrupt\.jsonl, line 2:? .*{message}"):
        CorruptImages.from_jsonl(text, 10, 0.1, "runs/a/corrupt.jsonl")
