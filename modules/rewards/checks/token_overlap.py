"""Compares an answer with the gold one by the words that both have: token F1."""

import re
import string
import unicodedata
from collections import Counter
from typing import Any

from .words import WORD, cut_answer_tag

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def judge(text: str, answer: str | None, info: dict[str, Any]) -> float | None:
    """Return the F1 of the tokens in [0, 1]; None without a gold answer."""
    if answer is None:
        return None
    said = cut_answer_tag(text)
    return 0.0 if said is None else measure_overlap(split_tokens(said), split_tokens(answer))


def split_tokens(text: str) -> list[str]:
    """Return the tokens of an answer as SQuAD normalises them: lower case, no punctuation, no articles.

    Letters of scripts without spaces are tokens, as in MLQA's evaluation, whose rule for punctuation (every sign that
    Unicode calls so) is also taken. Full-width forms become plain.

    >>> split_tokens("The U.S., a country!"), split_tokens("\u5317\u4eac city\u3002")
    (['us', 'country'], ['\u5317', '\u4eac', 'city'])
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(
        sign for sign in text if sign not in string.punctuation and not unicodedata.category(sign).startswith("P")
    )
    return WORD.findall(_ARTICLE.sub(" ", kept))


def measure_overlap(said: list[str], gold: list[str]) -> float:
    """Return the harmonic mean of precision and recall; without tokens on one side, 1.0 if there are none on both."""
    if not said or not gold:
        return float(said == gold)
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold))
