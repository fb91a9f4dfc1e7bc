"""From a raw row to ranked completions: which columns hold the prompt, the answers and the verdict."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.formats.conversation import (
    BESIDE,
    PROMPTS,
    Asked,
    looks_like_messages,
    note_unread,
    read_bare_prompt,
    read_messages,
    surrounded,
)
from datamodules.formats.reading import Cells, Reading, as_number, unpack
from datamodules.formats.verdicts import Ours, Scale, check_labels, settle_scale
from datamodules.sources.source import Row
from datamodules.tokens.chat import Dialogue, Message, Tools

Answer = str | list[Message]  # text, or one assistant turn where it holds more than text
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of Anthropic's transcripts
VERDICTS = ("preference", "label", "labels", "annotator1")
SHAPES = (  # our columns; of two answers without a verdict only a judge has a use
    ("chosen", "rejected"),
    ("completions",),
    *(("output_1", "output_2", verdict) for verdict in VERDICTS),
    ("completion", "label"),
    ("messages", "label"),
)
TEXT_KEYS = ("completion", "response", "answer", "text", "output", "content")  # of completions that are objects
RANK_KEYS, SCORE_KEYS = ("rank", "ranking"), ("overall_score", "score", "rating", "reward")


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt and its completions, which are assistant turns where the prompt is messages."""

    prompt: Dialogue
    completions: list[Answer]  # one: labelled; more: ranked against each other
    ranks: list[int]  # 0 = best; labelled: 0 = desirable, 1 = undesirable
    margin: float | None
    origin: str
    tools: Tools | None = None


@dataclass(frozen=True)
class Compared:
    """The answers of a row and what it says of them."""

    answers: dict[str, Any]  # by their name in error messages
    ranks: list[int] | None  # None = nothing is said
    shape: str
    strength: float | None = None  # of a graded verdict: 0 = undecided, 1 = sure


def preference_example(
    row: Row,
    reading: Reading,
    template: bool = False,
    margins: Mapping[str, float] | None = None,
    chat: bool = False,
) -> PreferenceExample | None:
    """The example of one row, in any of ``SHAPES``; None = a tie.

    The prompt is a column of its own, or the turns that all answers share, of messages or of transcripts.

    Args:
        row: as its source gives it.
        reading: of its data set, after :func:`settle_verdicts`.
        template: instructions and transcripts become messages, since the tokenizer has a chat template.
        margins: margin of each label in column ``strength``; its key ``preference`` is the margin of a sure verdict
            between 1 and 2.
        chat: text prompts become user messages.

    Raises:
        ValueError: with the row's origin.
    """
    cells = reading.open(row)
    compared = read_compared(cells, judged=True)
    ranks = compared.ranks or list(range(len(compared.answers)))  # a list without a verdict is best first
    if len(ranks) > 1 and len(set(ranks)) == 1:
        _ignore_rest(cells)
        reading.close(cells, compared.shape)
        return None
    asked, completions = read_answers(cells, compared.answers, template, chat)
    margin = _margin(cells, compared.strength, margins)
    reading.close(cells, compared.shape)
    return PreferenceExample(asked.prompt, completions, ranks, margin, row.origin, asked.tools)


def settle_verdicts(rows: Sequence[Row], reading: Reading, first_is_better: Ours | None = None) -> None:
    """Settles on the whole data set how its columns of verdicts and labels are read, and says so.

    Args:
        rows: all of them.
        reading: of them; ``settled`` gets a Scale for each column of verdicts.
        first_is_better: the number (or, of a column that goes below 0, the sign) by which the first answer is better.

    Raises:
        ValueError: a column that can be read in two ways, a label that is neither true nor false, or an option without
            effect.
    """
    verdicts: dict[tuple[str, ...], list[Any]] = {}  # annotators together
    labels: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells = Cells(row, reading)
        shape = _shape(cells, judged=False)
        if shape and "label" in shape and "output_1" not in shape:
            labels.setdefault(cells.name("label"), {})[row.origin] = cells.values[cells.name("label")]
        elif shape and (shape[0] == "output_1" or (shape[0] == "completions" and _is_pair(cells))):
            names = [cells.name(name) for name in _verdict_columns(cells)]
            verdicts.setdefault(tuple(names), []).extend(cells.values[name] for name in names)
    for name, values in labels.items():
        check_labels(name, values, first_is_better)
    verdicts.pop((), None)
    for names_of, given in verdicts.items():
        scale = settle_scale(names_of[0], given, first_is_better, rows[0].origin)
        reading.settled |= dict.fromkeys(names_of, scale)
        reading.note(f"`{names_of[0]}`: {scale}")
    if first_is_better is not None and not verdicts:
        raise ValueError(
            f"{rows[0].origin}: data.first_is_better has no effect, for no row has two answers with a verdict; leave it out"
        )


