"""Reads JSON strictly: what would be lost or would break later is refused, with its line and the way out."""

import ast
import json
import re
import sys
from itertools import pairwise
from typing import Any

MAX_DEPTH = 100  # of lists and objects in each other
STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
TEXT_OR_OTHER = re.compile(rf"{STRING}|[^][{{}}]", re.DOTALL)
TOKEN = re.compile(rf"{STRING}|[][{{}},]|[-\d][-+\d.eE]*", re.DOTALL)
TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep; flatten them"
HALF = "the text holds half of a character (an unpaired surrogate such as \\ud83d); remove it"


class Refused(ValueError):
    """Raised for JSON that can be parsed but is refused: the message says why, ``line`` says where."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def load_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        Refused: a key stands twice in an object, a number has more digits than Python reads, lists and objects are
            nested more than ``MAX_DEPTH`` deep, or a text holds half of a character, which no tokenizer can encode.
        json.JSONDecodeError: it is no JSON.
    """
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise _find_fault(text) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(text):
        raise _find_fault(text)
    # \ud800 to \udfff are halves of characters, which UTF-8 holds only as escapes.
    if "\\u" in text and "\\ud" in text.lower():
        _refuse_halves(value, text)
    return value


def guess_json(text: str) -> Any:
    """Parse a JSON text to see what it may be, whatever :func:`load_json` refuses. Raises ValueError for no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=float)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error


def load_literal(text: str) -> Any:
    """Parse a list or object as Python writes it. Raises Refused as :func:`load_json`, ValueError for all else."""
    try:
        tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        if "Exceeds the limit" in str(error):
            raise Refused(_too_long()) from error
        raise ValueError(f"no list and no object: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [repr(key.value) for key in node.keys if isinstance(key, ast.Constant)]
            if repeated := _first_repeated(keys):
                raise Refused(_twice(repeated))
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise Refused(TOO_DEEP)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Refused("a key stands twice")
    return made


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)


def _refuse_halves(value: Any, text: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _find_fault(text) from error


def _is_broken(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_deep(text: str) -> bool:
    depth = 0
    for bracket in TEXT_OR_OTHER.sub("", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _find_fault(text: str) -> Refused:
    """Find the first token for which a JSON text is refused."""
    open_keys: list[set[str] | None] = []  # of every object that is open, None for a list
    expects_key = False
    for match in TOKEN.finditer(text):
        token, reason = match[0], ""
        if token in "[{":
            open_keys.append(set() if token == "{" else None)
            reason = TOO_DEEP if len(open_keys) > MAX_DEPTH else ""
        elif token in "]}" and open_keys:
            open_keys.pop()
        elif token[0] == '"':
            keys, text_of = open_keys[-1] if expects_key else None, json.loads(token) if "\\" in token else token[1:-1]
            if _is_broken(text_of):
                reason = HALF
            elif keys is not None:
                reason = _twice(repr(text_of)) if text_of in keys else ""
                keys.add(text_of)
        elif len(token) > sys.get_int_max_str_digits() > 0 and token.lstrip("-").isdigit():
            reason = _too_long()
        if reason:
            return Refused(reason, text.count("\n", 0, match.start()) + 1)
        expects_key = token in "{," and bool(open_keys) and open_keys[-1] is not None
    return Refused(TOO_DEEP)


def _twice(key: str) -> str:
    return f"the key {key} stands twice in one object; keep one of them"


def _too_long() -> str:
    return f"a number has more than {sys.get_int_max_str_digits()} digits; write it as text, in quotes"


def _first_repeated(names: list[str]) -> str | None:
    return next((name for name, after in pairwise(sorted(names)) if name == after), None)


def _depth(value: Any) -> int:
    depth, inside = 0, [value]
    while inside := [part for part in inside if isinstance(part, dict | list | tuple)]:
        depth += 1
        inside = [each for part in inside for each in (part.values() if isinstance(part, dict) else part)]
    return depth
