"""The shapes of preference data: from a raw row to a prompt and its ranked or labelled completions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from datamodules.formats.conversation import (
    BESIDE,
    PROMPTS,
    Asked,
    add_context,
    looks_like_messages,
    read_calls,
    read_messages,
    read_prompt,
    read_reasoning,
    read_turns,
)
from datamodules.formats.reading import Cells, Reading, as_number, guess, unpack
from datamodules.formats.table import normalize
from datamodules.formats.verdicts import (
    VERDICTS,
    Ours,
    check_labels,
    check_sources,
    named_answer,
    read_label_cell,
    read_verdicts,
    settle_scale,
    verdict_columns,
)
from datamodules.sources.source import Row
from datamodules.tokens.encoding import Dialogue, Message, Tools

Answer = str | list[Message]  # text, or one assistant turn where it holds more than text
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of Anthropic's transcripts
TWO = ("output_1", "output_2")
SHAPES = (  # our columns; the first whose columns are all there
    ("chosen", "rejected"),
    ("completions",),
    *((*TWO, verdict) for verdict in VERDICTS),
    (*TWO, "first_score", "second_score"),
    TWO,  # without a verdict: only a judge has a use for them
    ("completion", "label"),
    ("messages", "label"),
)
TEXT_KEYS = ("completion", "response", "answer", "text", "output", "content")  # of completions that are objects
RANK_KEYS, SCORE_KEYS = ("rank", "ranking"), ("overall_score", "score", "rating", "reward", "pm_score")
RANKS = re.compile("best|better|chosen|prefer|winner|select|choice|rank|score|rating|reward|vote|correct|quality")


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
    """Read the example of one row, in any of ``SHAPES``; None = a tie.

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
    cells = Cells(row, reading)
    compared = read_compared(cells, needs_verdict=True)
    ranks = compared.ranks or list(range(len(compared.answers)))  # a list without a verdict is best first
    if len(ranks) > 1 and len(set(ranks)) == 1:
        cells.used |= {theirs: None for _, theirs in cells.left()}  # of a tie nothing is learned, so nothing is lost
        reading.close(cells, compared.shape)
        return None
    asked, completions = read_answers(cells, compared.answers, template, chat)
    if len(ranks) == 1 and read_reasoning(cells, completions[0]):
        raise ValueError(
            f"{row.origin}: column {cells.name('reasoning')!r} stands beside a labelled answer, which has no place for "
            "it; "
            "write it into the answer's message as reasoning_content, or leave it out with --data.columns '{reasoning: "
            '""}\''
        )
    margin = _read_margin(cells, compared.strength, margins) if len(ranks) > 1 else None
    reading.close(cells, compared.shape)
    return PreferenceExample(asked.prompt, completions, ranks, margin, row.origin, asked.tools)


def settle_verdicts(rows: Sequence[Row], reading: Reading, first_is_better: Ours | None = None) -> None:
    """Settle on the whole data set how its columns of verdicts and labels are read, and say so.

    Args:
        rows: all of them.
        reading: of them; ``settled`` gets a Scale for each column of verdicts.
        first_is_better: the number (or, of a column that goes below 0, the sign) by which the first answer is better.

    Raises:
        ValueError: a column that can be read in two ways, a label that is neither true nor false, or an option without
            effect.
    """
    verdicts: dict[tuple[str, ...], dict[str, list[Any]]] = {}  # annotators together, by source
    labels: dict[str, dict[str, Any]] = {}
    for cells in reading.rows_with(rows, *VERDICTS):
        shape = _find_preference_shape(cells, needs_verdict=False) or ("",)
        if shape in (("completion", "label"), ("messages", "label")):
            labels.setdefault(cells.name("label"), {})[cells.origin] = cells.values[cells.name("label")]
        elif shape[:2] == TWO or (shape == ("completions",) and len(_list_in(cells, "completions")) == 2):
            names = [cells.name(name) for name in verdict_columns(cells)]
            said = [cells.values[name] for name in names]
            of_source = verdicts.setdefault(tuple(names), {}).setdefault(cells.row.source, [])
            of_source.extend(value for value in said if named_answer(cells, value) is None)
    for name, values in labels.items():
        check_labels(name, values, first_is_better)
    verdicts.pop((), None)
    for names_of, given in verdicts.items():
        check_sources(names_of[0], given)
        scale = settle_scale(names_of[0], [*chain(*given.values())], first_is_better, rows[0].origin)
        reading.settled |= dict.fromkeys(names_of, scale)
        reading.note(f"`{names_of[0]}`: {scale}")
    if first_is_better is not None and not verdicts:
        raise ValueError(
            f"{rows[0].origin}: data.first_is_better has no effect, for no row has two answers with a verdict; leave "
            "it out"
        )


