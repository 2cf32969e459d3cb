"""The generations of a run: each start of its workers is one, and what an older one writes too late does not count.

A driver, or a worker, that was suspended for longer than the patience of the lock (lock.py) goes on writing beside its
successor when it wakes up. To look first and write then would leave a gap. So nothing that is final is ever replaced:
checkpoints and parts of the curves have the number of their generation in their names, and are created only if absent.
generations.json says which of them count. It is written by compare-and-swap alone:

- A driver that has the lock claims the run. From then on no other driver's workers can change the file.
- Workers that start begin a generation: the position and the number of rows from which it goes on. What an older
  generation stores beyond them does not count.
- After a checkpoint its generation commits the rows that are final, and the oldest checkpoint that stays.

    {"driver": "5f0c...", "writer": "91ab...", "num_rows": 350, "oldest": 1280, "began": [[0, 0], [2560, 150]]}
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from annotated_types import Ge

from ddpm.runs.shared_file import Version, shared_file
from ddpm.runs.storage import Location
from ddpm.utils import strict_json
from ddpm.utils.errors import UserError

FILE = "generations.json"
SUFFIX = re.compile(r"-g(?P<generation>[1-9]\d*)")
"""The end of a name that belongs to a generation."""
NonNegative = Annotated[int, Ge(0)]


class Superseded(UserError):
    """Another driver, or other workers, have taken over the run."""

    exit_code = 1


@dataclass(frozen=True)
class Generations:
    """Content of generations.json; generations are numbered from 1."""

    driver: str = ""
    """Id of the lock of the driver that has claimed the run."""
    writer: str = ""
    """Id of the newest generation's writer; empty: a driver has claimed the run, and its workers have not begun."""
    num_rows: NonNegative = 0
    """Rows of the curves that are final."""
    oldest: NonNegative = 0
    """Checkpoints of fewer images are being removed."""
    began: tuple[tuple[NonNegative, NonNegative], ...] = ()
    """Of each generation: images_seen and number of rows at its beginning."""

    @property
    def num_final(self) -> float:
        """The number of rows of the curves that are final; without a driver all are."""
        return self.num_rows if self.driver else float("inf")

    def last_checkpoint(self, generation: int) -> float:
        """images_seen beyond which a generation's checkpoints do not count."""
        return min((images_seen for images_seen, _ in self.began[generation:]), default=float("inf"))

    def last_row(self, generation: int) -> float:
        """The number of rows beyond which those that a generation has stored do not count."""
        return min((num_rows for _, num_rows in self.began[generation:]), default=float("inf"))


def read(run: Location) -> Generations:
    """generations.json of the run in this folder; without the file, everything counts."""
    return _parsed(shared_file(run.child(FILE)).read(), run)


def _parsed(version: Version | None, run: Location) -> Generations:
    if version is None:
        return Generations()
    return strict_json.parse(Generations, version.data, f"{run.child(FILE).uri} is damaged")


def suffix(generation: int) -> str:
    """The end of the names of what a generation stores."""
    return f"-g{generation}"


class Writer:
    """One writer of a run's folder: a driver, or rank 0 of its workers. All methods raise OSError if storage fails.

    Args:
        run: the run's folder.
        driver: id of the driver's lock.
        writer: id of this writer.
    """

    def __init__(self, run: Location, driver: str, writer: str) -> None:
        self.generation = 0
        """The number of the generation; 0: it has not begun."""
        self._run = run
        self._driver = driver
        self._writer = writer
        self._file = shared_file(run.child(FILE), durable=True)

    def claim(self) -> bool:
        """Claim the run for the driver; returns whether storage lets only one of two writers succeed."""
        while True:
            version = self._file.read()
            found = _parsed(version, self._run)
            if self._swap(version, replace(found, driver=self._driver, writer="")):
                return self._file.is_exclusive()

    def read(self) -> Generations:
        """The generations, which this writer may continue; Superseded: it may not."""
        found, _ = self._read()
        return found

    def begin(self, before: Generations, images_seen: int, num_rows: int) -> bool:
        """Begin a generation that goes on from `images_seen` and `num_rows`.

        Returns:
            False: the file is not `before` any more, from which these numbers follow.
        """
        found, version = self._read()
        began = (*before.began, (images_seen, num_rows))
        after = replace(before, writer=self._writer, num_rows=num_rows, began=began)
        if found != before or not self._swap(version, after):
            return False
        self.generation = len(began)
        return True

    def commit(self, num_rows: int, oldest: int) -> None:
        """Make rows final, and let checkpoints of fewer than `oldest` images be removed, unless it is Superseded."""
        while True:
            found, version = self._read()
            if self._swap(version, replace(found, num_rows=num_rows, oldest=max(found.oldest, oldest))):
                return

    def check(self) -> None:
        """Raise Superseded if this generation is not the newest one, or another driver has claimed the run."""
        self._read()

    def _read(self) -> tuple[Generations, Version | None]:
        version = self._file.read()
        found = _parsed(version, self._run)
        is_begun = self.generation > 0
        if found.driver != self._driver or (is_begun and found.writer != self._writer):
            raise Superseded(f"{self._run.uri}: another process has taken over this run; this one stops")
        return found, version

    def _swap(self, version: Version | None, after: Generations) -> bool:
        data = (json.dumps(asdict(after)) + "\n").encode()
        if self._file.replace(version, data):
            return True
        now = self._file.read()  # the answer of S3 may have been lost
        return now is not None and now.data == data
