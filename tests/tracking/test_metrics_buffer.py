"""A segment returns exactly the records written to it; every other file is rejected with its name."""

import io
import json
import math
import random
import time
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddpm.tracking import metrics_buffer
from ddpm.tracking.metrics_buffer import (
    Artifact,
    DamagedSegment,
    DataSetInput,
    Metrics,
    MetricsBuffer,
    Picture,
    Tags,
    parse_name,
    segment_name,
)
from ddpm.utils.images import png_bytes

GREY = np.arange(96, dtype=np.uint8).reshape(8, 12, 1)
PNG = png_bytes(GREY)
GOOD = {"kind": "metrics", "values": {"loss": 1.0}, "images_seen": 1, "timestamp_ms": 2}
FILE = {"kind": "artifact", "name": "a.txt", "file": "files/000000"}
TAGS = {"kind": "tags", "tags": {"preset": "digits"}}
DATA = {"kind": "data_set", "name": "digits", "digest": "4f", "uri": "s3://b/d", "profile": "{}"}
IMAGE = {"kind": "image", "key": "k", "file": "files/000000", "images_seen": 1, "timestamp_ms": 2}


def filled() -> MetricsBuffer:
    buffer = MetricsBuffer()
    buffer.metrics({"train/loss": 0.1, "odd": float("nan")}, 64)
    buffer.image("samples", GREY, 64)
    buffer.artifact("pictures/card.txt", b"\x00card")
    buffer.metrics({"up": float("inf"), "down": float("-inf"), "step": np.float32(0.5)}, 2**40)
    return buffer


def segment(*lines: Any, **files: bytes) -> bytes:
    """A hand-made segment file, valid or not: lines that are not strings are encoded as JSON."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        archive.writestr("records.jsonl", "\n".join(texts))
        for name, data in files.items():
            archive.writestr(f"files/{name[1:]}", data)
    return file.getvalue()


def test_take_returns_all_records_in_order_and_only_once() -> None:
    buffer = filled()
    data = metrics_buffer.pack(buffer.take())
    first, image_record, artifact, last = metrics_buffer.read(data, "here")
    assert isinstance(first, Metrics) and isinstance(image_record, Picture) and isinstance(last, Metrics)
    assert (first.values["train/loss"], first.images_seen) == (0.1, 64)
    assert math.isnan(first.values["odd"])
    assert dict(last.values) == {"up": math.inf, "down": -math.inf, "step": 0.5}
    assert last.images_seen == 2**40
    times = [record.timestamp_ms for record in (first, image_record, last)]
    assert all(abs(at / 1000 - time.time()) < 3600 for at in times)
    assert (image_record.key, image_record.images_seen) == ("samples", 64)
    with Image.open(io.BytesIO(image_record.png)) as image:
        assert np.array_equal(np.asarray(image), GREY[:, :, 0])
    assert artifact == Artifact("pictures/card.txt", b"\x00card")
    assert metrics_buffer.count(io.BytesIO(data), "here") == 4
    buffer.artifact("later.txt", b"")
    assert buffer.take() == [Artifact("later.txt", b"")]


@given(st.dictionaries(st.text(), st.floats(allow_nan=False)), st.integers(0, 2**63 - 1))
def test_any_metric_name_and_value_survives_a_round_trip(values: dict[str, float], images_seen: int) -> None:
    record = Metrics(values, images_seen, 0)
    assert metrics_buffer.read(metrics_buffer.pack([record]), "here") == [record]


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 2), (8, 8, 4), (1, 8, 8, 3)])
def test_an_array_that_is_not_an_image_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image samples is uint8"):
        MetricsBuffer().image("samples", np.zeros(shape, np.uint8), 0)


BAD_PATHS = ["", ".", "..", "../a", "/a", "a/../b", "a//b", "a/", "a\\b", "c:a", "a\n"]


@pytest.mark.parametrize("name", BAD_PATHS)
def test_artifact_paths_outside_the_folder_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="not a relative path"):
        MetricsBuffer().artifact(name, b"")
    with pytest.raises(DamagedSegment, match="is not a relative path"):
        metrics_buffer.read(segment(FILE | {"name": name}, _000000=b""), "here")


def test_segment_names_sort_in_delivery_order() -> None:
    order = [
        segment_name(0),
        segment_name(448),
        segment_name(512, after_error=True),  # from the attempt before the one that commits 512
        segment_name(512),
        segment_name(513),
        segment_name(10**12 - 1),
    ]
    assert order == sorted(order)
    assert (order[1], order[2]) == ("000000000448.zip", "000000000512-failed.zip")


@given(st.integers(0, 10**19 - 1), st.booleans())
def test_segment_names_survive_a_round_trip(images_seen: int, is_after_error: bool) -> None:
    assert parse_name(segment_name(images_seen, is_after_error)) == (images_seen, is_after_error)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".000000000512.zip.12.tmp",
        "512.zip",
        "0000000000512.zip",
        "-00000000512.zip",
        "000000000512.zip\n",
        "000000000512-lost.zip",
        "٠٠٠٠٠٠٠٠٠٥١٢.zip",
    ],
)
def test_other_file_names_are_not_segments(name: str) -> None:
    assert parse_name(name) is None


DAMAGED = {
    "empty": b"",
    "no zip": b"records.jsonl",
    "no index": b"PK\x05\x06" + b"\0" * 18,
    "no json": segment("{"),
    "no object": segment("[]"),
    "unknown kind": segment(GOOD | {"kind": "pickle"}),
    "unknown field": segment(GOOD | {"more": 1}),
    "value a word": segment(GOOD | {"values": {"a": "1"}}),
    "step negative": segment(GOOD | {"images_seen": -1}),
    "file missing": segment(FILE),
    "tag no text": segment(TAGS | {"tags": {"preset": 1}}),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_segment_is_reported_with_its_uri(data: bytes) -> None:
    with pytest.raises(DamagedSegment, match=r"^s3://b/here\.zip is damaged"):
        metrics_buffer.read(data, "s3://b/here.zip")


def test_the_segments_are_valid_before_they_are_damaged() -> None:
    assert metrics_buffer.read(segment(GOOD), "here") == [Metrics({"loss": 1.0}, 1, 2)]
    assert metrics_buffer.read(segment(FILE, _000000=b"x"), "here") == [Artifact("a.txt", b"x")]
    assert metrics_buffer.read(segment(IMAGE, _000000=PNG), "here") == [Picture("k", PNG, 1, 2)]
    about = [Tags({"preset": "digits"}), DataSetInput("digits", "4f", "s3://b/d", "{}")]
    assert metrics_buffer.read(segment(TAGS, DATA), "here") == about
    assert metrics_buffer.read(metrics_buffer.pack(list(about)), "here") == about


def test_truncation_and_bit_flips_are_detected_or_harmless() -> None:
    """A bit flip that goes unnoticed (a date in a zip header, say) does not change what is read."""
    data = metrics_buffer.pack(filled().take())
    truth = metrics_buffer.pack(metrics_buffer.read(data, "here"))
    rng = random.Random(0)
    noticed = 0
    for _ in range(400):
        broken = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        if broken:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        try:
            found = metrics_buffer.read(bytes(broken), "here")
        except DamagedSegment:
            noticed += 1
        else:
            assert metrics_buffer.pack(found) == truth
    assert noticed > 300
