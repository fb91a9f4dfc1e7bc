"""From a raw row to ranked completions: which columns hold the prompt, the answers and the verdict."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.formats.columns import Columns, alpaca_prompt, renamed
from datamodules.formats.preference_turns import messages, split_answers
from datamodules.sources.source import Row
from datamodules.tokens.chat import Dialogue, Message

PROMPTS = ("prompt", "question", "context", "conversations", "instruction", "input")
VERDICTS = ("preference", "label", "annotator1")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt and its completions, which are text, or assistant turns where the prompt is messages."""

    prompt: Dialogue
    completions: list[str]  # one: labelled; more: ranked against each other
    ranks: list[int]  # 0 = best; labelled: 0 = desirable, 1 = undesirable
    margin: float | None
    origin: str


@dataclass(frozen=True)
class Verdict:
    """What a row says about its answers."""

    answers: dict[str, Any]  # by their name in error messages
    ranks: list[int]
    strength: float | None = None  # of a graded verdict: 0 = undecided, 1 = sure


def preference_example(
    row: Row, columns: Columns, template: bool = False, margins: Mapping[str, float] | None = None
) -> PreferenceExample | None:
    """The example of one row, in any of the shapes of ``READERS``; None = a tie.

    The prompt is ``prompt``, ``question``, ``context``, ``conversations``, ``instruction`` with ``input``, or
    ``input``; without one, the turns that all answers share. Messages have ``role`` and ``content`` or ``from`` and
    ``value``. A number in ``margin`` is kept.

    Args:
        columns: our column name -> the data's.
        template: instructions and transcripts become messages, since the tokenizer has a chat template.
        margins: margin of each label in column ``strength``; its key ``preference`` is the margin of a sure verdict
            between 1 and 2.

    Raises:
        ValueError: with the row's origin.
    """
    record, origin = renamed(row, columns), row.origin
    shape = _shape(record, columns, origin)
    verdict = READERS[shape](record, shape, origin)
    if len(verdict.ranks) > 1 and len(set(verdict.ranks)) == 1:
        return None
    implicit = shape[0] in ("chosen_messages", "messages")
    prompt, completions = split_answers(
        verdict.answers, None if implicit else _prompt(record, columns, origin, template), origin, template
    )
    return PreferenceExample(
        prompt, completions, verdict.ranks, _margin(record, verdict.strength, margins, origin), origin
    )


