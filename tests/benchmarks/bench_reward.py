"""A reward of the text alone, the same for both sides of a benchmark, under which no group of completions is alike."""

from typing import Any


def rate_text(completion: str) -> float:
    """Return a number in [0, 1) that any change of a text changes by chance."""
    return sum(place * ord(letter) for place, letter in enumerate(completion, 1)) % 97 / 97


def score(prompts: list[str], completions: list[str], answers: list[Any], **columns: Any) -> list[float]:
    """The reward as this project calls it."""
    return [rate_text(completion) for completion in completions]


def score_chats(completions: list[Any], **columns: Any) -> list[float]:
    """The reward as TRL calls it, with texts or messages."""
    return [rate_text(each if isinstance(each, str) else each[0]["content"]) for each in completions]
