"""The digest of a source's files follows from their contents; a cache spares reading those that are as before."""

import os
import shutil
from pathlib import Path

import pytest

from ddpm.data.sources import file_digests
from ddpm.data.sources.file_digests import digest_of_files
from ddpm.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "RECENT_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in/cats").mkdir(parents=True)
    for name in ("a", "b", "cats/c"):
        (tmp_path / f"in/{name}.png").write_bytes(name.encode() * 100)
    return tmp_path / "in"


def digest(folder: Path) -> str:
    return digest_of_files(folder, folder.rglob("*.png"))


def fail(path: Path) -> str:
    raise AssertionError(f"{path} is read again")


def test_times_and_places_do_not_matter(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    os.utime(folder / "a.png", (1, 1))
    assert digest(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(tmp_path / "copy") == before
    (folder / "a.png").rename(folder / "cats/a.png")
    assert digest(folder) != before


def test_an_edit_that_keeps_size_and_time_is_noticed(folder: Path) -> None:
    file = folder / "cats/c.png"
    before = digest(folder)
    assert digest(folder) == before
    times = file.stat()
    file.write_bytes(b"CATS/C" * 100)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert digest(folder) != before


def test_an_unchanged_file_is_not_read_again(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(folder)
    with monkeypatch.context() as patch:
        patch.setattr(file_digests, "_digest", fail)
        assert digest(folder) == before
        (folder / "b.png").touch()
        with pytest.raises(AssertionError, match=r"b\.png"):
            digest(folder)
    assert digest(folder) == before
    (cached,) = own_cache.iterdir()
    for damage in (b"", b"{", b"[]", b'{"a.png": 3}', b'{"a.png": [[1, 2, 3], 4]}', b"[" * 100_000):
        cached.write_bytes(damage)
        assert digest(folder) == before


def test_a_file_that_changed_just_now_is_not_in_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next change could leave the same size and times, since clocks of file systems are coarse."""
    monkeypatch.setattr(file_digests, "RECENT_NS", 3600 * 10**9)
    digest(folder)
    monkeypatch.setattr(file_digests, "_digest", fail)
    with pytest.raises(AssertionError):
        digest(folder)


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(folder)
    monkeypatch.setenv("DDPM_CACHE", str(folder / "a.png"))
    assert digest(folder) == before
    monkeypatch.delenv("DDPM_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert digest(folder) == before


def test_a_missing_file_is_a_user_error_and_an_unreadable_one_is_left_to_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(folder)
    (folder / "b.png").unlink()
    (folder / "b.png").mkdir()  # it cannot be read, not even by root
    assert digest(folder) != before
    with pytest.raises(UserError, match=r"cannot read .*gone\.png"):
        digest_of_files(folder, [folder / "gone.png"])
