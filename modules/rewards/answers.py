"""Rewards that find the answer in a completion and compare it with the gold one: as text, number or mathematics."""

import importlib.util
import math
import os
import queue
import re
import unicodedata
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from modules.rewards.workers.line_worker import LineWorker
from modules.types import Reward, Rollout

QUESTIONS_PER_CHILD = 16  # a child takes a second to start, and a plain question a few milliseconds

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d+)?"
# A number does not start inside a word (x2, H2O). A minus after a letter, digit, bracket or minus is not a sign (10-3,
# f(x)-3, --3).
_PREFIX = r"(?<![A-Za-z0-9])(?P<prefix>(?:(?<![)\]}+-])[-+])?(?:\\?\$[-+]?)?)"
_NUMBER = re.compile(rf"{_PREFIX}(?P<top>{_UNSIGNED})(?:/(?P<bottom>{_UNSIGNED}))?", re.ASCII)
_MAX_CHARACTERS = 1000  # longest number that is read, and largest power of ten: exact arithmetic stays fast
_MAX_DEPTH = 8  # of fractions and roots inside each other
_FORMULA = "\ufffc"  # stands for a part of a formula that is no plain number
_NUMBER_OR_FORMULA = re.compile(rf"{_NUMBER.pattern}|{_FORMULA}", re.ASCII)
_EXPONENT = r"(?:\{[^{}]*\}|\d+|[A-Za-z])"
_ARGUMENT = r"(?:\{[^{}]*\}|\d|[A-Za-z])"  # of a LaTeX command: a group, or the next sign
_WRAPPED = re.compile(r"\$\$?(.*?)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_NAMED = re.compile(r"\A[^=<>!~\u2248\u2260\u2264\u2265]*[^=<>!~\u2248\u2260\u2264\u2265\s]\s*=(?=[^=]*\Z)")
# Full-width forms of ASCII, the ideographic full stop and the typographic minus.
_ASCII_SIGNS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3002: ". ", 0x2212: "-"}
_SCRIPT = "[\u0590-\u1fff\u3040-\ufaff]"  # letters and vowel signs of scripts that need no spaces


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

    checks_answer = True

    def __init__(self, pattern: str | None = None, name: str = "exact_match") -> None:
        self.name = name
        self.pattern = None if pattern is None else compile_extractor(pattern, "ExactMatch")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        return [self._score(rollout.text, rollout.answer) for rollout in rollouts]

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
    two such numbers without spaces (1/2) or in LaTeX (``\\frac{1}{2}``, also behind a whole number). A percent sign is
    ignored. Not read as numbers are powers, roots, other formulas, and numbers with more than 1000 characters or above
    1e1000. The gold answer is the text after its last ``####``, else in its last box, see ``cut_final_answer``.

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

    checks_answer = True

    def __init__(self, pattern: str | None = None, tolerance: float = 0.0, name: str = "numeric_match") -> None:
        if not 0.0 <= tolerance < math.inf:
            raise ValueError(f"NumericMatch: tolerance must be a finite number >= 0, got {tolerance}")
        self.name = name
        self.tolerance = Fraction(str(tolerance))  # the number as it is written: 0.1 is one tenth
        self.pattern = None if pattern is None else compile_extractor(pattern, "NumericMatch")

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        return [self._score(rollout, rollout.answer) for rollout in rollouts]

    def _score(self, rollout: Rollout, answer: str | None) -> float | None:
        gold = None if answer is None else _whole_number(cut_final_answer(answer))
        if gold is None:
            return None
        found = self._read(rollout)
        return float(found is not None and abs(found - gold) <= self.tolerance)

    def _read(self, rollout: Rollout) -> Fraction | None:
        if self.pattern is None:
            return _last_number(rollout.final_text)
        match = self.pattern.fullmatch(rollout.text)
        return _whole_number(match[1]) if match and match[1] else None