def read_compared(cells: Cells, judged: bool, decided: bool = True) -> Compared:
    """The answers of a row and what it says of them.

    Args:
        cells: the row.
        judged: two answers need a verdict.
        decided: verdicts are read; without it, only the answers are wanted.

    Raises:
        ValueError: with the row's origin, for a row that has no shape of ours or cannot be read.
    """
    shape = _shape(cells, judged)
    if shape is None:
        raise _no_shape(cells)
    if shape[0] == "chosen":
        return Compared(_take_both(cells, shape), [0, 1], "chosen + rejected")
    if shape[0] == "output_1":
        ranks, strength = _judged(cells, judged, decided)
        return Compared(
            _take_both(cells, shape[:2]), ranks, "two answers" + (" with a verdict" if ranks else ""), strength
        )
    if shape[0] == "completions":
        return _ranked(cells, judged, decided)
    number = as_number(cells.take("label"))
    if number not in (0, 1):
        value = cells.values[cells.name("label")]
        raise ValueError(
            f"{cells.origin}: column {cells.name('label')!r} holds {value!r}, expected true (desirable) or false"
        )
    answer = cells.name(shape[0])
    return Compared({answer: cells.take(shape[0])}, [0 if number else 1], f"{shape[0]} + label")


def read_answers(
    cells: Cells, answers: dict[str, Any], template: bool, chat: bool, may_be_empty: bool = False
) -> tuple[Asked, list[Answer]]:
    """The prompt with its context, and each answer: text, or one turn where it holds more than text.

    Args:
        cells: the row.
        answers: name of an answer, for errors -> text, a message, or a conversation that ends with the answer.
        template: instructions and transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages.
        chat: text prompts become user messages.
        may_be_empty: an answer may say nothing.

    Raises:
        ValueError: with the row's origin, where an answer is not one assistant turn behind the prompt, or empty.
    """
    answers = {name: unpack(value) if looks_like_messages(value) else value for name, value in answers.items()}
    kinds = {isinstance(value, str) for value in answers.values()}
    first = next(iter(answers.values()))
    for name, value in answers.items():
        if not isinstance(value, str | dict | list) or isinstance(value, str) != isinstance(first, str):
            raise ValueError(
                f"{cells.origin}: {name} is a {type(value).__name__}; the answers must all be text or all be messages"
            )
    labelled = "messages" in cells.roles.values()
    whole = looks_like_messages(first) and isinstance(first, list) and len(first) > 1
    prompt = None if labelled else _prompt(cells, template, whole)
    if prompt is None and cells.missing:
        raise cells.not_found("a prompt")
    empty = [cells.name(name) for name in PROMPTS if cells.has(name)] if prompt is None and not labelled else []
    if empty and kinds == {True}:
        raise ValueError(f"{cells.origin}: the prompt is empty (column {empty[0]!r})")
    if kinds == {True}:
        turns, made = (prompt, list(answers.values())) if prompt is not None else _transcripts(answers, cells, template)
    else:
        sides = {name: _side(cells, name, value) for name, value in answers.items()}
        turns = _shared(list(sides.values())) if prompt is None else _as_repeated(prompt, next(iter(sides.values())))
        found = {name: _answer(side, turns, name, cells.origin) for name, side in sides.items()}
        made = [turn["content"] if set(turn) == {"role", "content"} else [turn] for turn in found.values()]
    for name, answer in zip(answers, made, strict=True):
        if isinstance(answer, str) and not answer.strip() and not may_be_empty:
            raise ValueError(f"{cells.origin}: {name} is empty")
    asked = surrounded(cells, turns, chat)
    if not isinstance(asked.prompt, str) and asked.prompt and asked.prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{cells.origin}: the prompt ends in an assistant turn and the answers are another one; let it end in a user's "
            "turn, with the whole answer in the answers"
        )
    return asked, made


