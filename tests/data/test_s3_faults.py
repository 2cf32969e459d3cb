"""S3 faults, with real requests through a faulty proxy: the same images in the same order, or an error in time."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import damaged, proxy, servers
from support.damaged import NUM_IMAGES, PLAN

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.data.ray_stream import open_configured
from ddpm.data.reading import DataSet, LabelledImages
from ddpm.data.row_group import CorruptData
from ddpm.runs import s3
from ddpm.runs.storage import Location
from ddpm.utils.errors import UserError
from ddpm.utils.retry import StorageError

RETRY_S = 300.0


@pytest.fixture
def faulty(
    s3_server: servers.S3Server,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[proxy.FaultyProxy]:
    """A proxy between locations and the server; requests that get no answer time out after two seconds, not twenty."""
    if "black_hole" in request.node.name:  # elsewhere a busy machine may be slow
        monkeypatch.setattr(s3, "REQUEST_TIMEOUT_S", 1.0)
    with proxy.FaultyProxy(s3_server.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        yield faulty


@pytest.fixture
def location(faulty: proxy.FaultyProxy, s3_bucket: str) -> Location:
    return damaged.prepare(f"{s3_bucket}/sets/numbers")


def read_all(data_set: DataSet) -> LabelledImages:
    return data_set.read(data_set.plan(*PLAN), 5, NUM_IMAGES + 5)


def equal(one: LabelledImages, other: LabelledImages) -> bool:
    return np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("reset", {"every": 3}),
        ("slow_down", {"every": 5}),
        ("delay", {"delay_s": 0.05}),
        ("black_hole", {"every": 20}),
    ],
)
def test_faults_do_not_change_the_images(
    faulty: proxy.FaultyProxy, location: Location, mode: proxy.Mode, options: dict[str, Any]
) -> None:
    data_set = damaged.opened(location, RETRY_S)
    undisturbed = read_all(data_set)
    faulty.switch(mode, **options)
    assert equal(read_all(data_set), undisturbed)
    assert faulty.requests[mode] > 0


@pytest.mark.parametrize("mode", ["down", "reset", "slow_down", "black_hole"])
def test_reading_waits_for_the_end_of_an_outage(
    faulty: proxy.FaultyProxy, location: Location, mode: proxy.Mode
) -> None:
    data_set = damaged.opened(location, RETRY_S)
    plan = data_set.plan(*PLAN)
    undisturbed = [data_set.read(plan, start, start + 20) for start in range(0, 60, 20)]
    for k, expected in enumerate(undisturbed):
        if k == 1:
            faulty.switch(mode)
            threading.Timer(1, faulty.switch, ["pass"]).start()
        assert equal(data_set.read(plan, 20 * k, 20 * k + 20), expected)
    assert faulty.mode == "pass", "the outage was not waited out"


@pytest.mark.parametrize(
    ("mode", "answer"),
    [
        ("down", "Could not connect to server"),
        ("reset", "Connection reset by peer"),
        ("slow_down", "HTTP status 503"),
        ("black_hole", "Operation too slow"),
    ],
)
def test_a_permanent_outage_is_an_error_with_bucket_and_last_answer(
    faulty: proxy.FaultyProxy, location: Location, mode: proxy.Mode, answer: str
) -> None:
    data_set = damaged.opened(location, timeout_s=0.5)
    faulty.switch(mode)
    with pytest.raises(StorageError) as caught:  # not CorruptData
        read_all(data_set)
    message = str(caught.value)
    assert message.startswith(f"{location.uri}: storage has failed for ") and "\n" not in message
    assert "--run.storage-timeout-s 0.5)" in message and answer in message


@pytest.mark.parametrize("mode", ["reset", "slow_down"])
def test_damaged_files_are_distinguished_from_storage_faults(
    faulty: proxy.FaultyProxy, location: Location, mode: proxy.Mode
) -> None:
    shard = location.child("train/00001.parquet")
    shard.write(shard.read()[:700])
    location.child("train/00002.parquet").filesystem.delete_file(f"{location.path}/train/00002.parquet")
    data_set = damaged.opened(location, RETRY_S)
    plan = data_set.plan(0, NUM_IMAGES)
    faulty.switch(mode, every=5)
    with pytest.raises(CorruptData, match=r"train/0000[12]\.parquet, row group \d: the shard "):
        data_set.read(plan, 0, NUM_IMAGES)


def test_reading_the_manifest_is_retried(faulty: proxy.FaultyProxy, location: Location) -> None:
    values = {
        "data.shards": location.uri,
        "model.image_size": damaged.SIDE,
        "model.channels": 1,
        "run.storage_timeout_s": RETRY_S,
    }
    config = override(Config(), values)
    faulty.switch("slow_down", every=2)
    data_set = open_configured(config)
    assert data_set.timeout_s == RETRY_S and data_set.rows.num_rows == NUM_IMAGES
    with pytest.raises(UserError, match="no data set at"):  # a real answer, so not retried
        open_configured(override(config, {"data.shards": location.uri + "-not"}))
