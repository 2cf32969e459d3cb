"""What MLflow has of a run: JSON in a tag there, which is set after MLflow has accepted a part."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from annotated_types import Ge

from ddpm.utils import strict_json
from ddpm.utils.errors import UserError

SENT_TAG = "ddpm.sent"


@dataclass(frozen=True)
class Series:
    """Pictures that MLflow has: how many, and the largest images_seen."""

    num: int = 0
    until: int = -1


@dataclass(frozen=True)
class Sent:
    """Content of the tag SENT_TAG."""

    points: Annotated[int, Ge(0)] = 0
    """Rows of curves.py."""
    samples: Series = Series()
    denoising: Series = Series()
    about: str = ""
    """Hash of params and tags."""
    pictures: str = ""
    """Hash of the names in this folder."""
    evaluations: str = ""
    """Hash of the names in this folder, and of the times of the evaluations."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def parse(tag: str | None) -> Sent:
    """The content of SENT_TAG; nothing sent, if there is no such tag, or it is of another version."""
    if tag is None:
        return Sent()
    try:
        return strict_json.parse(Sent, tag, SENT_TAG)
    except UserError:
        return Sent()
