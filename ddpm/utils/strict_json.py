"""Strict parsing of untrusted JSON as a type: no conversion, no unknown keys, no missing keys."""

import dataclasses
import functools
import reprlib
import typing
from typing import Any, Literal, TypeVar

from ddpm.utils.errors import UserError

T = TypeVar("T")


def parse(
    kind: type[T], text: str | bytes, where: str, extra: Literal["allow", "ignore", "forbid"] = "forbid"
) -> T:
    """Parse `text` as a `kind`: a dataclass, a pydantic model, or a type such as dict[str, str].

    Args:
        extra: whether an object may have keys that `kind` does not know.

    Raises:
        UserError: `text` is not a `kind`; the line begins with `where` and names the first wrong key.
    """
    from pydantic import ValidationError  # pydantic takes 0.2 s to import, which reading tasks save

    try:
        model = _model(typing.cast(Any, kind))
        return typing.cast(T, model.model_validate_json(text, extra=extra).root)
    except ValidationError as error:
        raise UserError(f"{where}: {_line(error, kind)}") from None


@functools.cache
def _model(kind: Any) -> Any:
    from pydantic import ConfigDict, RootModel

    class Strict(RootModel[kind]):
        model_config = ConfigDict(strict=True, allow_inf_nan=False)

    return Strict


def _line(error: Any, kind: Any) -> str:
    first = error.errors(include_url=False)[0]
    # Keys may hold control characters.
    *parents, key = [reprlib.repr(key).strip("'") for key in first["loc"]] or [""]
    within = "".join(f"{parent}: " for parent in parents)
    match first["type"]:
        case "json_invalid":
            return f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
        case "missing":
            return f"{within}it lacks {key!r}"
        case "unexpected_keyword_argument" | "extra_forbidden":
            for parent in parents:
                kind = typing.get_type_hints(kind).get(parent) if dataclasses.is_dataclass(kind) else None
            known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
            return f"{within}unknown key {key!r}" + (f"; known are {', '.join(known)}" if known else "")
    must = first["msg"].removeprefix("Input should ").removeprefix("String should ")
    return f"{within}{key or 'it'} is {reprlib.repr(first['input'])}; it must {must}"
