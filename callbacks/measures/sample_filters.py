"""Finds completions with right answers that are bad training data, as in Qwen3's cold start (2505.09388, section 4.1)."""

import re
from collections.abc import Sequence

from modules.rewards.checks.golds import find_boxed
from modules.rewards.checks.numeric import read_last_number, read_numbers
from modules.rewards.checks.words import split_words

STATED = re.compile(
    r"\banswer\b(?:\W{1,4}(?:is|are|was|equals|(?:must|should|would|will) be)\b|\W{0,3}[:=])"
    r"(?P<said>[^\n]*?)(?=[.!?](?:\s|$)|\n|$)",
    re.IGNORECASE,
)
SHORT = 3  # most words of an answer that is compared as text; a longer one is an explanation


def contradicts_thought(text: str) -> bool:
    """Tell whether a completion gives another answer than its thought concludes.

    A thought concludes with its last ``\\boxed`` or "answer is", or with a last line that is a number. The final text's
    answer must occur in the thought from there on, so a conclusion that the thought takes back is no contradiction.
    Numbers are compared as numbers, other answers of at most three words as words. False where the thought has no such
    conclusion.

    >>> said = "<think>3 + 4 = 7, so the answer is 7.</think>"
    >>> contradicts_thought(f"{said}The answer is 8."), contradicts_thought(f"{said}It is 7.0")
    (True, False)
    """
    thought, closed, final = text.rpartition("</think>")
    concluded, stated = find_conclusion(thought), find_conclusion(final)
    if not closed or concluded is None or not final.strip():
        return False
    said, rest = concluded
    given = stated[0] if stated is not None else final.strip().splitlines()[-1]
    numbers, number = read_numbers(rest), read_last_number(given)
    if number is not None or read_numbers(said):
        return number is not None and bool(numbers) and number not in numbers
    mine, theirs = split_words(said), split_words(given)
    if not 0 < len(mine) <= SHORT or not theirs:
        return False
    return not (has_run(theirs, mine) or has_run(split_words(rest), theirs))


def find_conclusion(text: str) -> tuple[str, str] | None:
    """Find what a text concludes, and the text from there on; None where it concludes nothing."""
    said = max(STATED.finditer(text), key=lambda found: found.start(), default=None)
    box, boxed = text.rfind("\\boxed{"), find_boxed(text)
    if boxed is not None and (said is None or box > said.start()):
        return boxed, text[box:]
    if said is not None:
        return said["said"], text[said.start() :]
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return (last, last) if re.fullmatch(r"\W*\d[\d.,/]*\W*", last) else None


def has_run(words: Sequence[str], run: Sequence[str]) -> bool:
    """Tell whether ``run`` stands in ``words``, word behind word."""
    return any(list(words[start : start + len(run)]) == list(run) for start in range(len(words) - len(run) + 1))


def find_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """Return all runs of ``length`` words in a text, none of a shorter one.

    >>> sorted(find_runs("The cat sat.", 2))
    [('cat', 'sat'), ('the', 'cat')]
    """
    words = split_words(text)
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
