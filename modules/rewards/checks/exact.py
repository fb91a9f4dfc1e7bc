"""Compares the answer in a completion with the gold answer as text."""

import re
from typing import Any


def judge(text: str, answer: str | None, info: dict[str, Any], pattern: str | None = None) -> float | None:
    """Return 1.0 if the text, or the only group of ``pattern`` in it, is the gold answer, else 0.0; both are stripped.

    Returns:
        None without a gold answer.
    """
    if answer is None:
        return None
    found: str | None = text
    if pattern is not None:
        match = re.compile(pattern, re.DOTALL).fullmatch(text)
        found = match[1] if match else None
    return float(found is not None and found.strip() == answer.strip())
