"""Looks whether a whole completion matches a regular expression."""

import re
from typing import Any

# Any text without one of the four tags, so that each tag can occur only once. The possessive quantifiers (++, *+) keep
# the time linear on any input.
_UNTAGGED = r"(?:[^<]++|<(?!/?(?:think|answer)>))*+"

# A whole completion in DeepSeek-R1's template: reasoning, then answer. The only group is the text between the answer
# tags.
THINK_ANSWER = rf"\s*<think>{_UNTAGGED}</think>\s*<answer>({_UNTAGGED})</answer>\s*"


def judge(text: str, answer: str | None, info: dict[str, Any], pattern: str) -> float:
    """Return 1.0 if ``pattern`` matches the whole text, else 0.0."""
    return float(re.compile(pattern, re.DOTALL).fullmatch(text) is not None)
