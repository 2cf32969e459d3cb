"""Image files of any size and mode become images of one size; files that already match keep their bytes."""

import contextlib
import io
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.data.row_group import decode
from ddpm.data.sources.conversion import ImageFile, store
from ddpm.data.sources.image_folder import Folder
from ddpm.data.sources.sources import UnreadableImages
from ddpm.utils.errors import UserError


def image_of(height: int, width: int, color: Any = (10, 200, 30), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), color)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(data: bytes, size: int = 8, channels: int = 3) -> np.ndarray:
    (image,), _ = store([ImageFile(data, "it", None)], size, channels, "encoded")
    decoded = decode(bytes(image), size, size, channels)
    assert (
        store([ImageFile(data, "it", None)], size, channels, "raw")[0][0] == decoded
    ).all()  # both encodings must agree
    return decoded


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_matching_image_keeps_its_bytes(kind: str) -> None:
    data = file_of(image_of(8, 8), kind)
    assert store([ImageFile(data, "it", None)], 8, 3, "encoded") == ([data], None)


def test_other_sizes_are_cropped_to_the_centre_square() -> None:
    wide = image_of(8, 24, (255, 0, 0))
    wide.paste((0, 0, 255), (8, 0, 16, 8))
    assert (stored(file_of(wide)) == (0, 0, 255)).all()
    assert (stored(file_of(wide.rotate(90, expand=True))) == (0, 0, 255)).all()
    large = wide.resize((240, 80), Image.Resampling.NEAREST)
    assert (abs(stored(file_of(large))[2:-2, 2:-2].astype(int) - (0, 0, 255)) <= 10).all()
    assert (stored(file_of(image_of(3, 3))) == (10, 200, 30)).all()  # smaller images are enlarged


def test_image_modes_are_converted() -> None:
    assert (stored(file_of(image_of(8, 8, 77, "L"))) == 77).all()
    assert (stored(file_of(image_of(8, 8, (200, 0, 0))), channels=1) == 60).all()  # ITU-R BT.601 luma
    assert (
        stored(file_of(image_of(8, 8, (10, 20, 30, 0), "RGBA"))) == 255
    ).all()  # transparent pixels become white
    assert (stored(file_of(image_of(8, 8, (10, 20, 30)).quantize(4))) == (10, 20, 30)).all()
    deep = Image.fromarray(np.full((8, 8), 100 << 8, np.uint16))
    assert (stored(file_of(deep), channels=1) == 100).all()


def test_exif_rotation_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees to the left
    halves = image_of(8, 8, 0, "L")
    halves.paste(255, (0, 0, 4, 8))
    upright = stored(file_of(halves, "PNG", exif=exif), channels=1)
    assert (upright[:4] == 255).all() and (upright[4:] == 0).all()
    damaged = file_of(halves, "JPEG", exif=b"Exif\0\0no TIFF at all", quality=100)
    as_it_is = stored(damaged, channels=1)
    assert (as_it_is[:, :4] > 250).all() and (as_it_is[:, 4:] < 5).all()


NOT_AN_IMAGE = "it is not a PNG, JPEG, WEBP, BMP or TIFF file"


def test_all_unreadable_images_of_a_range_are_named() -> None:
    good = file_of(image_of(8, 8))
    cut_off = file_of(image_of(64, 64), "JPEG")[:-300]
    datas = [
        good,
        b"",
        b"text",
        cut_off,
        file_of(image_of(8, 8), "GIF"),
        OSError(13, "Permission denied"),
        good,
    ]
    image_files = [ImageFile(data, f"cats/{i}.png", i) for i, data in enumerate(datas)]
    for encoding in ("encoded", "raw"):
        first = rf"^cannot read the image cats/1\.png: {NOT_AN_IMAGE}$"
        with pytest.raises(UnreadableImages, match=first) as caught:
            store(image_files, 8, 3, encoding)  # type: ignore[arg-type]
        reasons = [f"cats/{i}.png: {NOT_AN_IMAGE}" for i in (1, 2, 4)] + ["cats/5.png: Permission denied"]
        assert caught.value.reasons[2].startswith("cats/3.png: ")
        assert [*caught.value.reasons[:2], *caught.value.reasons[3:]] == reasons
        assert len(caught.value.images) == 2 and caught.value.labels is not None
        assert caught.value.labels.tolist() == [0, 6]


def write_tree(root: Path, files: dict[str, int]) -> None:
    """Write image files, each of a single grey value."""
    for name, grey in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file_of(image_of(8, 8, (grey,) * 3)))


def content(source: Folder, split: str) -> list[tuple[int, str | None]]:
    """(grey value, class) of every image, sorted."""
    images, labels = source.read(split, 0, source.splits[split])
    greys = [int(decode(bytes(image), 8, 8, 3)[0, 0, 0]) for image in images]
    names = [None] * len(greys) if labels is None else [source.class_names[label] for label in labels]
    return sorted(zip(greys, names, strict=True))


def test_subfolders_are_classes(tmp_path: Path) -> None:
    names = [f"{name}/deep/{i}.PNG" for i in range(10) for name in "ab"]
    write_tree(tmp_path / "x", {name: grey for grey, name in enumerate(names)})
    source = Folder(tmp_path / "x", size=8)
    assert source.class_names == ("a", "b") and source.splits == {"train": 16, "test": 4}
    both = sorted(content(source, "train") + content(source, "test"))
    assert both == [(grey, name[0]) for grey, name in enumerate(names)]
    first, _ = source.read("train", 3, 6)
    assert list(first) == list(source.read("train", 0, 16)[0])[3:6]
    _, labels = source.read("train", 0, 10)
    assert labels is not None and len(set(labels.tolist())) == 2  # classes are shuffled
    identity = source.identity()
    (tmp_path / "x").rename(tmp_path / "y")  # the location does not matter
    assert Folder(tmp_path / "y", size=8).identity() == identity
    write_tree(tmp_path / "y", {"a/2.png": 1})
    assert Folder(tmp_path / "y", size=8).identity() != identity


