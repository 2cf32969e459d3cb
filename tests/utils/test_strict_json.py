"""External JSON matches its type, or is a one-line error about the first wrong key."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from ddpm.utils.errors import UserError
from ddpm.utils.strict_json import parse


@dataclass(frozen=True)
class Inner:
    count: Annotated[int, Interval(ge=1, le=10)] = 1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float = 0.5
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)


def test_valid_json_is_accepted() -> None:
    text = '{"name": "x", "ratio": 2, "sizes": [1, 2], "inner": {"count": 3, "kind": "b"}}'
    assert parse(Outer, text, "it") == Outer("x", 2.0, (1, 2), Inner(3, "b"))
    assert parse(Outer, b'{"name": "x", "more": 1}', "it", extra="ignore") == Outer("x")
    assert parse(dict[str, int], '{"a": 1}', "it") == {"a": 1}


BAD = {
    "": "it is not JSON: EOF while parsing a value",
    "\xff": "it is not JSON",
    "[" * 100_000: "it is not JSON: recursion limit exceeded",
    "[]": r"it is \[\]; it must be an object",
    "{}": "it lacks 'name'",
    '{"name": 1}': "name is 1; it must be a valid string",
    '{"name": "", "ratio": NaN}': "ratio is nan; it must be a finite number",
    '{"name": "", "ratio": "1"}': "ratio is '1'; it must be a valid number",
    '{"name": "", "ratio": true}': "ratio is True; it must be a valid number",
    '{"name": "", "sizes": [1, 1.0]}': r"sizes.1 is 1\.0; it must be a valid integer",
    '{"name": "", "inner": {"count": 11}}': "inner.count is 11; it must be at most 10",
    '{"name": "", "inner": {"kind": "c"}}': "inner.kind is 'c'; it must be 'a' or 'b'",
    '{"name": "", "inner": {"size": 1}}': "inner: unknown key 'size'; known are count, kind$",
    '{"name": "", "\\n\\u001b": 1}': r"unknown key '\\\\n\\\\x1b'; known are name, ratio, sizes, inner$",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[text[:40] for text in BAD])
def test_invalid_json_is_a_one_line_error_about_the_first_wrong_key(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^runs/a\.json: {message}") as caught:
        parse(Outer, text.encode("latin-1"), "runs/a.json")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [10**400, "x" * 10_000, [[[]]] * 100, {str(i): i for i in range(100)}])
def test_a_large_value_is_abbreviated_in_messages(value: Any) -> None:
    with pytest.raises(UserError, match=r"^it: count is ") as caught:
        parse(Inner, json.dumps({"count": value}), "it")
    assert len(str(caught.value)) < 200
