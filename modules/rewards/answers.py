"""Rewards that find the answer in a completion and compare it with the gold one: as text, number or mathematics."""

import importlib.util
import math
import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from modules.rewards.workers.line_worker import LineWorker
from modules.types import Reward, Rollout

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d+)?"
# A number does not start inside a word (x2, H2O). A minus after a letter, digit, bracket or minus is not a sign (10-3,
# f(x)-3, --3).
_PREFIX = r"(?<![A-Za-z0-9])(?P<prefix>(?:(?<![)\]}+-])[-+])?(?:\\?\$[-+]?)?)"
_NUMBER = re.compile(rf"{_PREFIX}(?P<top>{_UNSIGNED})(?:/(?P<bottom>{_UNSIGNED}))?", re.ASCII)
_MAX_CHARACTERS = 1000  # longest number that is read, and largest power of ten: exact arithmetic stays fast
_MINUS = "\u2212"  # the typographic minus sign


class ExactMatch(Reward):
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

    def __init__(self, pattern: str | None = None, name: str = "exact_match") -> None:
        self.name = name
        self.pattern = None if pattern is None else compile_extractor(pattern, "ExactMatch")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        return [self._score(rollout.completion.text, rollout.answer) for rollout in rollouts]

    def _score(self, text: str, answer: str | None) -> float | None:
        if answer is None:
            return None
        found: str | None = text
        if self.pattern is not None:
            match = self.pattern.fullmatch(text)
            found = match[1] if match else None
        return float(found is not None and found.strip() == answer.strip())


class NumericMatch(Reward):
    """Gives 1.0 when the completion's number equals the gold number, else 0.0; None when the gold answer is not a
    number.

    Numbers are compared exactly, as fractions. A number has digits, with or without thousands commas (1,234), a decimal
    part (72.0, .5) and a power of ten (1e3). It may have a sign and a dollar sign in front, and may be a fraction of
    two such numbers without spaces (1/2). A percent sign is ignored. Not read as numbers are mixed numbers, powers,
    LaTeX, and numbers with more than 1000 characters or above 1e1000. The gold answer is the text after its last
    ``####``.

    Args:
        pattern: regular expression with exactly one group, which must be one number and nothing else. It must match the
            whole completion. None = the last number of the completion, after ``</think>`` if there is one (see
            ``cut_final_text``).
        tolerance: >= 0, largest absolute difference that still counts as equal.
        name: label of the metric.

    Raises:
        ValueError: ``pattern`` is not a regular expression or does not have exactly one group; ``tolerance`` is
            negative or not finite.
    """

    def __init__(self, pattern: str | None = None, tolerance: float = 0.0, name: str = "numeric_match") -> None:
        if not 0.0 <= tolerance < math.inf:
            raise ValueError(f"NumericMatch: tolerance must be a finite number >= 0, got {tolerance}")
        self.name = name
        self.tolerance = Fraction(str(tolerance))  # the number as it is written: 0.1 is one tenth
        self.pattern = None if pattern is None else compile_extractor(pattern, "NumericMatch")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        return [self._score(rollout.completion.text, rollout.answer) for rollout in rollouts]

    def _score(self, text: str, answer: str | None) -> float | None:
        gold = None if answer is None else _whole_number(cut_final_answer(answer))
        if gold is None:
            return None
        found = self._read(text)
        return float(found is not None and abs(found - gold) <= self.tolerance)

    def _read(self, text: str) -> Fraction | None:
        if self.pattern is None:
            return _last_number(cut_final_text(text))
        match = self.pattern.fullmatch(text)
        return _whole_number(match[1]) if match and match[1] else None


class MathVerify(Reward):
    """Gives 1.0 when math-verify finds the completion's answer mathematically equal to the gold answer, else 0.0.

    The library searches the text after ``</think>`` (see ``cut_final_text``) by its own rules, boxed answers first. If it
    finds nothing to parse, the score is 0.0. The gold answer is the text after its last ``####``, read as LaTeX. Words
    would be read as products of letters, so use ``ExactMatch`` for them. The score is None without a gold answer, when
    the gold answer cannot be parsed, or when there is no verdict in time.

    Scoring runs in a child process, because a huge power or factorial hangs sympy in C code that no signal or thread
    can interrupt. A child that is late is killed and started again. All threads of a process share one child.

    Args:
        timeout: seconds per rollout, without the start of the child.
        name: label of the metric.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: ``timeout`` is not a finite number > 0.
        RuntimeError: at the first call, the child process does not start.
    """

    def __init__(self, timeout: float = 5.0, name: str = "math_verify") -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "MathVerify needs the math-verify package; install it with: pip install 'lightning-align[math]'"
            )
        self.name = name
        self.timeout = timeout
        self._worker = LineWorker(Path(__file__).parent / "workers" / "math_worker.py", timeout)

    @property
    def timeouts(self) -> int:
        """How many rollouts got no verdict so far, because the child was late or crashed."""
        return self._worker.failures

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        return [self._score(rollout.completion.text, rollout.answer) for rollout in rollouts]

    def close(self) -> None:
        """End the child process; a later call starts another one."""
        self._worker.close()

    def _score(self, text: str, answer: str | None) -> float | None:
        if answer is None:
            return None
        verdict: float | None = self._worker.ask({"gold": cut_final_answer(answer), "completion": cut_final_text(text)})
        return verdict


def cut_final_text(text: str) -> str:
    """Return the part of a completion that may hold the answer: the text after the last ``</think>``.

    A completion without these tags is returned whole. One that opens ``<think>`` and never closes it gives "". An
    answer inside the reasoning must not count, because the reader never sees it.
    """
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in text else text


def cut_final_answer(answer: str) -> str:
    """Return the gold answer without its worked solution, stripped: the text after the last ``####`` (GSM8K's mark), or
    all.
    """
    return answer.rpartition("####")[2].strip()


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


def _fraction(digits: str) -> Fraction | None:
    """Return the exact value of an unsigned decimal; None when its power of ten is out of range."""
    exponent = int(digits.lower().partition("e")[2] or "0")
    return None if abs(exponent) > _MAX_CHARACTERS else Fraction(digits.replace(",", ""))


def _value(match: re.Match[str] | None) -> Fraction | None:
    """Return the exact value of a matched number; None without a match, with a zero denominator, or for a too long
    number.
    """
    if match is None or len(match[0]) > _MAX_CHARACTERS:
        return None
    top, bottom = _fraction(match["top"]), _fraction(match["bottom"] or "1")
    if top is None or not bottom:
        return None
    return -top / bottom if match["prefix"].count("-") == 1 else top / bottom


def _whole_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and otherwise only white space, a percent sign and a full stop."""
    text = text.strip().removesuffix(".").removesuffix("%").removesuffix("\\")
    return _value(_NUMBER.fullmatch(text.replace(_MINUS, "-")))


def _last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text."""
    last = deque(_NUMBER.finditer(text.replace(_MINUS, "-")), maxlen=1)
    return _value(last[0]) if last else None