def test_a_class_whose_name_is_not_utf_8_is_a_user_error(tmp_path: Path) -> None:
    folder = os.fsdecode(b"caf\xe9")
    write_tree(tmp_path, {f"{folder}/0.png": 0, "b/1.png": 1})
    with pytest.raises(UserError, match=r"caf\\udce9 is not UTF-8"):
        Folder(tmp_path, size=8)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for message in ("is not a folder; --path", "holds no images", "1 image"):
        with pytest.raises(UserError, match=message):
            Folder(tmp_path / "in", size=8)
        write_tree(tmp_path, {"in/0.png": 0} if (tmp_path / "in").exists() else {"in/.0.png": 0})
    write_tree(tmp_path, {f"in/{i}.png": i for i in range(4)})
    source = Folder(tmp_path / "in", size=8)
    assert source.class_names == () and source.read("train", 0, 3)[1] is None
    write_tree(tmp_path, {"in/a/9.png": 9})
    with pytest.raises(UserError, match=r"0\.png is in no subfolder"):
        Folder(tmp_path / "in", size=8)


def test_split_folders_are_used(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train/a/0.png": 0, "train/b/1.png": 1, "val/a/2.png": 2})
    source = Folder(tmp_path, size=8)
    assert content(source, "train") == [(0, "a"), (1, "b")] and content(source, "test") == [(2, "a")]
    (tmp_path / "__MACOSX/train").mkdir(parents=True)
    (tmp_path / "__MACOSX/train/._0.png").touch()
    (tmp_path / "train").rename(tmp_path / "Train")
    assert content(Folder(tmp_path, size=8), "test") == [(2, "a")]
    write_tree(tmp_path, {"valid/a/4.png": 4})
    with pytest.raises(UserError, match="Train, val, valid"):
        Folder(tmp_path, size=8)
    (tmp_path / "valid/a/4.png").unlink()
    (tmp_path / "valid/a").rmdir()
    (tmp_path / "valid").rmdir()
    (tmp_path / "Train").rename(tmp_path / "train")
    write_tree(tmp_path, {"other/3.png": 3})  # now train and val are ordinary classes
    assert Folder(tmp_path, size=8).class_names == ("other", "train", "val")


def test_a_deleted_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{i}.png": i for i in range(4)})
    source = Folder(tmp_path, size=8)
    for i in range(4):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*\.png: No such file"):
        source.read("train", 0, 1)
    with pytest.raises(UserError, match=r"cannot read .*\.png'"):
        source.identity()


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Make `path` unreadable while the context is open; root, who may read everything, becomes user nobody."""
    was_root = os.geteuid() == 0
    path.chmod(0)
    if was_root:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        path.chmod(0o755)


def test_missing_read_permissions_are_user_errors(public_folder: Path) -> None:
    write_tree(public_folder, {f"{name}/{i}.png": i for i in range(2) for name in "ab"})
    assert len(Folder(public_folder, size=8).class_names) == 2
    with (
        unreadable(public_folder / "b"),
        pytest.raises(UserError, match=r"^cannot read .*/b: Permission denied; "),
    ):
        Folder(public_folder, size=8)
    with unreadable(public_folder), pytest.raises(UserError, match=r"^cannot read .*: Permission denied; "):
        Folder(public_folder, size=8)
    with unreadable(public_folder / "b/1.png"):
        source = Folder(public_folder, size=8)
        with pytest.raises(UnreadableImages) as caught:
            source.read("train", 0, 3), source.read("test", 0, 1)
        assert caught.value.reasons == [f"{public_folder}/b/1.png: Permission denied"]


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"in/cats/{name}.png": 0 for name in ("0", "1", "2", "._0", ".thumbnails/0")})
    cats = tmp_path / "in/cats"
    os.mkfifo(cats / "pipe.png")
    (cats / "gone.png").symlink_to("nowhere")
    (cats / "x\n\x1b[31mred.txt").write_text("")
    (tmp_path / "in/dogs").symlink_to(cats)
    source = Folder(tmp_path / "in", size=8)
    assert source.splits == {"train": 2, "test": 1} and source.class_names == ("cats",)
    assert source.skipped == "6 other files, such as cats/._0.png, cats/.thumbnails, cats/gone.png"
    for name in ("0.png", "1.png", "2.png", "._0.png", "gone.png", ".thumbnails/0.png"):
        (cats / name).unlink()
    (cats / ".thumbnails").rmdir()
    skipped = r"3 other files, such as cats/pipe\.png, cats/x\\n\\x1b\[31mred\.txt, dogs"
    with pytest.raises(UserError, match=f"holds no images .*; skipped: {skipped}"):
        Folder(tmp_path / "in", size=8)
    # Those outside the splits, too.
    write_tree(tmp_path, {"of/train/0.png": 0, "of/train/1.png": 1, "far/2.png": 2, "of/stray.png": 3})
    (tmp_path / "of/val").symlink_to(tmp_path / "far")
    source = Folder(tmp_path / "of", size=8)
    assert source.splits == {"train": 2, "test": 1} and source.skipped == "1 other file, such as stray.png"
