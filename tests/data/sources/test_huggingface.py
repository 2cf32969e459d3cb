"""Hugging Face's data sets: Parquet files, saved data sets and names on the hub give the same images as they hold."""

import io
import json
import pickle
import shutil
import socketserver
import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import processes

from ddpm.data.row_group import decode
from ddpm.data.sources.huggingface import HuggingFace
from ddpm.data.sources.sources import UnreadableImages
from ddpm.utils.errors import UserError

NAMES = ["cat", "dog"]


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(file, "PNG")
    return file.getvalue()


def write_parquet(
    path: Path, greys: list[int], labels: list[int] | None, names: list[str] | None = None
) -> None:
    """Write a Parquet file as `datasets` does, with row groups of three."""
    images = [{"bytes": png(grey), "path": f"{grey}.png"} for grey in greys]
    columns: dict[str, Any] = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    }
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def content(source: HuggingFace, split: str) -> list[tuple[int, str | None]]:
    """(grey value, class) of every image, sorted."""
    images, labels = source.read(split, 0, source.splits[split])
    greys = [int(decode(bytes(image), 8, 8, 3)[0, 0, 0]) for image in images]
    names = [None] * len(greys) if labels is None else [source.class_names[label] for label in labels]
    return sorted(zip(greys, names, strict=True))


@pytest.mark.lowest
def test_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", [*range(5)], [0, 1, 0, 1, 0], NAMES)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", [5, 6], [1, 1], NAMES)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [7], [1], NAMES)
    (tmp_path / "README.md").touch()
    source = HuggingFace(tmp_path, size=8)
    assert source.splits == {"train": 7, "test": 1} and source.class_names == ("cat", "dog")
    labels = ["cat", "dog", "cat", "dog", "cat", "dog", "dog"]
    assert content(source, "train") == list(enumerate(labels))
    assert content(source, "test") == [(7, "dog")]
    whole, whole_labels = source.read("train", 0, 7)
    assert {*whole} == {png(grey) for grey in range(7)}  # images that fit keep their bytes
    images, part = source.read("train", 2, 6)
    assert list(images) == list(whole)[2:6] and whole_labels is not None
    assert part is not None and part.tolist() == whole_labels[2:6].tolist()
    assert HuggingFace(tmp_path, size=8, label_column=None).class_names == ()


def test_the_identity_follows_from_the_content(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a/train.parquet", [*range(5)], [0, 1, 0, 1, 0], NAMES)
    identity = HuggingFace(tmp_path / "a", size=8).identity()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert HuggingFace(tmp_path / "b", size=8).identity() == identity
    size = (tmp_path / "b/train.parquet").stat().st_size
    write_parquet(tmp_path / "b/train.parquet", [*range(5)], [1, 0, 0, 1, 0], NAMES)
    assert (tmp_path / "b/train.parquet").stat().st_size == size
    assert HuggingFace(tmp_path / "b", size=8).identity() != identity
    assert HuggingFace(tmp_path / "a", size=8, image_column="image", label_column=None).identity() != identity


def test_a_sorted_data_set_is_mixed(tmp_path: Path) -> None:
    """Any range of rows has all classes; an order of another seed is another data set."""
    labels = [i // 50 for i in range(500)]
    write_parquet(tmp_path / "train.parquet", [0] * 500, labels)
    write_parquet(tmp_path / "test.parquet", [0] * 500, labels)
    source = HuggingFace(tmp_path, size=8)
    for split in ("train", "test"):
        for start in range(0, 500, 100):
            _, part = source.read(split, start, start + 100)
            assert part is not None and len(set(part.tolist())) == 10
    assert source.identity() != HuggingFace(tmp_path, size=8, seed=1).identity()


def test_folders_of_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "default/train/0000.parquet", [0, 1], None)
    write_parquet(tmp_path / "default/valid/0000.parquet", [2], None)
    source = HuggingFace(tmp_path, size=8)
    assert content(source, "train") == [(0, None), (1, None)] and content(source, "test") == [(2, None)]


def test_a_single_parquet_file_is_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all.parquet", list(range(40)), [i % 3 for i in range(40)])
    source = HuggingFace(tmp_path / "all.parquet", size=8)
    assert source.splits == {"train": 32, "test": 8} and source.class_names == ("0", "1", "2")
    both = content(source, "train") + content(source, "test")
    assert sorted(both) == [(i, str(i % 3)) for i in range(40)]


def data_set(greys: range) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in greys]
    return datasets.Dataset.from_dict({"image": images, "label": [grey % 2 for grey in greys]}, features)


