"""Compares answers by math-verify."""

import logging
import warnings
from functools import lru_cache
from typing import Any

from .golds import cut_final_answer, cut_marked
from .spelling import plain_latex, space_answers


def judge(text: str, answer: str | None, info: dict[str, Any]) -> float | None:
    """Return 1.0 if the answer in a text equals the gold answer, 0.0 if not or if none is found.

    Returns:
        None without a gold answer, or if it cannot be parsed.
    """
    from math_verify import parse, verify

    expected = () if answer is None else parse_gold(plain_latex(cut_final_answer(answer)))
    if not expected:
        return None
    found = parse(space_answers(cut_marked(text)), parsing_timeout=None)
    return float(verify(list(expected), found, timeout_seconds=None))


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