def dense_ranks(values: list[float]) -> list[int]:
    """0 for the smallest value, equal numbers for equal values, without gaps: [3, 1, 3] -> [1, 0, 1]."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]


def _shape(cells: Cells, judged: bool) -> tuple[str, ...] | None:
    by_hand = set(cells.reading.by_hand)
    shapes = SHAPES if judged else (*SHAPES[:-2], ("output_1", "output_2"), *SHAPES[-2:])
    for shape in sorted(shapes, key=lambda shape: -len(by_hand & set(shape))):  # mapped by hand before found
        if all(cells.has(name) or (name == "completions" and _answer_objects(cells)) for name in shape):
            return shape
    return None


def _no_shape(cells: Cells) -> ValueError:
    found = set(cells.row.columns)
    scored = found & {"helpfulness", "correctness", "score", "rating", "quality"}
    if scored and cells.holds("completion"):
        return ValueError(
            f"{cells.origin}: found the columns {', '.join(cells.row.columns)}: one answer with scores "
            f"({', '.join(sorted(scored))}) is no comparison; put the answers to one prompt into one row as completions and "
            "scores"
        )
    wanted = ", ".join(" + ".join(shape) for shape in SHAPES)
    return cells.not_found(
        f"a prompt or turns that the answers share, with one of: {wanted} (output_1 and output_2 in any spelling of "
        "datamodules/formats/table.py)"
    )


def _answer_objects(cells: Cells) -> bool:
    """Nectar: the answers are objects with a rank."""
    given = unpack(cells.values[cells.name("answer")]) if cells.holds("answer") else None
    return isinstance(given, list) and len(given) > 1 and all(isinstance(item, Mapping) for item in given)


def _is_pair(cells: Cells) -> bool:
    given = unpack(cells.values[cells.name("completions")]) if cells.has("completions") else None
    return isinstance(given, list) and len(given) == 2


def _verdict_columns(cells: Cells) -> list[str]:
    """Our names of the columns that judge the two answers of a row."""
    by_hand = cells.reading.by_hand
    found = [name for name in sorted(VERDICTS, key=lambda name: name not in by_hand) if cells.has(name)]
    if found[:1] == ["annotator1"]:
        return [name for name in ("annotator1", "annotator2", "annotator3") if cells.has(name)]
    return found[:1]


def _take_both(cells: Cells, names: tuple[str, ...]) -> dict[str, Any]:
    """Two answers by their names, empty or not."""
    for name in names:
        cells.take(name)
    return {cells.name(name): cells.values[cells.name(name)] for name in names}


def _judged(cells: Cells, judged: bool, decided: bool) -> tuple[list[int] | None, float | None]:
    """Ranks and strength of two answers; the majority of several verdicts counts. Nothing said is a tie where they must
    be ``judged``, else None."""
    names = _verdict_columns(cells)
    if not decided:
        for name in names:
            cells.take(name)
    if not names or not decided or not (judged or any(map(cells.holds, names))):
        return None, None
    choices = []
    for name in names:
        theirs = cells.name(name)
        cells.take(name)
        value = cells.values[theirs]
        cells.roles[theirs] = name
        scale: Scale = cells.reading.settled.get(theirs, Scale("one_two"))
        choice = scale.read(value)
        if choice is None:
            raise ValueError(
                f"{cells.origin}: column {theirs!r} holds {value!r}, expected "
                + (
                    "1, 2 or between (which output is better), or 0, null or Tie"
                    if scale == Scale("one_two")
                    else str(scale)
                )
            )
        choices.append(choice)
    choice, votes = Counter(choices).most_common(1)[0]
    if 2 * votes <= len(choices):
        choice = 1.5  # no majority
    return dense_ranks([choice, 3 - choice]), abs(2 * choice - 3)


def _ranked(cells: Cells, judged: bool, decided: bool) -> Compared:
    """Best first, by ``ranks``, ``scores`` or a verdict of two, or objects with a rank or score of their own."""
    column = "completions" if cells.has("completions") else "answer"
    given = unpack(cells.take(column))
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{cells.origin}: {cells.name(column)} must be a list of at least two")
    places: list[float] | None = None
    strength = None
    if cells.holds("ranks"):
        places = _numbers(unpack(cells.take("ranks")), len(given), "ranks", cells.origin)
        if cells.holds("scores"):
            cells.take("scores")
            cells.reading.note(f"`{cells.name('scores')}`: not read, the ranks are")
    elif cells.holds("scores"):
        places = [-score for score in _numbers(unpack(cells.take("scores")), len(given), "scores", cells.origin)]
    elif cells.holds("labels"):
        raise ValueError(
            f"{cells.origin}: completions with labels are steps of one answer, not answers to compare; give ranks or scores"
        )
    elif len(given) == 2 and _verdict_columns(cells):
        ranks, strength = _judged(cells, judged, decided)
        places = [float(rank) for rank in ranks] if ranks else None
    if all(isinstance(item, Mapping) and not looks_like_messages(item) for item in given):
        given, own = _objects(cells, given, cells.name(column))
        places = places or own
    shape = "completions" + (" with ranks or scores" if places else "")
    return Compared(
        {f"completion {number}": item for number, item in enumerate(given)},
        dense_ranks(places) if places else None,
        shape,
        strength,
    )


def _objects(cells: Cells, given: list[Any], name: str) -> tuple[list[Any], list[float] | None]:
    """The answers in a list of objects, and their places by rank or score."""
    found: dict[str, str] = {}
    for what, keys in (("text", TEXT_KEYS), ("rank", RANK_KEYS), ("score", SCORE_KEYS)):
        key = next((key for key in keys if any(item.get(key) is not None for item in given)), None)
        found |= {what: key} if key else {}
    if "text" not in found:
        raise ValueError(
            f"{cells.origin}: {name} holds objects with {', '.join(map(str, given[0]))}; looked for a text in one of "
            f"{', '.join(TEXT_KEYS)}"
        )
    by = "rank" if "rank" in found else "score" if "score" in found else None
    for key in sorted({str(key) for item in given for key in item} - {found["text"], found.get(by or "", "")}):
        cells.unread[f"{name}.{key}"] = ""
    places = None
    if by is not None:
        numbers = _numbers([item.get(found[by]) for item in given], len(given), found[by], cells.origin)
        places = numbers if by == "rank" else [-number for number in numbers]
    return [item.get(found["text"]) for item in given], places


def _numbers(values: Any, count: int, name: str, origin: str) -> list[float]:
    numbers = [as_number(value) for value in values] if isinstance(values, list) else []
    found = [number for number in numbers if number is not None]
    if len(numbers) != count or len(found) != count:
        raise ValueError(f"{origin}: {name} must hold one number for each of the {count} completions")
    return found


def _margin(cells: Cells, strength: float | None, margins: Mapping[str, float] | None) -> float | None:
    if (margin := cells.take("margin")) is not None:
        if (number := as_number(margin)) is None:
            raise ValueError(f"{cells.origin}: column {cells.name('margin')!r} holds {margin!r}, a number was expected")
        return number
    label = cells.take("strength") if margins is not None else None
    if label is not None and margins is not None:
        if str(label) not in margins:
            raise ValueError(f"{cells.origin}: no margin for strength {label!r}; margins names {', '.join(margins)}")
        return margins[str(label)]
    return (
        None if margins is None or strength is None or "preference" not in margins else strength * margins["preference"]
    )


def _ignore_rest(cells: Cells) -> None:
    """Of a tie nothing is learned, so nothing beside it can be lost."""
    for _, theirs in cells.left():
        cells.used[theirs] = None


def _prompt(cells: Cells, template: bool, whole: bool) -> Dialogue | None:
    """The prompt without its context; None where the answers share it. Answers that are whole conversations have theirs
    where no column is meant for it."""
    turns = unpack(cells.values[cells.name("messages")]) if cells.holds("messages") else None
    asks = (
        looks_like_messages(turns)
        and read_messages(turns, f"{cells.origin}: {cells.name('messages')}").turns[-1]["role"] != "assistant"
    )
    names = [name for name in PROMPTS if cells.holds(name) and (name != "messages" or asks)]
    names = [name for name in names if not (whole and name in BESIDE)]
    asked = read_bare_prompt(cells, tuple(names))
    if asked is None:
        return None
    if isinstance(asked.prompt, str) and template:
        if names[0] in ("instruction", "input"):
            return [Message(role="user", content=asked.prompt)]
        if asked.prompt.startswith(HUMAN) and asked.prompt.rstrip().endswith(ASSISTANT):
            return _stripped(_transcript(asked.prompt)[:-1])
    return asked.prompt


def _side(cells: Cells, name: str, value: Any) -> list[Message]:
    conversation = read_messages(value, f"{cells.origin}: {name}")
    note_unread(cells, conversation, name)
    if len(conversation.turns) - 1 in conversation.unlearned:
        raise ValueError(
            f"{cells.origin}: {name}, message {len(conversation.turns) - 1}, has loss_weight 0 and is what is compared"
        )
    return conversation.turns


def _shared(sides: Sequence[list[Message]]) -> list[Message]:
    """The turns that all sides begin with, the last turn of each left over."""
    shared = 0
    while shared < min(len(side) for side in sides) - 1 and all(side[shared] == sides[0][shared] for side in sides):
        shared += 1
    return sides[0][:shared]


def _as_repeated(prompt: Dialogue, side: list[Message]) -> list[Message]:
    """The prompt as messages; with the system message that a conversation puts in front of it."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    with_system = side[:1] + turns
    return with_system if len(side) > 1 and side[:-1] == with_system and side[0]["role"] == "system" else turns


