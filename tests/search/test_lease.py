"""Two processes never drive the same search at once, and who is dead does not keep it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm import storage
from ddpm.config import UserError
from ddpm.search import lease
from ddpm.search.lease import Lease
from ddpm.storage import Location


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Location]:
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    monkeypatch.setattr(lease, "PATIENCE_S", 30.0)  # a living one is noticed long before, on any machine
    yield storage.resolve(str(tmp_path))


def quiet(line: str) -> None: ...


def test_a_second_one_is_refused_while_the_first_lives(place: Location) -> None:
    with Lease(place, quiet) as first:
        with pytest.raises(UserError, match=r"another process drives this search \(host .*, pid \d+\)"):
            Lease(place, quiet).__enter__()
        assert not first.is_lost
    assert not place.child(lease.FILE).exists()  # so that the next one need not wait
    with Lease(place, pytest.fail):
        pass


@pytest.mark.parametrize("left", ['{"id": "a", "host": "h", "pid": 1, "beats": 9}', "{", "[]", ""])
def test_who_is_dead_is_succeeded(place: Location, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 0.1)
    place.child(lease.FILE).write(left.encode())
    lines: list[str] = []
    with Lease(place, lines.append):
        assert "waiting" in lines[0] and len(lines) == 1
        assert b'"beats"' in place.child(lease.FILE).read()


def test_one_that_leaves_meanwhile_is_succeeded_at_once(place: Location) -> None:
    file = place.child(lease.FILE)
    file.write(b"{}")
    with Lease(place, lambda line: file.filesystem.delete_file(file.path)):
        pass


def test_who_was_silent_for_too_long_learns_that_another_has_it(place: Location) -> None:
    file = place.child(lease.FILE)
    with Lease(place, quiet) as first:
        while not first.is_lost:  # it may write over it once: it looked just before
            file.write(b'{"id": "another"}')
    assert file.read() == b'{"id": "another"}'
