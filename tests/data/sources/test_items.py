"""Data sets in Python as a source: the same data set whatever their form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ddpm.config.json import override
from ddpm.config.presets import DIGITS
from ddpm.data import prepare_for_run
from ddpm.data.manifest import read_manifest
from ddpm.data.shards import read_row_group
from ddpm.data.sources.items import Items
from ddpm.runs import storage
from ddpm.utils.errors import UserError

GREY = np.random.RandomState(0).randint(0, 256, (40, 8, 8), np.uint8)
LABEL = np.arange(40) % 3
FORMS: dict[str, Any] = {
    "torch": TensorDataset(torch.from_numpy(GREY)[:, None].float() / 255, torch.from_numpy(LABEL)),
    "dicts": {"train": [{"image": Image.fromarray(i), "label": y} for i, y in zip(GREY, LABEL, strict=True)]},
    "tuples": [(image[..., None], int(y)) for image, y in zip(GREY, LABEL, strict=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_data_set(form: str, tmp_path: Path) -> None:
    config = override(DIGITS, {"run.storage": str(tmp_path)})
    shards = str(prepare_for_run.prepared(config, items=FORMS[form]).data.shards)
    manifest = read_manifest(storage.resolve(shards))
    parts = [read_row_group(storage.resolve(shards), manifest, part, 0) for part in ("train", "test")]
    images, label = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = [int(np.flatnonzero((image[..., 0] == GREY).all((1, 2)))[0]) for image in images]
    assert [len(part) for part, _ in parts] == [32, 8] and manifest.class_names == ("0", "1", "2")
    assert sorted(order) == list(range(40)) and (label == LABEL[order]).all()
    assert prepare_for_run.prepared(config, items=FORMS["dicts"]).data.shards == shards
    assert prepare_for_run.prepared(config, items=[*(GREY ^ 1)]).data.shards != shards


def test_images_are_fitted_and_may_have_no_labels() -> None:
    colour = [Image.new("RGBA", (20, 10), (255, 0, 0, 255)), *[np.zeros((3, 6, 9), np.uint8)] * 3]
    source = Items({"train": colour[:2], "validation": colour[2:]}, 4, 3)
    assert source.class_names == () and source.splits == {"train": 2, "test": 2}
    images, labels = source.read("train", 0, 2)
    assert labels is None and sorted(images[:, 3, 3].tolist()) == [[0, 0, 0], [255, 0, 0]]


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.channels is 2"):
        prepare_for_run.prepared(override(DIGITS, {"model.channels": 2}), items=FORMS["tuples"])
    with pytest.raises(UserError, match=r"^data has the splits all"):
        Items({"all": [GREY[0]]}, 8, 1).identity()
    with pytest.raises(
        UserError, match=r"^data has one split by several names, among train, val, validation"
    ):
        Items({name: [GREY[0]] for name in ("train", "val", "validation")}, 8, 1).identity()
    with pytest.raises(UserError, match=r"^data has the splits train, tests"):
        Items({"train": [GREY[0]], "tests": [GREY[0]]}, 8, 1).identity()
    for nothing in (iter([]), {"train": [GREY[0]], "test": []}):
        with pytest.raises(UserError, match=r"^data: \w+ is \w+"):
            Items(nothing, 8, 1).identity()
    with pytest.raises(UserError, match=r"^data: some items have a label"):
        Items({"train": [(GREY[0], 3)] * 2, "test": [(GREY[1], -1)]}, 8, 1).identity()
    with pytest.raises(UserError, match=r"^data: item 0: it is float64 \(8, 8\)"):
        Items([GREY[0] / 100 - 1] * 2, 8, 1).identity()
