"""Unreadable images: their names, their substitutes, and the limit on their number.

Reading finds them, the Ray Dataset sends them to rank 0, and the run lists them.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from ddpm.utils import strict_json
from ddpm.utils.errors import UserError

OnCorrupt = Literal["error", "substitute"]
"""For an unreadable image: raise, or substitute another image of its window."""
Count = Annotated[int, Ge(0)]
SHOWN = 3
"""Number of unreadable images that an error names."""


class CorruptData(UserError):
    """A shard cannot be read, or its content contradicts the manifest.

    Args:
        message: what is wrong and where.
        reason: what is wrong, without the place.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class Substitution:
    """An unreadable image and its substitute. Row groups are counted inside their shard."""

    position: Count
    """The unreadable image's position in the order of the plan."""
    shard: str
    """"train/00000.parquet"."""
    row_group: Count
    row: Count
    reason: str
    stand_in_shard: str
    stand_in_row_group: Count
    stand_in_row: Count

    @property
    def place(self) -> tuple[str, int, int]:
        """Identifies the unreadable image, at any position of the order."""
        return self.shard, self.row_group, self.row


class CorruptImages:
    """The distinct images of a split found unreadable so far, each with its first substitution.

    Args:
        num_rows: images of the split.
        max_share: fraction of them that may be unreadable (data.max_corrupt_share).
    """

    def __init__(self, num_rows: int, max_share: float) -> None:
        self._num_rows, self._max_share = num_rows, max_share
        self._found: dict[tuple[str, int, int], Substitution] = {}

    @property
    def count(self) -> int:
        return len(self._found)

    def add(self, substitutions: Iterable[Substitution]) -> bool:
        """Add substitutions; return whether one of them has a new unreadable image."""
        before = self.count
        for substitution in substitutions:
            self._found.setdefault(substitution.place, substitution)
        return self.count > before

    def check(self) -> None:
        """Raise CorruptData if too large a share of the split is unreadable."""
        if self.count <= self._max_share * self._num_rows:
            return
        examples = "; ".join(
            f"{s.shard}, row group {s.row_group}, row {s.row}: {s.reason}"
            for s in list(self._found.values())[:SHOWN]
        )
        raise CorruptData(
            f"{self.count} of the split's {self._num_rows} images ({self.count / self._num_rows:.2%}) cannot be "
            f"read, more than --data.max-corrupt-share {self._max_share:g} allows. {examples}"
            f"{'; ...' if self.count > SHOWN else ''}"
        )

    def to_jsonl(self) -> str:
        """One substitution a line, in the order they were found."""
        return "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in self._found.values())

    @classmethod
    def from_jsonl(
        cls, text: str, num_rows: int, max_share: float, where: str = "corrupt.jsonl"
    ) -> "CorruptImages":
        """Parse the output of `to_jsonl`.

        Raises:
            UserError: `text` is not such output; `where` names the file.
        """
        images = cls(num_rows, max_share)
        for number, line in enumerate(text.splitlines(), 1):
            images.add([strict_json.parse(Substitution, line, f"{where}, line {number}")])
        return images


def substitutions_to_json(substitutions: Iterable[Substitution]) -> str:
    """The input of `substitutions_from_json`."""
    return json.dumps([dataclasses.asdict(s) for s in substitutions])


def substitutions_from_json(text: str) -> list[Substitution]:
    """Parse the output of `substitutions_to_json` from this program, without checks."""
    return [Substitution(**raw) for raw in json.loads(text)]