def dense_ranks(values: list[float]) -> list[int]:
    """0 for the smallest value, equal numbers for equal values, without gaps: [3, 1, 3] -> [1, 0, 1]."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]


def _shape(record: Record, columns: Columns, origin: str) -> tuple[str, ...]:
    preferred = sorted(
        READERS, key=lambda shape: -len(set(shape) & set(columns))
    )  # what was mapped by hand goes before what is found
    for shape in preferred:
        if all(name in record for name in shape):
            return shape
    wanted = ", ".join(" + ".join(shape) for shape in READERS)
    raise ValueError(
        f"{origin}: found the columns {', '.join(record)}; looked for a prompt ({', '.join(PROMPTS)}) or turns that "
        "the answers share, "
        f"with one of: {wanted}; map others with columns, such as --data.columns '{{chosen: better, rejected: worse}}'"
    )


def _prompt(record: Record, columns: Columns, origin: str, template: bool) -> Dialogue | None:
    names = [name for name in sorted(PROMPTS, key=lambda name: name not in columns) if name in record]
    if not names:
        return None
    value = record[names[0]]
    if names[0] in ("instruction", "input"):
        text = alpaca_prompt(record if names[0] == "instruction" else {"instruction": value}, origin)
        return [Message(role="user", content=text)] if template else text
    if not isinstance(value, str | list):
        raise ValueError(
            f"{origin}: column {names[0]!r} holds a {type(value).__name__}, text or a list of messages was expected"
        )
    return value if isinstance(value, str) else messages(value, f"{origin}: {names[0]}")


def _pair(record: Record, shape: tuple[str, ...], origin: str) -> Verdict:
    return Verdict({name: record[name] for name in shape}, [0, 1])


def _judged(record: Record, shape: tuple[str, ...], origin: str) -> Verdict:
    """1 = the first output is better, 2 = the second, between them graded; 0, 1.5, null and "Tie" are ties. The
    majority of annotators counts.
    """
    judges = ("annotator1", "annotator2", "annotator3") if shape[2] == "annotator1" else shape[2:]
    choices = [_choice(record[name], name, origin) for name in judges if name in record]
    choice, votes = Counter(choices).most_common(1)[0]
    if 2 * votes <= len(choices):
        choice = 1.5  # no majority
    answers = {name: record[name] for name in shape[:2]}
    return Verdict(answers, dense_ranks([choice, 3 - choice]), abs(2 * choice - 3))


def _choice(value: Any, name: str, origin: str) -> float:
    if value is None or value != value or str(value).strip().lower() in ("", "tie"):
        return 1.5
    try:
        choice = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        choice = math.nan
    if choice != 0 and not 1 <= choice <= 2:
        raise ValueError(
            f"{origin}: column {name!r} holds {value!r}, expected 1, 2 or between (which output is better), or 0, null "
            "or Tie"
        )
    return choice or 1.5


def _ranked(record: Record, shape: tuple[str, ...], origin: str) -> Verdict:
    """Best first, or by ``ranks`` (0 = best) or ``scores`` (high = best); or objects with ``completion`` and ``rank``."""
    given = record["completions"]
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{origin}: completions must be a list of at least two")
    if all(isinstance(item, dict) and "completion" in item for item in given):
        places = _numbers([item.get("rank") for item in given], len(given), "rank", origin)
        given = [item["completion"] for item in given]
    elif "ranks" in record:
        places = _numbers(record["ranks"], len(given), "ranks", origin)
    elif "scores" in record:
        places = [-score for score in _numbers(record["scores"], len(given), "scores", origin)]
    elif "labels" in record:
        raise ValueError(
            f"{origin}: completions with labels are steps of one answer, not answers to compare; give ranks or scores"
        )
    else:
        places = [float(place) for place in range(len(given))]
    return Verdict({f"completion {number}": item for number, item in enumerate(given)}, dense_ranks(places))


def _labelled(record: Record, shape: tuple[str, ...], origin: str) -> Verdict:
    answer, label = shape
    if not isinstance(record[label], bool):
        raise ValueError(f"{origin}: column {label!r} holds {record[label]!r}, expected true (desirable) or false")
    return Verdict({answer: record[answer]}, [0 if record[label] else 1])


def _numbers(values: Any, count: int, name: str, origin: str) -> list[float]:
    if not isinstance(values, list) or len(values) != count or not all(_is_number(value) for value in values):
        raise ValueError(f"{origin}: {name} must hold one number for each of the {count} completions")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _margin(record: Record, strength: float | None, margins: Mapping[str, float] | None, origin: str) -> float | None:
    if (margin := record.get("margin")) is not None:
        if not _is_number(margin):
            raise ValueError(f"{origin}: column 'margin' holds {margin!r}, a number was expected")
        return float(margin)
    if margins is not None and "strength" in record:
        if str(record["strength"]) not in margins:
            raise ValueError(
                f"{origin}: no margin for strength {record['strength']!r}; margins names {', '.join(margins)}"
            )
        return margins[str(record["strength"])]
    return (
        None if margins is None or strength is None or "preference" not in margins else strength * margins["preference"]
    )


READERS: dict[tuple[str, ...], Callable[[Record, tuple[str, ...], str], Verdict]] = {
    **dict.fromkeys(
        (("chosen", "rejected"), ("response_j", "response_k"), ("chosen_messages", "rejected_messages")), _pair
    ),
    ("completions",): _ranked,
    **dict.fromkeys(
        ((*pair, verdict) for pair in (("output_1", "output_2"), ("response1", "response2")) for verdict in VERDICTS),
        _judged,
    ),
    **dict.fromkeys(
        ((answer, label) for answer in ("completion", "messages") for label in ("label", "kto_tag")), _labelled
    ),
}
KNOWN = tuple(
    sorted(
        {
            *PROMPTS,
            *(name for shape in READERS for name in shape),
            "annotator2",
            "annotator3",
            "margin",
            "strength",
            "ranks",
            "scores",
        }
    )
)