def read_compared(cells: Cells, needs_verdict: bool, decided: bool = True) -> Compared:
    """Read the answers of a row and what it says of them.

    Args:
        cells: the row.
        needs_verdict: two answers must come with a verdict, and an empty verdict is a tie; False = an empty one says
            nothing.
        decided: whether verdicts are read; False = only the answers are wanted.

    Raises:
        ValueError: with the row's origin, for a row that has no shape of ours or cannot be read.
    """
    shape = _find_preference_shape(cells, needs_verdict)
    if shape is None:
        raise _no_shape(cells)
    if shape == ("chosen", "rejected"):
        compared = _with_several(cells, _take_both(cells, shape))
        return replace(compared, ranks=[0, 0]) if len(compared.answers) == 2 and _is_tie(cells) else compared
    if shape[:2] == TWO:
        ranks, strength = _judge(cells, needs_verdict, decided)
        said = "two answers" + (" with a verdict" if ranks else "")
        return Compared(_take_both(cells, TWO), ranks, said, strength)
    if shape == ("completions",):
        return _read_list(cells, needs_verdict, decided)
    number = read_label_cell(cells.take("label"))
    if number not in (0, 1):
        name = cells.name("label")
        raise ValueError(
            f"{cells.origin}: column {name!r} holds {cells.values[name]!r}, expected true (desirable) or false"
        )
    answer = cells.name(shape[0])
    return Compared({answer: cells.take(shape[0])}, [0 if number else 1], f"{shape[0]} + label")


def read_answers(
    cells: Cells, answers: dict[str, Any], template: bool, chat: bool, may_be_empty: bool = False
) -> tuple[Asked, list[Answer]]:
    """Read the prompt with its context, and each answer: text, or one turn where it holds more than text.

    Args:
        cells: the row.
        answers: name of an answer, for errors -> text, a message, or a conversation that ends with the answer.
        template: instructions and transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") become messages.
        chat: text prompts become user messages.
        may_be_empty: an answer may say nothing.

    Raises:
        ValueError: with the row's origin, where an answer is not one assistant turn behind the prompt, or empty.
    """
    answers = {
        name: unpack(value, f"{cells.origin}: {name}") if looks_like_messages(value) else value
        for name, value in answers.items()
    }
    called = {name: read_calls(cells, value, f"{cells.origin}: {name}") for name, value in answers.items()}
    if any(called.values()):
        said = {name: {"role": "assistant", "content": value} for name, value in answers.items()}
        answers = {
            name: called[name] or (said[name] if isinstance(answers[name], str) else answers[name]) for name in called
        }
    first = next(iter(answers.values()))
    for name, value in answers.items():
        if not isinstance(value, str | dict | list) or isinstance(value, str) != isinstance(first, str):
            raise ValueError(
                f"{cells.origin}: {name} is a {type(value).__name__}; the answers must all be text or all be messages"
            )
    labelled = "messages" in cells.roles.values()  # a conversation is its own prompt
    whole = looks_like_messages(first) and isinstance(first, list) and len(first) > 1
    prompt = None if labelled else _read_own_prompt(cells, template, whole)
    if prompt is None and cells.missing:
        raise cells.not_found("a prompt")
    made: list[Answer]
    if isinstance(first, str):
        empty = [cells.name(name) for name in PROMPTS if cells.has(name)]
        if prompt is None and empty and not labelled:
            raise ValueError(f"{cells.origin}: the prompt is empty (column {empty[0]!r})")
        turns, made = (prompt, list(answers.values())) if prompt is not None else _split(answers, cells, template)
    else:
        sides = {name: _read_side(cells, name, value) for name, value in answers.items()}
        turns = _shared(list(sides.values()))
        if prompt is not None and not _asks_among(prompt, turns):
            turns = _as_repeated(prompt, next(iter(sides.values())))
        found = [_answer_behind(side, turns, name, cells.origin) for name, side in sides.items()]
        made = [turn["content"] if set(turn) == {"role", "content"} else [turn] for turn in found]
    for name, answer in zip(answers, made, strict=True):
        if isinstance(answer, str) and not answer.strip() and not may_be_empty:
            raise ValueError(f"{cells.origin}: {name} is empty")
    asked = add_context(cells, Asked(turns), chat)
    if asked.ends_in_answer:
        raise ValueError(
            f"{cells.origin}: the prompt ends in an assistant turn and the answers are another one; let it end in a "
            "user's turn, with the whole answer in the answers"
        )
    return asked, made