def _answer(side: list[Message], prompt: Dialogue, name: str, origin: str) -> Message:
    behind = side[len(prompt) :] if side[: len(prompt)] == prompt else side
    if len(behind) != 1 or behind[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in behind)
        raise ValueError(
            f"{origin}: {name} must be one assistant turn behind the prompt, and it is: {roles or 'nothing'}"
        )
    return behind[0]


def _transcript(text: str) -> list[Message]:
    """The turns, split at the marks with their empty line only, since turns may hold the bare words."""
    start, *pieces = re.split(f"({HUMAN}|{ASSISTANT})", text)
    roles = ["user" if mark == HUMAN else "assistant" for mark in pieces[::2]]
    turns = [Message(role=role, content=body) for role, body in zip(roles, pieces[1::2], strict=True)]
    return [] if start.strip() else turns


def _stripped(turns: list[Message]) -> list[Message]:
    return [Message(role=turn["role"], content=turn["content"].strip()) for turn in turns]


def _transcripts(answers: dict[str, str], cells: Cells, template: bool) -> tuple[Dialogue, list[Answer]]:
    """Prompt and answers of transcripts without a prompt of their own."""
    sides = {name: _transcript(text) for name, text in answers.items()}
    for name, side in sides.items():
        if not side:
            raise ValueError(
                f"{cells.origin}: there is no prompt, and {name} is not a transcript that starts with {HUMAN!r}; "
                "name the column of the prompt with columns, such as --data.columns '{prompt: question}'"
            )
    shared = _shared(list(sides.values()))
    texts = [_answer(side, shared, name, cells.origin)["content"] for name, side in sides.items()]
    if template:
        return _stripped(shared), [text.strip() for text in texts]
    return "".join(
        (HUMAN if turn["role"] == "user" else ASSISTANT) + turn["content"] for turn in shared
    ) + ASSISTANT, list(texts)
