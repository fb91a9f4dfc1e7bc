"""Rewards of the text alone, the same for both sides of a benchmark.

``last_number`` is a reward of practice, under which many groups of completions are alike; under ``score`` none is.
"""

import re
from typing import Any


def find_last_number(text: str) -> str | None:
    """Return the last whole number of a text, without commas."""
    found = re.findall(r"-?\d[\d,]*", text)
    return found[-1].replace(",", "") if found else None


def last_number(prompts: list[str], completions: list[str], answers: list[Any], **columns: Any) -> list[float]:
    """Return 1 where the last number is that of GSM8K's answer, as this project calls a reward."""
    golds = [str(answer).split("####")[-1].strip() for answer in answers]
    return [float(find_last_number(text) == gold) for text, gold in zip(completions, golds, strict=True)]


def last_number_of_chats(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The same as TRL calls it."""
    return last_number([], [read_text(each) for each in completions], answer)


def rate_text(completion: str) -> float:
    """Return a number in [0, 1) that any change of a text changes by chance."""
    return sum(place * ord(letter) for place, letter in enumerate(completion, 1)) % 97 / 97


def score(prompts: list[str], completions: list[str], answers: list[Any], **columns: Any) -> list[float]:
    """Return ``rate_text``, as this project calls a reward."""
    return [rate_text(completion) for completion in completions]


def score_of_chats(completions: list[Any], **columns: Any) -> list[float]:
    """The same as TRL calls it."""
    return [rate_text(read_text(each)) for each in completions]


def read_text(completion: Any) -> str:
    """Return the text of a completion, which may be a list of one message."""
    return str(completion if isinstance(completion, str) else completion[0]["content"])