def dense_ranks(values: list[float]) -> list[int]:
    """Number values from the smallest, 0, without gaps, equal ones alike: [3, 1, 3] -> [1, 0, 1]."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]


def _find_preference_shape(cells: Cells, needs_verdict: bool) -> tuple[str, ...] | None:
    shapes = [shape for shape in SHAPES if not (needs_verdict and shape == TWO)]
    return cells.find_shape(shapes, lambda name: cells.has(name) or (name == "completions" and _has_objects(cells)))


def _no_shape(cells: Cells) -> ValueError:
    found = set(cells.row.columns)
    scored = found & {"helpfulness", "correctness", "score", "rating", "quality"}
    if scored and cells.holds("completion"):
        return ValueError(
            f"{cells.origin}: found the columns {', '.join(cells.row.columns)}: one answer with scores "
            f"({', '.join(sorted(scored))}) is no comparison; put the answers to one prompt into one row as "
            "completions and scores"
        )
    texts = [name for name in cells.unread if isinstance(cells.values[name], str)]
    wanted = ["chosen", "rejected"] if cells.has("prompt") else ["prompt", "chosen", "rejected"]
    answered = any(map(cells.has, (*TWO, "completions", "completion", "messages", "chosen", "rejected")))
    if len(texts) == len(wanted) and not answered:
        shapes = "a prompt with chosen + rejected, completions with ranks or scores, or a label"
        return cells.not_found(shapes, dict(zip(wanted, texts, strict=True)))
    verdicts = {"preference": next((name for name in cells.unread if RANKS.search(normalize(name))), "my_verdict")}
    known = ", ".join(" + ".join(shape) for shape in SHAPES if shape != TWO)
    return cells.not_found(
        f"a prompt or turns that the answers share, with one of: {known} (output_1 and output_2 in any spelling of "
        "datamodules/formats/table.py)",
        verdicts if all(map(cells.has, TWO)) else None,
    )


def _list_in(cells: Cells, name: str) -> list[Any]:
    given = cells.unpack(name) if cells.has(name) else None
    return given if isinstance(given, list) else []


def _has_objects(cells: Cells) -> bool:
    """Tell whether the answers are objects with a rank, as in Nectar."""
    given = _list_in(cells, "answer")
    return len(given) > 1 and all(isinstance(item, Mapping) for item in given)


def _take_both(cells: Cells, names: tuple[str, ...]) -> dict[str, Any]:
    """Take two answers by their names, empty or not; a conversation ends with the turn that was compared."""
    for name in names:
        cells.take(name)
    both = {cells.name(name): cells.accept_empty(name) for name in names}
    if not cells.holds("compared_turn"):
        return both
    both = {name: unpack(value, f"{cells.origin}: {name}") for name, value in both.items()}
    turn = cells.take("compared_turn")
    number = None if isinstance(turn, bool) else as_number(turn)
    shortest = min((len(value) // 2 for value in both.values() if isinstance(value, list)), default=1)
    if number is None or number != int(number) or not 1 <= number <= shortest:
        raise ValueError(
            f"{cells.place('compared_turn')} holds {turn!r}, the number of an answer in both conversations was expected, "
            f"1 to {shortest}"
        )
    return {name: value[: 2 * int(number)] if isinstance(value, list) else value for name, value in both.items()}


def _with_several(cells: Cells, both: dict[str, Any]) -> Compared:
    """Read chosen and rejected answers, each text or, as in RewardBench 2, a list of equally good texts."""
    given = {name: guess(value) for name, value in both.items()}
    if not all(
        value and isinstance(value, list) and all(isinstance(text, str) for text in value) for value in given.values()
    ):
        return Compared(both, [0, 1], "chosen + rejected")
    given = {name: unpack(value, f"{cells.origin}: {name}") for name, value in both.items()}
    answers = {f"{name} {number}": text for name, texts in given.items() for number, text in enumerate(texts)}
    ranks = [rank for rank, texts in enumerate(given.values()) for _ in texts]
    return Compared(answers, ranks, "chosen + rejected, several of each")


def _is_tie(cells: Cells) -> bool:
    """Tell whether the scores of a chosen and a rejected answer are equal; refuses scores against the choice."""
    if not (cells.holds("chosen_score") and cells.holds("rejected_score")):
        return False
    names = cells.name("chosen_score"), cells.name("rejected_score")
    values = [cells.take("chosen_score"), cells.take("rejected_score")]
    chosen, rejected = _numbers(values, 2, "the scores of the answers", cells.origin)
    if chosen < rejected:
        raise ValueError(
            f"{cells.origin}: the rejected answer scores {rejected:g} (column {names[1]!r}) and the chosen one only "
            f"{chosen:g} ({names[0]!r}): swap the answers, or leave the scores out with --data.columns "
            '\'{chosen_score: "", rejected_score: ""}\''
        )
    return chosen == rejected


def _judge(cells: Cells, needs_verdict: bool, decided: bool) -> tuple[list[int] | None, float | None]:
    """Rank two answers, with the strength of the verdict; None where nothing is said of them."""
    names = verdict_columns(cells)
    if not names and cells.holds("first_score") and cells.holds("second_score"):
        values = [cells.take("first_score"), cells.take("second_score")]
        scores = _numbers(values, 2, "the scores of the answers", cells.origin)
        return dense_ranks([-score for score in scores]), None
    if not decided:
        for name in names:
            cells.take(name)
    if not names or not decided or not (needs_verdict or any(map(cells.holds, names))):
        return None, None
    choice = read_verdicts(cells)
    return dense_ranks([choice, 3 - choice]), abs(2 * choice - 3)


def _read_list(cells: Cells, needs_verdict: bool, decided: bool) -> Compared:
    """Read a list of answers: best first, or ranked by a column, by a verdict of two, or by their own keys."""
    column = "completions" if cells.has("completions") else "answer"
    given = cells.take_unpacked(column)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{cells.origin}: {cells.name(column)} must be a list of at least two")
    places: list[float] | None = None
    strength = None
    if cells.holds("ranks"):
        places = _numbers(cells.take_unpacked("ranks"), len(given), "ranks", cells.origin)
        if cells.take("scores") is not None:
            cells.reading.note(f"`{cells.name('scores')}`: not read, the ranks are")
    elif cells.holds("scores"):
        places = [-score for score in _numbers(cells.take_unpacked("scores"), len(given), "scores", cells.origin)]
    elif cells.holds("labels"):
        raise ValueError(
            f"{cells.origin}: completions with labels are steps of one answer, not answers to compare; give ranks or "
            "scores"
        )
    elif len(given) == 2 and verdict_columns(cells):
        ranks, strength = _judge(cells, needs_verdict, decided)
        places = [float(rank) for rank in ranks] if ranks else None
    if all(isinstance(item, Mapping) and not looks_like_messages(item) for item in given):
        given, own = _read_objects(cells, given, cells.name(column))
        places = places or own
    if places is None and needs_verdict:
        _refuse_hidden_ranks(cells, len(given), cells.name(column))
    answers = {f"completion {number}": item for number, item in enumerate(given)}
    ranked = dense_ranks(places) if places else None
    return Compared(answers, ranked, "completions" + (" with ranks or scores" if places else ""), strength)


def _refuse_hidden_ranks(cells: Cells, count: int, name: str) -> None:
    """Refuse, with a ValueError, answers without a known rank beside a column or key that may tell which is better."""
    if said := {"ranks", "scores"} & set(cells.reading.by_hand):
        cells.reading.mapped_seen |= said
        return
    for theirs in cells.unread:
        held = guess(cells.values.get(theirs))
        by_answer = isinstance(held, list) and len(held) == count and all(as_number(one) is not None for one in held)
        if by_answer or (
            RANKS.search(normalize(theirs)) and (theirs.startswith(f"{name}.") or as_number(held) is not None)
        ):
            raise ValueError(
                f"{cells.origin}: {name!r} has no ranks or scores that are known, and {theirs!r} may tell which answer "
                "is better; rename it to ranks (0 = best) or scores (high = best), such as with --data.columns "
                f"'{{scores: "
                f"{theirs}}}', or say with --data.columns '{{scores: \"\"}}' that the answers stand best first"
            )


def _read_objects(cells: Cells, given: list[Any], name: str) -> tuple[list[Any], list[float] | None]:
    """Read the answers in a list of objects, and their places by rank or score."""
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


def _read_margin(cells: Cells, strength: float | None, margins: Mapping[str, float] | None) -> float | None:
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


def _read_own_prompt(cells: Cells, template: bool, whole: bool) -> Dialogue | None:
    """Read the prompt without its context; None where the answers share it.

    Answers that are ``whole`` conversations share theirs where no column is meant for it.
    """
    turns = cells.unpack("messages") if cells.holds("messages") else None
    asks = (
        looks_like_messages(turns)
        and read_messages(turns, f"{cells.origin}: {cells.name('messages')}").turns[-1]["role"] != "assistant"
    )
    names = [name for name in PROMPTS if cells.holds(name) and (name != "messages" or asks)]
    names = [name for name in names if not (whole and name in BESIDE)]
    asked = read_prompt(cells, tuple(names))
    if asked is None:
        return None
    if isinstance(asked.prompt, str) and template:
        if names[0] in ("instruction", "input"):
            return [Message(role="user", content=asked.prompt)]
        if asked.prompt.startswith(HUMAN) and asked.prompt.rstrip().endswith(ASSISTANT):
            return _stripped(_turns_of_transcript(asked.prompt)[:-1])
    return asked.prompt


def _read_side(cells: Cells, name: str, value: Any) -> list[Message]:
    conversation = read_turns(cells, value, name)
    last = len(conversation.turns) - 1
    if last in conversation.unlearned:
        raise ValueError(f"{cells.origin}: {name}, message {last}, has loss_weight 0 and is what is compared")
    return conversation.turns


def _shared(sides: Sequence[list[Message]]) -> list[Message]:
    """Find the turns that all sides begin with; the last turn of a side never counts."""
    shared = 0
    while shared < min(len(side) for side in sides) - 1 and all(side[shared] == sides[0][shared] for side in sides):
        shared += 1
    return sides[0][:shared]


def _as_repeated(prompt: Dialogue, side: list[Message]) -> list[Message]:
    """Make messages of a prompt, with the system message that a conversation puts in front of it."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    with_system = side[:1] + turns
    return with_system if len(side) > 1 and side[:-1] == with_system and side[0]["role"] == "system" else turns


