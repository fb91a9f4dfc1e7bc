"""Which of two answers is better: how a verdict is read, and what only the whole column of verdicts tells."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.formats.reading import Cells, as_number, is_empty
from datamodules.formats.table import normalize

Ours = Literal[-1, 0, 1]
VERDICTS = ("preference", "label", "labels", "annotator1")  # our columns that judge two answers
LABELS = {"yes": 1.0, "no": 0.0, "desirable": 1.0, "undesirable": 0.0}  # of one answer, as text
INDEXED = ("choice",)  # TL;DR's: the number of the better answer, from 0
SIGNED = ("overall_preference", "preference_strength")  # HelpSteer's: below 0, the first answer is better
WORDS = {
    **dict.fromkeys(("a", "first", "left", "model_a", "response_a", "output_1", "response1", "chatbot_a"), 1.0),
    **dict.fromkeys(("b", "second", "right", "model_b", "response_b", "output_2", "response2", "chatbot_b"), 2.0),
    **dict.fromkeys(
        (
            "tie",
            "tie (bothbad)",
            "tie (inconsistent)",
            "both",
            "bothbad",
            "both bad",
            "neither",
            "draw",
            "equal",
            "same",
        ),
        1.5,
    ),
}


@dataclass(frozen=True)
class Scale:
    """How a column of verdicts is read.

    Attributes:
        kind: ``one_two`` = 1 is the first answer and 2 the second, graded between them, 0 a tie; ``zero_one`` = 0 and
            1, graded between them; ``signed`` = the sign tells, 0 is a tie.
        first: the number (of ``signed``: the sign) by which the first answer is better.
        largest: of ``signed``, the strongest verdict.
    """

    kind: Literal["one_two", "zero_one", "signed"]
    first: int = 1
    largest: float = 1.0

    def read(self, value: Any) -> float | None:
        """Read a verdict: 1 = the first answer is better, 2 = the second, 1.5 = a tie; None = not to be read."""
        if is_empty(value):
            return 1.5
        if isinstance(value, str) and value.strip().lower() in WORDS:
            return WORDS[value.strip().lower()]
        number = as_number(value)
        if number is None:
            return None
        if self.kind == "signed":
            return 1.5 - 0.5 * self.first * number / self.largest
        if self.kind == "zero_one":
            return (2 - number if self.first == 1 else 1 + number) if 0 <= number <= 1 else None
        if isinstance(value, bool) or (number != 0 and not 1 <= number <= 2):
            return None
        return number or 1.5

    def __str__(self) -> str:
        if self.kind == "signed":
            return f"{'above' if self.first == 1 else 'below'} 0 = the first answer is better"
        return f"{self.first} = the first answer is better" + (", 2 = the second" if self.kind == "one_two" else "")


def settle_scale(name: str, values: Sequence[Any], first: Ours | None, origin: str) -> Scale:
    """Find how a whole column of verdicts is read.

    Args:
        name: of the column.
        values: of all its rows.
        first: what the user says: the number (of a column that goes below 0: the sign) by which the first is better.
        origin: what errors begin with.

    Raises:
        ValueError: a column that can be read in two ways, with both of them; ``first`` where only one is possible.
    """
    numbers = {number for value in values if (number := as_number(value)) is not None}
    said = f"{origin}: column {name!r}"
    if words := _unknown_words(values, WORDS):
        raise ValueError(
            f"{said} holds {words}, no known name of an answer; write 1 and 2 (or between), A and B, left and right, "
            "or tie"
        )
    if numbers and (min(numbers) < 0 or normalize(name) in SIGNED):
        if first == 0:
            raise ValueError(f"{said} goes below 0, so data.first_is_better must be -1 or 1, the sign, not 0")
        if first is None and normalize(name) not in SIGNED:
            raise ValueError(
                f"{said} goes below 0 and may mean that the first answer is better (-1) or the second; say the sign by "
                "which the first is better, --data.first_is_better -1 or 1"
            )
        return Scale("signed", -1 if first is None else first, max(map(abs, numbers)) or 1.0)
    if numbers and first is None and numbers <= {0.0, 1.0} and normalize(name) in INDEXED:
        return Scale("zero_one", 0)
    alone = numbers == {1.0} and not any(isinstance(value, bool) for value in values)  # 1 of 1 and 2 as likely
    alone = alone and not normalize(name).endswith("_id")  # which counts from 0
    if numbers and max(numbers) <= 1 and (first is not None or not alone):
        if first is None or first < 0:
            held = "0 and 1" if numbers <= {0.0, 1.0} else "numbers from 0 to 1"
            raise ValueError(
                f"{said} holds only {held}, so 0 may be the number of the first answer, or 1 may say that the first is "
                "better; say the number by which the first is better, --data.first_is_better 0 or 1"
            )
        return Scale("zero_one", first)
    if first is not None:
        raise ValueError(
            f"{said} tells by 1 and 2, so data.first_is_better has no effect; leave it out (it is for columns of 0 and "
            "1)"
        )
    return Scale("one_two")


def check_sources(name: str, values: Mapping[str, Sequence[Any]]) -> None:
    """Check that the sources of a column of verdicts do not use different numbers.

    Args:
        name: of the column.
        values: verdicts by source, such as the files of a folder.

    Raises:
        ValueError: one source tells by 0 and 1 alone and another by 2.
    """
    numbers = {source: {as_number(value) for value in given} - {None} for source, given in values.items()}
    zero_one = next((source for source, found in numbers.items() if found == {0, 1}), None)
    two = next((source for source, found in numbers.items() if 2 in found), None)
    if zero_one is not None and two is not None:
        raise ValueError(
            f"{zero_one}: column {name!r} holds only 0 and 1, and that of {two} holds 2, so a number may mean "
            "different answers; write A and B (or tie) in both"
        )


def check_labels(name: str, values: Mapping[str, Any], first: Ours | None) -> None:
    """Check a column of labels, each of one answer, as a whole: true or 1 = good, false or 0 = not.

    Args:
        name: of the column.
        values: the label of each origin.
        first: must be None, for there is no first answer.

    Raises:
        ValueError: naming the first row with another number, which makes the meaning of all of them unknown.
    """
    if first is not None:
        raise ValueError(f"data.first_is_better is of two answers and column {name!r} labels one; leave it out")
    if words := _unknown_words(list(values.values()), LABELS):
        origin = next(iter(values))
        raise ValueError(
            f"{origin}: column {name!r} holds {words}, expected true (desirable) or false, or 1 and 0, in all rows"
        )
    for origin, value in values.items():
        if read_label_cell(value) not in (0, 1, None):
            raise ValueError(
                f"{origin}: column {name!r} holds {value!r}, expected true (desirable) or false, or 1 and 0"
            )


def read_label_cell(value: Any) -> float | None:
    """Read the label of one answer: 1 = good, 0 = not, another number as it is; None for any other value."""
    word = value.strip().lower() if isinstance(value, str) else value
    return LABELS[word] if isinstance(word, str) and word in LABELS else as_number(value)


def _unknown_words(values: Sequence[Any], known: Collection[str]) -> str:
    """Find texts that are neither numbers nor known and stand in several rows, so that they are labels and no slips."""
    texts = Counter(value.strip().lower() for value in values if isinstance(value, str) and not is_empty(value))
    labels = [text for text, rows in texts.items() if rows > 1 and text not in known and as_number(text) is None]
    return " and ".join(repr(text) for text in labels[:3])


def verdict_columns(cells: Cells) -> list[str]:
    """Find our names of the columns that judge a row's two answers, those mapped by hand first."""
    by_hand = cells.reading.by_hand
    found = [name for name in sorted(VERDICTS, key=lambda name: name not in by_hand) if cells.has(name)]
    if found[:1] == ["annotator1"]:
        return [name for name in ("annotator1", "annotator2", "annotator3") if cells.has(name)]
    return found[:1]


def named_answer(cells: Cells, value: Any) -> float | None:
    """Read a verdict that names the column of the first (1) or the second answer (2); None for any other."""
    names = [normalize(cells.name(answer)) for answer in ("output_1", "output_2") if cells.has(answer)]
    return 1.0 + names.index(normalize(value)) if isinstance(value, str) and normalize(value) in names else None


def read_verdicts(cells: Cells) -> float:
    """Read which of a row's two answers is better, as ``Scale.read`` says it; of several verdicts the majority counts.

    Raises ValueError with the row's origin for a verdict that the column's scale does not know.
    """
    choices = []
    for name in verdict_columns(cells):
        cells.take(name)
        value, theirs = cells.accept_empty(name), cells.name(name)
        scale: Scale = cells.reading.settled.get(theirs, Scale("one_two"))
        choice = named_answer(cells, value) or scale.read(value)
        if choice is None:
            known = "1, 2 or between (which output is better), or 0, null or Tie"
            expected = known if scale == Scale("one_two") else str(scale)
            raise ValueError(f"{cells.origin}: column {theirs!r} holds {value!r}, expected {expected}")
        choices.append(choice)
    choice, votes = Counter(choices).most_common(1)[0]
    return choice if 2 * votes > len(choices) else 1.5
