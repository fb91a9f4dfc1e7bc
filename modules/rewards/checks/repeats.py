"""Measures how much of a text repeats what it said before."""

from typing import Any

from .words import split_words


def judge(text: str, answer: str | None, info: dict[str, Any], size: int, penalty: float) -> float:
    """Return -``penalty`` times the share of repeated n-grams of ``size`` words."""
    return -penalty * measure_repeats(split_words(text), size)


def measure_repeats(words: list[str], size: int) -> float:
    """Return the share in [0, 1) of n-grams that occurred earlier; 0.0 where there is none.

    >>> measure_repeats("a b a b a b".split(), 2)  # ab ba ab ba ab: three of five are repeated
    0.6
    """
    total = len(words) - size + 1
    if total < 1:
        return 0.0
    distinct = len(set(zip(*(words[start : start + total] for start in range(size)), strict=True)))
    return 1 - distinct / total