def _asks_among(prompt: Dialogue, shared: list[Message]) -> bool:
    """Tell whether a text prompt is one of several questions that the answers share."""
    asked = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
    return isinstance(prompt, str) and len(asked) > 1 and prompt.strip() in asked


def _answer_behind(side: list[Message], prompt: Dialogue, name: str, origin: str) -> Message:
    behind = side[len(prompt) :] if side[: len(prompt)] == prompt else side
    if len(behind) != 1 or behind[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in behind)
        raise ValueError(
            f"{origin}: {name} must be one assistant turn behind the prompt, and it is: {roles or 'nothing'}"
        )
    return behind[0]


def _turns_of_transcript(text: str) -> list[Message]:
    """Split a transcript at its marks. A mark includes its empty line, because turns may hold the bare words."""
    start, *pieces = re.split(f"({HUMAN}|{ASSISTANT})", text)
    roles = ["user" if mark == HUMAN else "assistant" for mark in pieces[::2]]
    turns = [Message(role=role, content=body) for role, body in zip(roles, pieces[1::2], strict=True)]
    return [] if start.strip() else turns


def _stripped(turns: list[Message]) -> list[Message]:
    return [Message(role=turn["role"], content=turn["content"].strip()) for turn in turns]


def _split(answers: dict[str, str], cells: Cells, template: bool) -> tuple[Dialogue, list[Answer]]:
    """Split transcripts into their prompt and their answers."""
    sides = {name: _turns_of_transcript(text) for name, text in answers.items()}
    for name, side in sides.items():
        if not side:
            raise ValueError(
                f"{cells.origin}: there is no prompt, and {name} is not a transcript that starts with {HUMAN!r}; "
                "name the column of the prompt with columns, such as --data.columns '{prompt: question}'"
            )
    shared = _shared(list(sides.values()))
    texts = [_answer_behind(side, shared, name, cells.origin)["content"] for name, side in sides.items()]
    if template:
        return _stripped(shared), [text.strip() for text in texts]
    return "".join(
        (HUMAN if turn["role"] == "user" else ASSISTANT) + turn["content"] for turn in shared
    ) + ASSISTANT, list(texts)
