"""examples/tensorboard: TensorBoard reads the curves and pictures of a run's folder."""

import sys
from pathlib import Path

import numpy as np
import pytest
from support import compared, examples, processes

from ddpm.runs import curves, run_folder, storage
from ddpm.utils import images

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

SCRIPT = examples.FOLDER / "tensorboard/write_events.py"


def test_curves_and_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    for name, level in (("a", 0), ("b", 5)):
        compared.make_run(str(tmp_path / "runs"), name, level)
    for _ in range(2):  # the second call replaces the events of the first
        done = processes.run([sys.executable, SCRIPT, "runs/a", "runs/b"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name, level in (("a", 0), ("b", 5)):
        events = event_accumulator.EventAccumulator(str(tmp_path / "events" / name), {"images": 0})
        events.Reload()
        read = curves.read(storage.resolve(str(tmp_path / "runs" / name)))
        assert events.Tags()["scalars"] == list(read)
        for curve, points in read.items():
            shown = [(event.step, event.value, event.wall_time) for event in events.Scalars(curve)]
            expected = [(point.images_seen, point.value, point.timestamp_ms / 1000) for point in points]
            np.testing.assert_allclose(shown, expected, rtol=1e-6)
        assert events.Tags()["images"] == [run_folder.SAMPLES]
        pictures = events.Images(run_folder.SAMPLES)
        assert [picture.step for picture in pictures] == list(compared.STEPS)
        for i, picture in enumerate(pictures):
            assert (images.from_png(picture.encoded_image_string) == compared.grid(level + i)).all()


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    done = processes.run([sys.executable, SCRIPT, "nothing"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing is not a run's folder")