class MathVerify(Reward):
    """Gives 1.0 when math-verify finds the completion's answer mathematically equal to the gold answer, else 0.0.

    The library searches the text after ``</think>`` (see ``types.cut_final_text``) by its own rules, boxed answers first.
    If it finds nothing to parse, the score is 0.0. The gold answer, see ``cut_final_answer``, is read as LaTeX. Words
    would be read as products of letters, so use ``ExactMatch`` for them. The score is None without a gold answer, when
    the gold answer cannot be parsed, or when there is no verdict in time.

    Scoring runs in child processes, because a huge power or factorial hangs sympy in C code that no signal or thread
    can interrupt. A child that is late is killed and started again. Equal questions of a call are asked once, and many
    questions go to several children at a time.

    Args:
        timeout: seconds per rollout, without the start of the child.
        name: label of the metric.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: ``timeout`` is not a finite number > 0.
        RuntimeError: at the first call, the child process does not start.
    """

    checks_answer = True

    def __init__(self, timeout: float = 5.0, name: str = "math_verify") -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "MathVerify needs the math-verify package; install it with: pip install 'lightning-align[math]'"
            )
        self.name = name
        self.timeout = timeout
        script = Path(__file__).parent / "workers" / "math_worker.py"
        self._workers = [LineWorker(script, timeout) for _ in range(min(4, os.cpu_count() or 1))]

    @property
    def timeouts(self) -> int:
        """How many different questions of a call got no verdict so far, because the child was late or crashed."""
        return sum(worker.failures for worker in self._workers)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.0 or None per rollout."""
        questions = [
            (cut_final_answer(rollout.answer), space_answers(cut_marked(rollout.final_text)))
            if rollout.answer is not None
            else None
            for rollout in rollouts
        ]
        distinct = [question for question in dict.fromkeys(questions) if question is not None]
        workers = self._workers[: 1 + len(distinct) // QUESTIONS_PER_CHILD]
        if len(workers) == 1:
            verdicts = [self._ask(workers[0], question) for question in distinct]
        else:
            free: queue.SimpleQueue[LineWorker] = queue.SimpleQueue()
            for worker in workers:
                free.put(worker)

            def ask(question: tuple[str, str]) -> float | None:
                worker = free.get()
                try:
                    return self._ask(worker, question)
                finally:
                    free.put(worker)

            pool = ThreadPoolExecutor(len(workers))
            try:
                verdicts = list(pool.map(ask, distinct))
            finally:  # after an interrupt too
                pool.shutdown(cancel_futures=True)
        found = dict(zip(distinct, verdicts, strict=True))
        return [None if question is None else found[question] for question in questions]

    def close(self) -> None:
        """End the child processes; a later call starts others."""
        for worker in self._workers:
            worker.close()

    @staticmethod
    def _ask(worker: LineWorker, question: tuple[str, str]) -> float | None:
        verdict: float | None = worker.ask(dict(zip(("gold", "completion"), question, strict=True)))
        return verdict


def cut_final_answer(answer: str) -> str:
    """Return the gold answer without its worked solution, stripped: what its last ``####`` marks (GSM8K), else what is
    in its last ``\\boxed{}``, else all of it.

    >>> cut_final_answer("4 + 4 = 8\\n#### 8"), cut_final_answer("It is $\\\\boxed{4}$.")
    ('8', '4')
    """
    marked = cut_marked(answer)
    boxed = None if marked != answer else find_boxed(answer)
    return (marked if boxed is None else boxed).strip()


def cut_marked(text: str) -> str:
    """Return the line behind the last ``####`` if the text ends with it; else the text, since that is a heading."""
    final = text.rpartition("####")[2].strip() if "####" in text else ""
    return final if final and "\n" not in final else text


