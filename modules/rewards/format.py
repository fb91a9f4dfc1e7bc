"""Rewards for the format of a completion, whatever its content."""

from modules.rewards.answers import compile_pattern
from modules.rewards.checks.whole_pattern import THINK_ANSWER
from modules.rewards.verifier import Verifier

__all__ = ["THINK_ANSWER", "RegexFormat", "ThinkAnswerFormat"]


class RegexFormat(Verifier):
    """Gives 1.0 when the whole completion matches ``pattern``, else 0.0.

    It uses ``re.fullmatch`` with DOTALL; white space at the ends counts. A completion on which the pattern is not done
    in 5 s gets None.

    Args:
        pattern: regular expression. If the prompt ends with ``<think>``, the completion is read with that tag in front.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """

    check = "whole_pattern"
    reads = "text"

    def __init__(self, pattern: str, name: str = "format") -> None:
        super().__init__(name, {"pattern": pattern})
        self.pattern = compile_pattern(pattern, "RegexFormat")


class ThinkAnswerFormat(Verifier):
    """Gives 1.0 when the whole completion is ``<think>...</think><answer>...</answer>``, else 0.0.

    Source: DeepSeek-R1 (arXiv 2501.12948, section 2.2.2). White space is allowed between the two parts and at the ends.
    Each of the four tags must occur exactly once, so no other text can stand before, between or after the two parts.
    Either part may be empty.

    Args:
        name: label of the metric.
    """

    checks_answer = False
    check = "whole_pattern"
    reads = "text"

    def __init__(self, name: str = "format") -> None:
        super().__init__(name, {"pattern": THINK_ANSWER})
        self.pattern = compile_pattern(THINK_ANSWER, "ThinkAnswerFormat")
