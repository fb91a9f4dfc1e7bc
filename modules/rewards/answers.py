"""Rewards that find the answer in a completion and compare it with the gold one: as text, number or mathematics."""

import importlib.util
import math
import re

from modules.rewards.checks.golds import cut_final_answer
from modules.rewards.checks.numeric import read_gold_number
from modules.rewards.verifier import Verifier


class ExactMatch(Verifier):
    """Gives 1.0 when the answer in the completion equals the gold answer as text, else 0.0; None without a gold answer.

    Both are stripped.

    Args:
        pattern: regular expression with exactly one group, the answer. It must match the whole completion
            (``re.fullmatch`` with DOTALL). None = the whole completion is the answer. ``format.THINK_ANSWER`` is the
            strict pattern for think and answer tags.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression or does not have exactly one group.
    """

    check = "exact"
    reads = "text"
    needs_answer = True
    checks_answer = True

    def __init__(self, pattern: str | None = None, name: str = "exact_match") -> None:
        super().__init__(name, {"pattern": pattern})
        self.pattern = None if pattern is None else compile_extractor(pattern, "ExactMatch")


class NumericMatch(Verifier):
    """Gives 1.0 when the completion's number equals the gold number, else 0.0; None when the gold answer is not a
    number.

    Numbers are compared exactly, as fractions. A number has digits, with or without thousands commas (1,234), a decimal
    part (72.0, .5) and a power of ten (1e3). Thousands may also be set apart by apostrophes or by spaces, which an
    ordinary space does where no list of numbers can be meant (1 000, not 100 200). A number may have a sign, of any
    dash but the longest, and a currency sign in front, and may be a fraction of two such numbers without spaces (1/2),
    in LaTeX (``\\frac{1}{2}``) or as one sign, also behind a whole number (2 1/2). A percent sign is ignored. Not read
    as numbers are powers, roots, factorials, hexadecimal numbers, other formulas, and numbers with more than 1000
    characters or above 1e1000. ``The answer is 5!`` ends with an exclamation mark, ``x = 5!`` with a factorial.

    The gold answer is the text after its last ``####``, else in its last box, see ``cut_final_answer``. It may have a
    unit of two letters or more behind it (``72 apples``).

    Args:
        pattern: regular expression with exactly one group, which must be one number and nothing else. It must match the
            whole completion. None = the last number of the completion, after ``</think>`` if there is one (see
            ``types.cut_final_text``).
        tolerance: >= 0, largest absolute difference that still counts as equal.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression or does not have exactly one group; ``tolerance`` is
            negative or not finite.
    """

    check = "numeric"
    needs_answer = True
    checks_answer = True

    def __init__(self, pattern: str | None = None, tolerance: float = 0.0, name: str = "numeric_match") -> None:
        if not 0.0 <= tolerance < math.inf:
            raise ValueError(f"NumericMatch: tolerance must be a finite number >= 0, got {tolerance}")
        super().__init__(name, {"pattern": pattern, "tolerance": tolerance})
        self.pattern = None if pattern is None else compile_extractor(pattern, "NumericMatch")
        self.reads = "final_text" if pattern is None else "text"


class MathVerify(Verifier):
    """Gives 1.0 when math-verify finds the completion's answer mathematically equal to the gold answer, else 0.0.

    The library searches the text after ``</think>`` (see ``types.cut_final_text``) by its own rules, boxed answers
    first. It is given what ``plain_latex`` and ``space_answers`` make of it. If it finds nothing to parse, the score is
    0.0. The gold answer, see ``cut_final_answer``, is read as LaTeX. A number in another base (``11_2``) equals only
    itself. Words and option letters (B) would be read as products of letters, so use ``ExactMatch`` for them. The score
    is None without a gold answer, when the gold answer cannot be parsed, or when there is no verdict in time.

    Scoring runs in worker processes, because a huge power or factorial hangs sympy in C code that no signal or thread
    can interrupt.

    Args:
        timeout: seconds per rollout, without the start of the worker.
        name: label of the metric.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: ``timeout`` is not a finite number > 0.
    """

    check = "mathematics"
    needs_answer = True
    checks_answer = True

    def __init__(self, timeout: float = 5.0, name: str = "math_verify") -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "MathVerify needs the math-verify package; install it with: pip install 'lightning-align[math]'"
            )
        super().__init__(name, timeout=timeout)


def name_reader(gold: str) -> str:
    """Return in words which reward could compare completions with this gold answer."""
    answer = cut_final_answer(gold)
    if read_gold_number(gold) is not None:
        return "NumericMatch reads it as a number"
    if re.fullmatch(r"\(?[A-Ja-j]\)?\.?", answer):
        return "ExactMatch compares option letters, with a pattern whose group is the letter"
    return "ExactMatch compares it as text, MathVerify reads LaTeX, a judge reads anything"


def compile_pattern(pattern: str, owner: str) -> re.Pattern[str]:
    """Compile a regular expression with DOTALL: ``.`` also matches a line end; ``^`` and ``$`` match at the outer ends
    only.

    Args:
        pattern: the regular expression.
        owner: class that asks for it, named in the message.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{owner} got an invalid regular expression {pattern!r}: {error}; correct pattern") from error


def compile_extractor(pattern: str, owner: str) -> re.Pattern[str]:
    """Compile a regular expression like ``compile_pattern``; its only group is the answer.

    Raises:
        ValueError: ``pattern`` is not a regular expression, or it does not have exactly one group.
    """
    compiled = compile_pattern(pattern, owner)
    if compiled.groups != 1:
        raise ValueError(
            f"{owner} needs a pattern with exactly one group, the answer; {pattern!r} has {compiled.groups}; write "
            "(?:...) for other groups"
        )
    return compiled
