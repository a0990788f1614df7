"""How a validator of the sweep says what is wrong with a part of its value, and how pydantic's errors are worded."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from orchestrator.sweep_document import Location
from tasks.stacks import nearest

Problem = tuple[Location, str]
_OWN = "benchmatrix"


class Strict(BaseModel):
    """Base of every part of a sweep: no conversion, no unknown keys, no assignment."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def refuse(problems: Sequence[Problem]) -> NoReturn:
    """Raise inside a validator; locations are relative to the value that it validates, and pydantic joins them."""
    raise ValidationError.from_exception_data(
        _OWN,
        [
            InitErrorDetails(
                type=PydanticCustomError(_OWN, "{message}", {"message": message}), loc=location, input=None
            )
            for location, message in problems
        ],
    )


def shown(value: object) -> str:
    """A short form of a value for a message."""
    return reprlib.repr(value)


def wording(error: ErrorDetails, known_keys: Sequence[str]) -> str:
    """One sentence for one pydantic error; `known_keys` are those of the mapping it lies in."""
    if error["type"] == _OWN:
        return str(error["ctx"]["message"])
    location = error["loc"]
    name = ".".join(map(str, location)) or "the sweep"
    if error["type"] in ("extra_forbidden", "invalid_key"):
        key = str(location[-1])
        return f"unknown key {key!r}{nearest(key, list(known_keys))}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "too_short":
        return f"{name} is empty: it needs at least one entry"
    if error["type"] == "model_type":
        return f"{name} must be a mapping, got {shown(error['input'])}"
    if error["type"] == "string_pattern_mismatch":
        case = "lower-case letters" if "A-Z" not in error["ctx"]["pattern"] else "letters"
        return f"{name}: {shown(error['input'])} must be {case}, digits, '.', '_' and '-', with no mark first"
    return f"{name}: {error['msg'].replace('Input should be', 'must be')}, got {shown(error['input'])}"
