"""The source of examples/glyphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support import examples

from ddpm.config import kinds
from ddpm.data.manifest import MANIFEST

glyphs = examples.load("glyphs", "ddpm_glyphs")


def test_glyphs_are_distinct_legible_and_balanced() -> None:
    source = glyphs.Glyphs(num_images=620)
    images, labels = source.read("train", 0, source.splits["train"])
    test, test_labels = source.read("test", 0, source.splits["test"])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert np.bincount(np.concatenate([labels, test_labels])).tolist() == [10] * len(glyphs.CHARACTERS)
    ink = (images > 127).mean((1, 2, 3))
    assert ink.min() > 0.01 and ink.max() < 0.5
    # The nearest class mean is far better than chance (1/62): labels match images.
    means = np.stack([images[labels == label].mean(0) for label in range(len(glyphs.CHARACTERS))])
    distance = ((test[:, None].astype(float) - means[None]) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test_labels).mean() > 0.15


def test_glyphs_depend_on_the_seed() -> None:
    images, _ = glyphs.Glyphs(num_images=100).read("train", 0, 95)
    other, _ = glyphs.Glyphs(num_images=100, seed=1).read("train", 0, 95)
    assert (images != other).any()


def test_a_range_is_a_slice_of_the_whole() -> None:
    source = glyphs.Glyphs(num_images=200)
    images, labels = source.read("train", 0, source.splits["train"])
    part, part_labels = source.read("train", 7, 23)
    assert (part == images[7:23]).all() and (part_labels == labels[7:23]).all()


def test_it_is_registered_where_its_folder_is_on_the_path(on_path: Callable[[str], None]) -> None:
    assert not kinds.is_known("data.source", "glyphs")
    on_path("glyphs")
    assert kinds.find("data.source", "glyphs").load() is glyphs.Glyphs


def test_it_is_prepared_from_the_command_line(run_job: Callable[..., Any], tmp_path: Path) -> None:
    words = ["prepare", "glyphs", "shards", "--num-images", "200", "--size", "16"]
    done = run_job(*words, cwd=tmp_path, env=examples.env("glyphs"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards" / MANIFEST).is_file()
    refused = run_job("prepare", "glyphs", "more", "--size", "8", cwd=tmp_path, env=examples.env("glyphs"))
    assert refused.returncode == 2 and "size is 8" in refused.stderr