def test_saved_data_sets(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": data_set(range(6)), "valid": data_set(range(6, 8))})
    parts.save_to_disk(tmp_path / "both")
    source = HuggingFace(tmp_path / "both", size=8)
    assert content(source, "train") == [(grey, NAMES[grey % 2]) for grey in range(6)]
    assert content(source, "test") == [(6, "cat"), (7, "dog")]
    parts["train"].save_to_disk(tmp_path / "one")
    assert HuggingFace(tmp_path / "one", size=8).splits == {"train": 5, "test": 1}


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        return datasets.DatasetDict({"train": data_set(range(6))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HuggingFace(Path("owner/pets"), size=8)
    assert source.splits == {"train": 5, "test": 1} and source.class_names == ("cat", "dog")
    assert source.identity() != HuggingFace(Path("owner/others"), size=8).identity()
    again = pickle.loads(pickle.dumps(source))  # another machine loads it, too
    assert asked == [("owner/pets",), ("owner/others",)]
    assert content(again, "train") == content(source, "train")
    assert asked[2:] == [("owner/pets",)]


def test_a_hub_that_is_not_reached_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"^cannot read owner/pets: [^\n]*$"):  # tests are offline
        HuggingFace(Path("owner/pets"), size=8)


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_mistyped_name_is_one_line(tmp_path: Path, is_reached: bool) -> None:
    """If the hub is not reached, it is not the line that `datasets` has after six tries."""

    class Hub(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(
                b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\n\r\n"
            )

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hub) as hub:
        host, port = hub.server_address
        threading.Thread(target=hub.serve_forever).start()
        if not is_reached:
            hub.shutdown()
            hub.server_close()
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://{host}:{port}"}  # read once in a process
        words = "prepare parquet out --path pets/catz --size 8".split()
        done = processes.run_job(*words, cwd=tmp_path, env=env)
        hub.shutdown()
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read pets/catz: "), done.stderr
    assert done.stderr.count("\n") == 1 and "hub" in done.stderr.lower()
    assert "Couldn't reach" not in done.stderr


def test_images_outside_the_data_set_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    images = pa.array([{"bytes": None, "path": str(tmp_path / "0.png")}] * 2)
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    with pytest.raises(UnreadableImages, match="it has no bytes"):
        HuggingFace(tmp_path / "x.parquet", size=8).read("train", 0, 1)


def test_unsuitable_data_is_a_user_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path("absent.parquet")):
        with pytest.raises(UserError, match=r"^cannot read .*; it must be a Parquet file"):
            HuggingFace(path, size=8)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet"):
        HuggingFace(path, size=8)
    pq.write_table(pa.table({"img": pa.array([1, 2])}), path)
    for column in ("image", "img"):
        with pytest.raises(UserError, match=rf"'{column}'.*--image-column"):
            HuggingFace(path, size=8, image_column=column)
    with pytest.raises(UserError, match=r"'img'.*--label-column"):
        pq.write_table(pa.table({"image": [png(0), png(1)], "img": ["cat", "dog"]}), path)
        HuggingFace(path, size=8, label_column="img")
    write_parquet(path, [0, 1], [0, -1])
    with pytest.raises(UserError, match="holds the label -1"):
        HuggingFace(path, size=8)
    write_parquet(path, [0, 1], [0, 2], NAMES)
    with pytest.raises(UserError, match="label 2"):
        HuggingFace(path, size=8)
    pq.write_table(pa.table({"image": pa.array([png(0), b"broken"])}), path)
    with pytest.raises(UserError, match=r"cannot read the image .*x\.parquet, train, row 1"):
        HuggingFace(path, size=8).read("train", 0, 1), HuggingFace(path, size=8).read("test", 0, 1)
    write_parquet(tmp_path / "folder/test.parquet", [0, 1], None)
    with pytest.raises(UserError, match="train is missing"):
        HuggingFace(tmp_path / "folder", size=8)


def test_labels_are_the_numbers_of_the_rows(tmp_path: Path) -> None:
    """Across the batches in which rows are read."""
    count = 600
    write_parquet(tmp_path / "all.parquet", [i % 250 for i in range(count)], [i % 250 for i in range(count)])
    images, labels = HuggingFace(tmp_path / "all.parquet", size=8, encoding="raw").read("train", 0, 570)
    assert labels is not None and np.array_equal(np.asarray(images)[:, 0, 0, 0], labels)
