"""From a raw row to an example: which column is the prompt, which the completion or the answer."""

import datetime
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.formats.turns import messages
from datamodules.sources.source import Row
from datamodules.tokens.chat import Dialogue

VERIFIABLE_SHAPES = tuple(
    (prompt, answer) for prompt in ("prompt", "question") for answer in ("answer", "solution", "ground_truth")
)
KNOWN = tuple(sorted({name for shape in VERIFIABLE_SHAPES for name in shape}))

Columns = Mapping[str, str]


@dataclass(frozen=True)
class VerifiableExample:
    """A prompt and the answer that a reward checks against."""

    prompt: Dialogue
    answer: str | None
    info: dict[str, Any]  # the row's other columns, as plain values
    origin: str
    source: str


def check_mapping(columns: Columns, known: Collection[str] = KNOWN) -> None:
    """Raises ValueError when the mapping (our name -> the data's name) uses a name of ours that does not exist."""
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise ValueError(
            f"columns maps unknown names {', '.join(unknown)}; the names on the left may be {', '.join(known)}"
        )


def verifiable_example(row: Row, columns: Columns) -> VerifiableExample:
    """``prompt`` or ``question`` with ``answer``, ``solution`` or ``ground_truth``; no other column or a null answer
    (None or NaN) is None.

    Raises ValueError with the origin when the columns are missing or hold the wrong type.
    """
    record = renamed(row, columns)
    alone = tuple((name,) for name in ("prompt", "question") if list(record) == [name])
    prompt, *answers = find_shape(record, alone or VERIFIABLE_SHAPES, columns, row.origin)
    info = plain({key: value for key, value in record.items() if key not in (prompt, *answers)})
    name = answers[0] if answers else None
    answer = record[name] if name else None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict | list):
        raise ValueError(f"{row.origin}: column {name!r} holds a {type(answer).__name__}, a single answer was expected")
    return VerifiableExample(
        dialogue_of(record, prompt, row.origin), final_answer(answer), info, row.origin, row.source
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


def final_answer(answer: object) -> str | None:
    """``#### 1,080`` behind a worked solution (GSM8K) becomes ``1080``; anything else is kept as text, None and NaN
    become None.
    """
    if answer is None or answer != answer:  # NaN, which tables hold where a cell is empty
        return None
    _, mark, final = str(answer).rpartition("####")
    return re.sub(r"(?<=\d),(?=\d{3})", "", final.strip()) if mark else str(answer)


def alpaca_prompt(record: Mapping[str, Any], origin: str) -> str:
    """The instruction, and the input under an empty line when there is one."""
    instruction = text_of(record, "instruction", origin)
    given = text_of(record, "input", origin) if record.get("input") is not None else ""
    return f"{instruction}\n\n{given}" if given else instruction


def renamed(row: Row, columns: Columns) -> dict[str, Any]:
    """The record under our names. Theirs may be a path into nested columns, such as ``reward_model.ground_truth``."""
    given = {ours: _cells(row.columns, theirs) for ours, theirs in columns.items()}
    missing = [f"{columns[ours]!r} (for {ours})" for ours, cells in given.items() if not cells]
    if missing:
        raise ValueError(f"{row.origin}: no column {', '.join(missing)}; found {', '.join(row.columns)}")
    kept = {name: value for name, value in row.columns.items() if name not in columns.values()}
    return kept | {ours: cells[0] for ours, cells in given.items()}


def _cells(record: Mapping[str, Any], name: str) -> list[Any]:
    """The value of a column in a list, or of a dotted path into columns that hold objects; an empty list when it is not
    there.
    """
    if name in record:
        return [record[name]]
    first, dot, rest = name.partition(".")
    return _cells(record[first], rest) if dot and isinstance(record.get(first), dict) else []


def find_shape(
    record: Mapping[str, Any], shapes: tuple[tuple[str, ...], ...], columns: Columns, origin: str
) -> tuple[str, ...]:
    """The first of ``shapes`` whose columns are all there, those with mapped columns before the others. Raises
    ValueError when there is none.
    """
    preferred = sorted(
        shapes, key=lambda shape: -len(set(shape) & set(columns))
    )  # what was mapped by hand goes before what is found
    for shape in preferred:
        if all(name in record for name in shape):
            return shape
    wanted = " or ".join(" + ".join(shape) for shape in shapes)
    asked, said = (
        [name for name in names if name in record]
        for names in (("prompt", "question"), ("answer", "solution", "response"))
    )
    hint = f", such as --data.columns '{{prompt: {asked[0]}, completion: {said[0]}}}'" if asked and said else ""
    raise ValueError(
        f"{origin}: found the columns {', '.join(record)}; looked for {wanted}; map others with columns{hint}"
    )


def text_of(record: Mapping[str, Any], name: str, origin: str) -> str:
    """The text in a column. Raises ValueError for anything else: no number, boolean or null becomes text."""
    if not isinstance(record[name], str):
        raise ValueError(f"{origin}: column {name!r} holds a {type(record[name]).__name__}, text was expected")
    return record[name]


def dialogue_of(record: Mapping[str, Any], name: str, origin: str) -> Dialogue:
    """The text or the messages in a column. Raises ValueError for anything else."""
    if isinstance(record[name], list):
        return messages(record[name], f"{origin}: {name}")
    if isinstance(record[name], str):
        return record[name]
    raise ValueError(
        f"{origin}: column {name!r} holds a {type(record[name]).__name__}, text or a list of messages was expected"
    )
