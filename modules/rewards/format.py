"""Rewards for the shape of a completion, whatever it says."""

import re
from collections.abc import Sequence

from modules.rewards.answers import compile_pattern
from modules.types import Reward, Rollout

# Any text without one of the four tags, so that each tag can occur once only. Possessive (++, *+): linear time on any
# input.
_UNTAGGED = r"(?:[^<]++|<(?!/?(?:think|answer)>))*+"

# The whole completion, reasoning then answer, in DeepSeek-R1's template; its only group is the text between the answer
# tags.
THINK_ANSWER = rf"\s*<think>{_UNTAGGED}</think>\s*<answer>({_UNTAGGED})</answer>\s*"


class RegexFormat(Reward):
    """1.0 where the whole completion matches ``pattern`` (``re.fullmatch`` with DOTALL, outer spaces included), else
    0.0.

    Args:
        pattern: regular expression. A prompt that already ends with ``<think>`` needs a pattern without that tag.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    def __init__(self, pattern: str, name: str = "format") -> None:
        self.name = name
        self.pattern = compile_pattern(pattern, "RegexFormat")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """1.0 or 0.0 per rollout, never None."""
        return [float(self.pattern.fullmatch(rollout.completion.text) is not None) for rollout in rollouts]


class ThinkAnswerFormat(Reward):
    """1.0 where the whole completion is ``<think>...</think>`` and then ``<answer>...</answer>``, else 0.0.

    Source: DeepSeek-R1 (arXiv 2501.12948, section 2.2.2). White space is free between the two parts and at the outer
    ends; each of the four tags must occur exactly once, so nothing can stand before, between, after or nested. Empty
    parts are allowed.
    """

    def __init__(self, name: str = "format") -> None:
        self.name = name
        self.pattern = re.compile(THINK_ANSWER)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """1.0 or 0.0 per rollout, never None."""
        return [float(self.pattern.fullmatch(rollout.completion.text) is not None) for rollout in rollouts]
