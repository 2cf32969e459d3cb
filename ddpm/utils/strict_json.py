"""Strict parsing of JSON as a type: no conversion, no unknown keys, no missing keys."""

import dataclasses
import functools
import reprlib
import typing
from typing import Any, Literal, TypeVar

from ddpm.utils.errors import UserError

T = TypeVar("T")


def parse(
    kind: type[T],
    text: str | bytes,
    where: str,
    extra: Literal["allow", "ignore", "forbid"] = "forbid",
    within: str = "",
) -> T:
    """Parse `text` as a `kind`: a dataclass, a pydantic model, or a type such as dict[str, str].

    Args:
        extra: whether an object may have keys that `kind` does not know.
        within: the key that holds `text`, for the message.

    Raises:
        UserError: `text` is not a `kind`; the line begins with `where` and names the first wrong key.
    """
    from pydantic import ValidationError  # pydantic takes 0.2 s to import, which reading tasks save

    try:
        model = _model(typing.cast(Any, kind))
        return typing.cast(T, model.model_validate_json(text, extra=extra).root)
    except ValidationError as error:
        raise UserError(f"{where}: {_line(error, kind, within)}") from None


def check(kind: Any, value: Any, key: str) -> None:
    """Raise UserError unless `value`, of a Python object, is a `kind`; the line begins with `key`."""
    from pydantic import ValidationError

    try:
        _model(kind).model_validate(value)
    except ValidationError as error:
        raise UserError(_line(error, kind, key)) from None


@functools.cache
def _model(kind: Any) -> Any:
    from pydantic import ConfigDict, RootModel

    class Strict(RootModel[kind]):
        model_config = ConfigDict(strict=True, allow_inf_nan=False)

    return Strict


def _line(error: Any, kind: Any, within: str) -> str:
    first = error.errors(include_url=False)[0]
    # Keys may hold control characters.
    keys = [within] if within else []
    keys += [reprlib.repr(key).strip("'") for key in first["loc"]]
    where = ".".join(keys)
    key = keys[-1] if keys else ""
    inside = f"{'.'.join(keys[:-1])}: " if len(keys) > 1 else ""
    match first["type"]:
        case "json_invalid":
            return f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        case "missing":
            return f"{inside}it lacks {key!r}"
        case "unexpected_keyword_argument" | "extra_forbidden":
            for parent in first["loc"][:-1]:
                kind = typing.get_type_hints(kind).get(parent) if dataclasses.is_dataclass(kind) else None
            if not dataclasses.is_dataclass(kind):
                return f"{inside}unknown key {key!r}"
            known = ", ".join(field.name for field in dataclasses.fields(kind))
            return f"{inside}unknown key {key!r}; known are {known}"
    must = first["msg"].partition(" should ")[2] or first["msg"]
    for bound, words in (("greater than or equal to", "at least"), ("less than or equal to", "at most")):
        must = must.replace(bound, words)
    return f"{where or 'it'} is {reprlib.repr(first['input'])}; it must {must}"
