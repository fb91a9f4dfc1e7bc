"""What a cell holds: the same value from JSONL, CSV, Parquet and Arrow."""

import ast
import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

CHANCE = 20  # characters of a text that stands in another one not by chance


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: null, NaN, white space, or lists and objects of nothing else. 0 and False do."""
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(part) for part in value)
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def without_nulls(value: Any) -> Any:
    """The value without the keys that hold null: Parquet gives every object the keys of all the others."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def parse_json(text: str, where: str) -> Any:
    """The JSON in a text. Raises ValueError that begins with ``where``."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise ValueError(f"{where} holds text where JSON was expected ({reason}): {text[:60]!r}") from error


def unpack(value: Any) -> Any:
    """A list or object that a table holds as text, as JSON or as Python prints it; any other value as it is."""
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def as_number(value: Any) -> float | None:
    """A finite number from a number, a boolean (True = 1) or a text such as ``0.5`` or ``True``; None for the rest."""
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def texts_in(value: Any) -> list[str]:
    """All texts inside a value."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for part in parts for text in texts_in(part)]


def repeats(value: Any, other: Any) -> bool:
    """Whether all texts of a value stand in another one: equal ones, or ones too long to be there by chance."""
    texts, others = texts_in(value), texts_in(other)
    return bool(texts) and all(
        any(text.strip() == given.strip() or (len(text) >= CHANCE and text.strip() in given) for given in others)
        for text in texts
    )


def plain(value: Any) -> Any:
    """The value made of None, bool, int, float, str, list and dict alone, since it travels in checkpoints, which are
    loaded with torch's safe loading. Dates become ISO text, anything else its own text."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
