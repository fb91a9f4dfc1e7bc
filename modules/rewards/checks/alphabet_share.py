"""Measures the share of a thought's signs that are in the alphabet of the prompt."""

import re
from typing import Any

from .language_share import find_question

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def judge(text: str, answer: str | None, info: dict[str, Any], alphabets: list[str]) -> float | None:
    """Return the share; 0.0 without a thought or signs in it, None where the prompt has no sign of any alphabet."""
    signs = "".join(alphabets)
    first = next((sign for sign in find_question(info["prompt"]) if sign in signs), None)
    if first is None:
        return None
    thought = _THOUGHT.search(text)
    counted = [sign for sign in thought[1] if sign in signs] if thought else []
    own = next(alphabet for alphabet in alphabets if first in alphabet)
    return sum(sign in own for sign in counted) / len(counted) if counted else 0.0
