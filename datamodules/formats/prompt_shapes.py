"""The shapes of prompts with checkable answers: from a raw row to a prompt and the answer that a reward reads."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datamodules.formats.conversation import PROMPTS, add_context, read_options, read_prompt
from datamodules.formats.reading import (
    Cells,
    Reading,
    as_number,
    guess,
    is_empty,
    make_plain,
    take_references,
    without_nulls,
)
from datamodules.formats.table import NAMED, normalize, our_names
from datamodules.sources.source import Row
from datamodules.tokens.encoding import Dialogue, Tools

ANSWERS = ("answer", "completion", "label")  # our columns that may hold the right answer, in this order
NO_GOLD = (
    "completion",
    "response",
    "outputs",
    "assistant",
    "generation",
    "generated_solution",
    "assistant_response",
    "model_response",
    "output_text",
)  # what somebody said, right or wrong
ANSWERING = frozenset(NAMED) - {
    *("messages", "prompt", "instruction", "input", "context", "documents", "options", "system", "history", "tools"),
    *("answer", "knowledge", "relation", "pass_rate", "guess_rate", "pass_length", "pass_truncated"),
}  # our columns that hold or judge what somebody answered
LETTER = re.compile(r"\(?([A-Z])[).:]?")  # an answer that names an option
LONGEST_ANSWER = 200  # characters behind "####"; more is a worked solution with headings


@dataclass(frozen=True)
class VerifiableExample:
    """A prompt and the answer that a reward checks against."""

    prompt: Dialogue
    answer: str | None
    info: dict[str, Any]  # the row's other columns, as plain values
    origin: str
    source: str
    tools: Tools | None = None
    measures: dict[str, float | None] = field(default_factory=dict)  # by our name, see ``read_measure``


def verifiable_example(
    row: Row,
    reading: Reading,
    chat: bool = False,
    measures: Sequence[str] = (),
    read_elsewhere: Mapping[str, str] | None = None,
) -> VerifiableExample:
    """Read the prompt of a row with its context, and its answer, None where there is none.

    ``info`` holds every column but the prompt and one that is called ``answer``. Objects inside a column come without
    keys that hold null, which only some kinds of files can leave out.

    Args:
        row: as its source gives it.
        reading: of its data set, after :func:`settle_choices`.
        chat: text prompts become user messages.
        measures: our names of columns of measured difficulty to read, such as ``pass_rate``.
        read_elsewhere: columns that the caller reads: name in the data -> role.

    Raises:
        ValueError: with the row's origin, when there is no prompt, or a column holds the wrong type.
    """
    cells = Cells(row, reading)
    found = read_prompt(cells)
    if found is None:
        empty = [cells.name(name) for name in PROMPTS if cells.has(name)]
        if empty:
            raise ValueError(f"{row.origin}: the prompt is empty (column {empty[0]!r})")
        raise cells.not_found("prompt, question, problem, query, instruction, input, inputs or messages")
    asked = add_context(cells, found, chat)
    if "messages" in cells.roles.values() and asked.ends_in_answer:
        raise ValueError(
            f"{row.origin}: column {cells.name('messages')!r} ends in an assistant turn, so nothing is asked; set data "
            "to InstructionDataModule, or remove that turn (in a column 'prompt', it would be continued)"
        )
    answer, column = right_answer(cells)
    measured = {name: read_measure(cells, name) for name in measures}
    for theirs, role in (read_elsewhere or {}).items():
        if theirs in cells.values:
            cells.used[theirs] = cells.values[theirs]
            cells.roles[theirs] = " and ".join(filter(None, [cells.roles.get(theirs), role]))
    reading.close(cells, "a prompt" + (" with an answer" if column else ""))
    asks = {theirs for theirs, role in cells.roles.items() if role in ("prompt", "instruction", "messages")}
    if "answer" not in reading.by_hand:
        asks.add("answer")
    info = {name: without_nulls(value) for name, value in row.columns.items() if name not in asks}
    return VerifiableExample(asked.prompt, answer, make_plain(info), row.origin, row.source, asked.tools, measured)


def asked_columns(columns: Mapping[str, Any], by_hand: Mapping[str, str] | None, answer: str | None) -> dict[str, Any]:
    """Return the columns of a row for new data that are made from it: those that ask, unchanged, and unknown ones.

    Columns that answered the row are left out, because they would be learned beside a new answer. ``answer`` becomes
    the gold answer as it was read, unless another column is mapped to it.

    Example: ``question``, ``reasoning`` and ``solution`` give ``question``, ``solution`` and ``answer``.

    Args:
        columns: of the row.
        by_hand: our name of a column -> its name in the data.
        answer: the gold answer, None where there is none.
    """
    ours, mapped = our_names(tuple(columns)), {name: ours for ours, name in (by_hand or {}).items() if name}
    kept = {
        name: value for name, value in columns.items() if name in mapped or ours.get(name, "answer") not in ANSWERING
    }
    return kept if answer is None or "answer" in mapped.values() else kept | {"answer": answer}


def read_measure(cells: Cells, name: str) -> float | None:
    """Read a column of measured difficulty: tokens for ``pass_length``, else a share in [0, 1]; None if it is empty.

    Raises ValueError, with the row's origin, for anything else.
    """
    value = cells.take(name)
    if value is None:
        return None
    number = None if isinstance(value, bool) else as_number(value)
    if number is None or not (0 <= number <= 1 or (name == "pass_length" and 1 < number < math.inf)):
        wanted = "a number of tokens" if name == "pass_length" else "a share in [0, 1]"
        raise ValueError(f"{cells.place(name)} holds {value!r}, {wanted} was expected")
    return number


def settle_choices(rows: Iterable[Cells], reading: Reading, names: tuple[str, ...] = ANSWERS) -> None:
    """Settle on the whole data set what a whole number beside options means: an option's number, from 0 or 1, or its
    text.

    Args:
        rows: all that may have options.
        reading: of them; ``settled`` gets the number of the first option.
        names: our columns that may hold the answer, the first that holds something counts.

    Raises:
        ValueError: the rows do not tell which of these it is.
    """
    numbers: list[tuple[int, list[str]]] = []
    origin = ""
    for cells in rows:
        if not cells.holds("options"):
            continue
        name = next((name for name in names if cells.holds(name)), None)
        value = guess(cells.values[cells.name(name)]) if name else None
        number = None if isinstance(value, bool) else as_number(value)
        if number is not None and number == int(number):
            origin = origin or cells.origin
            numbers.append((int(number), [text for _, _, text in read_options(cells)]))
    if not numbers:
        return
    if all(str(number) in texts for number, texts in numbers):
        reading.settled["options"] = None
        return
    from_0 = all(0 <= number < len(texts) for number, texts in numbers)
    from_1 = all(1 <= number <= len(texts) for number, texts in numbers)
    if from_0 == from_1:
        raise ValueError(
            f"{origin}: the answers beside the options are whole numbers, and they may be the options' numbers from "
            "0, from 1, or their texts; write the letters (A, B, ...) as answers"
        )
    reading.settled["options"] = 0 if from_0 else 1
    reading.note(f"answers are numbers of options, from {reading.settled['options']}, and become letters")


def right_answer(cells: Cells, names: tuple[str, ...] = ANSWERS) -> tuple[str | None, str | None]:
    """Find the answer and the name of its column; None where no column of ``names`` holds one.

    Raises ValueError for an object, and for a list of several answers.
    """
    for name in names:
        if name not in cells.reading.by_hand and name in cells.names:
            cells.names[name].sort(key=lambda theirs: normalize(theirs) in NO_GOLD or is_empty(cells.values[theirs]))
            if normalize(cells.name(name)) in NO_GOLD:
                continue
        if not cells.holds(name):
            continue
        theirs = cells.name(name)
        answer = take_references(cells.take_unpacked(name, one_of_several=True), cells.place(name))
        cells.roles[theirs] = "answer" if name not in cells.reading.by_hand else name
        if isinstance(answer, list | tuple):
            several = list(dict.fromkeys(str(one).strip() for one in answer if not is_empty(one)))
            if len(several) > 1:
                raise ValueError(
                    f"{cells.origin}: column {theirs!r} holds a list of {len(several)} answers, a single answer was "
                    "expected; map another column to answer, or leave it to rewards that read the column, with "
                    "--data.columns '{answer: \"\"}'"
                )
            answer = several[0] if several else None
        if isinstance(answer, dict):
            raise ValueError(
                f"{cells.wrong_type(name, answer, 'a single answer')}, or leave it to rewards that read the column, "
                "with --data.columns '{answer: \"\"}'"
            )
        gold = read_gold(as_letter(cells, answer))
        _check_letter(cells, gold)
        return gold, theirs
    return None, None


def as_letter(cells: Cells, answer: Any) -> Any:
    """Turn an answer that is the number of an option into its letter, as :func:`settle_choices` found.

    Raises ValueError where that has not been settled, as in a stream, and for a letter that no option has.
    """
    number = None if isinstance(answer, bool) or not cells.holds("options") else as_number(answer)
    if number is None or number != int(number):
        _check_letter(cells, answer)
        return answer
    options = read_options(cells)
    start = cells.reading.settled.get("options", -1)
    if start == -1 and all(text != str(answer).strip() for _, _, text in options):
        raise ValueError(
            f"{cells.origin}: the answer beside the options is {answer!r}, and only all rows tell whether numbers "
            "start at 0 or 1; write the letters (A, B, ...) as answers"
        )
    return answer if start in (-1, None) else options[int(number) - start][1]


def _check_letter(cells: Cells, answer: Any) -> None:
    """Refuse, with a ValueError, an answer that is a letter where options have letters, and none has this one."""
    letter = LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    if letter is None or not cells.holds("options"):
        return
    options = read_options(cells)
    known = {mark.upper() for _, mark, _ in options}
    texts = {text.strip() for _, _, text in options}
    if all(len(mark) == 1 for mark in known) and letter[1] not in known and answer.strip() not in texts:
        raise ValueError(
            f"{cells.origin}: the answer is {answer!r}, and the options are {', '.join(sorted(known))}; write the "
            "letter or the text of one of them"
        )


def read_gold(answer: object) -> str | None:
    """Read the final answer of a worked solution, ``#### 1,080`` (GSM8K) as ``1080``; any other as text.

    None for null, NaN and what is empty.
    """
    if is_empty(answer):
        return None
    body, mark, final = str(answer).rpartition("####")
    final = final.strip()
    if mark and not final and not body.strip(" #\n"):
        return None
    if mark and len(final) <= LONGEST_ANSWER and "\n" not in final:
        return re.sub(r"(?<=\d),(?=\d{3})", "", final) or None
    return str(answer)
