"""Compares answers by math-verify."""

import logging
import re
import warnings
from functools import lru_cache
from typing import Any

from .golds import cut_final_answer, cut_marked
from .numeric import read_number
from .spelling import plain_latex, space_answers

_SAID = r"[$*(\s]{0,5}(?:\\\()?([-+]?\d[\d.,/]*(?<![.,]))[$*)\s]{0,5}(?:\\\))?"
_EITHER = re.compile(
    rf"\banswer\b[\s*:=]{{0,6}}(?:is\b[\s*:]{{0,6}})?(?:either\s)?{_SAID},?\s?or\s(?:maybe\s|perhaps\s|possibly\s)?{_SAID}",
    re.IGNORECASE,
)
_COMMA = re.compile(r",(?!\d{3}\b)")  # of a list, not between groups of digits


def judge(text: str, answer: str | None, info: dict[str, Any]) -> float | None:
    """Return 1.0 if the answer in a text equals the gold answer, 0.0 if not or if none is found.

    Returns:
        None without a gold answer, or if it cannot be parsed.
    """
    from math_verify import parse, verify

    expected = () if answer is None else parse_gold(plain_latex(cut_final_answer(answer)))
    if not expected:
        return None
    if gives_two_numbers(text) or boxes_several(text):
        return 0.0
    found = parse(space_answers(cut_marked(text)), parsing_timeout=None)
    return float(verify(list(expected), found, timeout_seconds=None))


def gives_two_numbers(text: str) -> bool:
    """Return whether a text without a box calls one number or another the answer; math-verify would read the first.

    >>> [gives_two_numbers(f"The answer is {said}.") for said in ("$5$, or maybe 6", "1/2 or 0.5", "5 or so")]
    [True, False, False]
    """
    found = None if "\\boxed" in text else _EITHER.search(text)
    return found is not None and read_number(found[1]) != read_number(found[2])


def boxes_several(text: str) -> bool:
    """Return whether the last line with boxes has several, one of them with a set or a list.

    math-verify takes the boxes of a line as one set, which lets a part of a set stand beside it.

    >>> boxes_several("\\\\boxed{\\\\{1, 2\\\\}} or \\\\boxed{1}"), boxes_several("\\\\boxed{1} and \\\\boxed{2}")
    (True, False)
    """
    line = next((line for line in reversed(text.splitlines()) if "\\boxed{" in line), "")
    boxes = {box.partition("}")[0] for box in line.split("\\boxed{")[1:] if box}
    return len(boxes) > 1 and any("\\{" in box or _COMMA.search(box) for box in boxes)


def prepare() -> None:
    """Load the library and silence it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    judge("1", "1", {})


@lru_cache(maxsize=256)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """Parse a gold answer as LaTeX; empty if nothing is found.

    The dollar signs matter: without them the library reads only the 2 in 2\\sqrt{3}.
    """
    from math_verify import parse

    return tuple(parse(f"${gold.strip('$')}$", fallback_mode="no_fallback", parsing_timeout=None))
