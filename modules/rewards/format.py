"""Rewards for the format of a completion, whatever its content."""

import re
from collections.abc import Sequence

from modules.rewards.answers import compile_pattern
from modules.types import Reward, Rollout

# Any text without one of the four tags, so that each tag can occur only once. The possessive quantifiers (++, *+) keep
# the time linear on any input.
_UNTAGGED = r"(?:[^<]++|<(?!/?(?:think|answer)>))*+"

# A whole completion in DeepSeek-R1's template: reasoning, then answer. The only group is the text between the answer
# tags.
THINK_ANSWER = rf"\s*<think>{_UNTAGGED}</think>\s*<answer>({_UNTAGGED})</answer>\s*"


class RegexFormat(Reward):
    """Gives 1.0 when the whole completion matches ``pattern``, else 0.0.

    It uses ``re.fullmatch`` with DOTALL; white space at the ends counts.

    Args:
        pattern: regular expression. If the prompt ends with ``<think>``, the completion is read with that tag in front.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    def __init__(self, pattern: str, name: str = "format") -> None:
        self.name = name
        self.pattern = compile_pattern(pattern, "RegexFormat")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0 or 0.0 per rollout, never None."""
        return [float(self.pattern.fullmatch(rollout.text) is not None) for rollout in rollouts]


class ThinkAnswerFormat(Reward):
    """Gives 1.0 when the whole completion is ``<think>...</think><answer>...</answer>``, else 0.0.

    Source: DeepSeek-R1 (arXiv 2501.12948, section 2.2.2). White space is allowed between the two parts and at the ends.
    Each of the four tags must occur exactly once, so no other text can stand before, between or after the two parts.
    Either part may be empty.

    Args:
        name: label of the metric.
    """

    def __init__(self, name: str = "format") -> None:
        self.name = name
        self.pattern = re.compile(THINK_ANSWER)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0 or 0.0 per rollout, never None."""
        return [float(self.pattern.fullmatch(rollout.text) is not None) for rollout in rollouts]
