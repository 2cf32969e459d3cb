"""What rank 0 writes into a run's folder: pictures are recorded once, and the status says how the run stands."""

import time
from pathlib import Path

import numpy as np
import pytest
from support.local import finished

from ddpm.config.json import override
from ddpm.config.tree import Config
from ddpm.runs import run_folder, storage
from ddpm.runs.run_folder import RunFolder
from ddpm.training.store import RunStore
from ddpm.utils.images import from_png, time_ms_of


@pytest.fixture
def run(root_uri: str) -> RunFolder:
    return RunFolder("one", storage.resolve(root_uri).child("one"), "a")


def test_a_recorded_picture_is_final_and_has_its_time(tiny: Config, run: RunFolder) -> None:
    """A resumed run draws the same picture again, at another time; only `latest.png` is replaced."""
    began_ms = int(time.time() * 1000)
    found = list[bytes]()
    for level in (1, 2):
        image = np.full((6, 6, 3), level, np.uint8)
        with finished(RunStore(tiny, run, "b")) as store, store.latest_checkpoint():
            for series in (run_folder.SAMPLES, run_folder.DENOISING):
                store.picture(series, image, 128)
            store.publish(f"{run_folder.SAMPLES}/latest.png", bytes([level]))
        (samples,) = run_folder.pictures(run.location, run_folder.SAMPLES).values()
        (denoising,) = run_folder.pictures(run.location, run_folder.DENOISING).values()
        found += [samples.read(), denoising.read()]
    assert found[:2] == found[2:] and (from_png(found[0]) == 1).all()
    time_ms = time_ms_of(found[0])
    assert time_ms is not None and began_ms <= time_ms <= time.time() * 1000
    assert run.location.child(f"{run_folder.SAMPLES}/latest.png").read() == b"\2"


def test_the_status_counts_time_and_what_crashes_lost(tiny: Config, run: RunFolder) -> None:
    run_folder.write_status(
        run.location, run_folder.Status(run_folder.RunStatus.STOPPED, 96, 32, 5.0, "1 core", ended_ms=1)
    )
    with finished(RunStore(tiny, run, "b", hardware="2 cores")) as store, store.latest_checkpoint(128):
        pass
    status = run_folder.read_status(run.location)
    assert status is not None and status.minutes >= 5.0
    assert (status.status, status.images_seen, status.images_lost) == ("RUNNING", 0, 32 + 128)
    assert (status.hardware, status.ended_ms) == ("2 cores", None)


def test_a_damaged_status_is_rewritten(tiny: Config, tmp_path: Path) -> None:
    run = RunFolder("one", storage.resolve(str(tmp_path)), "a")
    lines = list[str]()
    run.location.child(run_folder.STATUS).write(b"{")
    store = RunStore(override(tiny, {"train.total_images": 64}), run, "b")
    store.warn = lines.append  # type: ignore[assignment]
    with finished(store), store.latest_checkpoint():
        pass
    assert len(lines) == 1 and run_folder.STATUS in lines[0]
    assert run_folder.read_status(run.location) is not None