def find_boxed(text: str) -> str | None:
    """Return what the last ``\\boxed{}`` of a text holds; None without one that is closed."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer(r"[{}]", rest) if box else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()]
    return None


def plain_digits(text: str) -> str:
    """Write full-width signs, the digits of other scripts and the typographic minus in ASCII."""
    if text.isascii():
        return text
    return re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_ASCII_SIGNS))


def space_answers(text: str) -> str:
    """Set apart what math-verify does not find: numbers in a script without spaces, and fractions before a full stop.

    >>> space_answers("\u7b54\u6848\u662f9\u3002") == "\u7b54\u6848\u662f 9. ", space_answers("It is 3/5.")
    (True, 'It is 3/5 ')
    """
    text = re.sub(rf"(?<={_SCRIPT})(?=[\d$\\-])|(?<=[\d$}}])(?={_SCRIPT})", " ", plain_digits(text))
    return re.sub(r"(?<=/)(\d+)\.(?=\s|\Z)", r"\1 ", text)


def name_reader(gold: str) -> str:
    """Return in words which reward could compare completions with this gold answer."""
    if _whole_number(cut_final_answer(gold)) is not None:
        return "NumericMatch reads it as a number"
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


def _fraction(digits: str) -> Fraction | None:
    """Return the exact value of an unsigned decimal; None when its power of ten is out of range."""
    exponent = int(digits.lower().partition("e")[2] or "0")
    return None if abs(exponent) > _MAX_CHARACTERS else Fraction(digits.replace(",", ""))


def _value(match: re.Match[str] | None) -> Fraction | None:
    """Return the exact value of a matched number; None without a match, for what is no plain number, with a zero
    denominator, or for a too long number.
    """
    if match is None or match["top"] is None or len(match[0]) > _MAX_CHARACTERS:
        return None
    top, bottom = _fraction(match["top"]), _fraction(match["bottom"] or "1")
    if top is None or not bottom:
        return None
    return -top / bottom if match["prefix"].count("-") == 1 else top / bottom


def _whole_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and otherwise only white space, math marks, a box, the name of the
    number (``x =``), a percent sign and a full stop.
    """
    text = text.strip().removesuffix(".")
    text = _plain_math(text if (boxed := find_boxed(text)) is None else boxed).strip()
    wrapped = _WRAPPED.fullmatch(text)
    text = wrapped[wrapped.lastindex or 0] if wrapped else text
    text = _NAMED.sub("", text.strip()).removesuffix(".").removesuffix("%").removesuffix("\\")
    return _value(_NUMBER.fullmatch(text.strip()))


def _last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text; None if it is part of a power, a root or another formula."""
    last = deque(_NUMBER_OR_FORMULA.finditer(_plain_math(text)), maxlen=1)
    return _value(last[0]) if last else None


def _plain_math(text: str) -> str:
    """Write LaTeX's numbers as plain ones, and ``_FORMULA`` for what is no plain number.

    A fraction of two numbers becomes a/b. Exponents of units and indices of letters are dropped.
    """
    text = plain_digits(text)
    if not any(sign in text for sign in ("\\", "^", "_", "**", "{,}", "\u03c0")):
        return text
    text = re.sub(r"\\(?:left|right|!)|\^\s*(?:\{\s*)?\\circ\b(?:\s*\})?|\\text\s*\{[^{}\d]*\}", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,;: ])(?=\d{3})", ",", text)
    text = re.sub(rf"(?<=[A-Za-z])\s*[\^_]\s*{_EXPONENT}", "", text)
    text = re.sub(
        rf"(?<=[\d)\]}}])(?:\s*\^\s*[-+]?{_EXPONENT}|\*\*-?\d+|_(?:\{{[^{{}}]*\}}|\d+))|\\pi\b|\u03c0", _FORMULA, text
    )
    for _ in range(_MAX_DEPTH if "frac" in text or "sqrt" in text else 0):  # from the inside out
        before = text
        text = re.sub(rf"\\sqrt\s*(?:\[[^\[\]]*\])?\s*{_ARGUMENT}", _FORMULA, text)
        text = re.sub(rf"(?:(?<![\w.,])(\d+)\s*)?\\[dtc]?frac\s*({_ARGUMENT})\s*({_ARGUMENT})", _plain_fraction, text)
        if text == before:
            break
    return text


def _plain_fraction(match: re.Match[str]) -> str:
    """Return the fraction of two numbers as a/b, with the whole number before it; ``_FORMULA`` for another."""
    whole, top, bottom = match[1], match[2].strip("{} "), match[3].strip("{} ")
    if re.fullmatch(rf"-?{_UNSIGNED}", top, re.ASCII) is None or re.fullmatch(_UNSIGNED, bottom, re.ASCII) is None:
        return _FORMULA
    if whole is None:
        return f"{top}/{bottom}"
    short = all(part.isdigit() and len(part) <= 15 for part in (whole, top, bottom))
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}" if short else _FORMULA
