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
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from modules.rewards.workers.line_worker import LineWorker
from modules.types import Reward, Rollout

QUESTIONS_PER_CHILD = 16  # a child takes a second to start, and a plain question a few milliseconds

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d+)?"
# A number does not start inside a word (x2, H2O). A minus after a letter, digit, bracket or minus is not a sign (10-3,
# f(x)-3, --3).
_PREFIX = r"(?<![A-Za-z0-9])(?P<prefix>(?:(?<![)\]}+-])[-+])?(?:\\?\$[-+]?)?)"
_NUMBER = re.compile(rf"{_PREFIX}(?P<top>{_UNSIGNED})(?:/(?P<bottom>[-+]?{_UNSIGNED}))?", re.ASCII)
_MAX_CHARACTERS = 1000  # longest number that is read, and largest power of ten: exact arithmetic stays fast
_MAX_DEPTH = 8  # of fractions and roots inside each other
_FORMULA = "\ufffc"  # stands for a part of a formula that is no plain number
_NUMBER_OR_FORMULA = re.compile(rf"{_NUMBER.pattern}|{_FORMULA}", re.ASCII)
_EXPONENT = r"(?:\{[^{}]*\}|\d+|[A-Za-z])"
_ARGUMENT = r"(?:\{[^{}]*\}|\d|[A-Za-z])"  # of a LaTeX command: a group, or the next sign
_LETTER_INDEX = re.compile(rf"[\^_](?<=[A-Za-z].)\s*{_EXPONENT}")
_POWER_OR_BASE = re.compile(
    rf"\^(?<=[\d)\]}}].)\s*[-+]?{_EXPONENT}|\*\*(?<=[\d)\]}}]..)-?\d+"
    r"|_(?<=[\d)\]}].)(?:\{[^{}]*\}|\d+)|\\pi\b|\u03c0"
)
_WRAPPED = re.compile(r"\$\$?(.*?)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_NAMED = re.compile(r"\A[^=<>!~\u2248\u2260\u2264\u2265]*[^=<>!~\u2248\u2260\u2264\u2265\s]\s*=(?=[^=]*\Z)")
# Full-width forms of ASCII, the ideographic full stop, Arabic separators, slashes, dashes that stand for a minus, and
# the signs that LaTeX spells.
_ASCII_SIGNS: dict[int, str] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **dict(zip(map(ord, "\u3002\u066a\u066b\u066c\u2044\u2215"), (". ", "%", ".", ",", "/", "/"), strict=True)),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **dict.fromkeys(map(ord, "\u00b0\u00ba"), "^\\circ "),
    **dict.fromkeys(map(ord, "\u00b7\u22c5"), "\\cdot "),
    0x221E: "\\infty ",
}
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u207b\u207f]+")
_LOWERED = re.compile("[\u2080-\u208b]+")
_ROOT = re.compile(
    r"(?:([\u221a-\u221c])|(?<![\\A-Za-z])sqrt(?=\s?\())\s?(?:\(([^()]{0,200})\)|(\d+(?:\.\d+)?|[A-Za-z]))?"
)
_HALVES = "[\u00bc-\u00be\u2150-\u215e\u2189]"  # signs of fractions
_HALF = re.compile(rf"(?:(?<![\w.,])(\d{{1,9}})\s?)?({_HALVES})")
_CURRENCY = "[\u00a3\u00a5\u20a0-\u20cf]"  # without the dollar, which LaTeX uses
# Searches are fast where the pattern starts with a character, so that what must not stand before it comes second.
# Digits in groups of three, and whole numbers with a fraction, are not next to another number.
_GAP = r"(?:[ '_\u2019\u00a0\u2009\u202f]|\\[,;: ])"
_SPACED = re.compile(rf"[0-9]{_GAP}[0-9]")
_GROUPS = re.compile(
    rf"[0-9](?<![\w.,'].)(?<!\d .)\d{{0,2}}(?P<gap>{_GAP})\d{{3}}(?:(?P=gap)\d{{3}})*(?![\d_']| \d|,\d)"
)
_MIXED = re.compile(r"([0-9](?<![\w.,/].)(?<!\d .)\d{0,8}) (\d{1,3})/(\d{1,3})(?![\d/]|[.,]\d)")
_LOOSE_SIGN = re.compile(r"([={($](?:(?<==)\s{1,3})?)([-+])\s{1,3}(?=[\d.$\\])")
_EXCLAIMED = re.compile(r"(?<=[A-Za-z] )(\\?\$?-?[\d.,/]{1,40})!+(?=\s{0,9}\Z|\s{1,9}[A-Z])")
_HEXADECIMAL = re.compile(r"0(?<![\w.]0)(?:[xX][\da-fA-F]+|[oO][0-7]+|[bB][01]+)\b")
_BASE = re.compile(r"(?<![\w.,}])(\d+)_(\d+|\{\d+\}|\{\\text\s?\{[a-z]+\}\})")
_POWER_OF_TEN = re.compile(r"(?<![\w.,])((?:\d+(?:\.\d+)?|\.\d+)[eE][-+]?\d{1,2})(?!\w|\.\d)")
_TERM = r"(?:\\[a-z]+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[-+*/^_.{}\d])"
_LAST_FORMULA = re.compile(
    rf"(?:(?<=[\s=:*])|\A)(?:[(\[](?:{_TERM}|[ ()])+(?:,(?:{_TERM}|[ ()])+)+[)\]]|\\\{{(?:{_TERM}|[ ,()])+\\\}}"
    rf"|-?(?=[\dB\\])(?=\S*(?:\\[a-z]|[\^_]\{{))(?:{_TERM}|[()])+?)(?=[.*\s]*\Z)"
)
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
    part (72.0, .5) and a power of ten (1e3). Thousands may also be set apart by apostrophes or by spaces, which an
    ordinary space does where no list of numbers can be meant (1 000, not 100 200). A number may have a sign, of any
    dash but the longest, and a currency sign in front, and may be a fraction of two such numbers without spaces (1/2),
    in LaTeX (``\\frac{1}{2}``) or as one sign, also behind a whole number (2 1/2). A percent sign is ignored. Not read
    as numbers are powers, roots, factorials, hexadecimal numbers, other formulas, and numbers with more than 1000
    characters or above 1e1000. ``The answer is 5!`` ends with an exclamation mark, ``x = 5!`` with a factorial.

    The gold answer is the text after its last ``####``, else in its last box, see ``cut_final_answer``.

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

    The library searches the text after ``</think>`` (see ``types.cut_final_text``) by its own rules, boxed answers
    first. It is given what ``plain_latex`` and ``space_answers`` make of it. If it finds nothing to parse, the score is
    0.0. The gold answer, see ``cut_final_answer``, is read as LaTeX. A number in another base (``11_2``) equals only
    itself. Words and option letters (B) would be read as products of letters, so use ``ExactMatch`` for them. The score
    is None without a gold answer, when the gold answer cannot be parsed, or when there is no verdict in time.

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
            (plain_latex(cut_final_answer(rollout.answer)), space_answers(cut_marked(rollout.final_text)))
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


def plain_signs(text: str) -> str:
    """Write full-width signs, the digits of other scripts, dashes for a minus, superscripts and signs of fractions in
    ASCII, as LaTeX where it needs to be; drop currency signs other than the dollar.

    >>> plain_signs("\u20133\u00b2 + 1\u00bd + \u20ac5")
    '-3^2 + \\\\frac{3}{2} + 5'
    """
    if text.isascii():
        return text
    text = re.sub(rf"{_CURRENCY}(?<![^\W_].)\s?(?=[-+\u2013\u2212]?\.?\d)", "", text)
    text = re.sub(_CURRENCY, " ", text)
    text = _RAISED.sub(lambda raised: _shift("^", raised[0]), text)
    text = _LOWERED.sub(lambda lowered: _shift("_", lowered[0]), text)
    text = _HALF.sub(_spell_half, text) if re.search(_HALVES, text) else text
    return re.sub(r"\d(?<![0-9])", lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_ASCII_SIGNS))


def plain_numbers(text: str) -> str:
    """Join digits that stand in groups of three, write a whole number with a fraction as one fraction, set a sign
    behind ``=`` at its number, and spell roots as LaTeX does.

    >>> plain_numbers("x = - 1 000 or 1'000"), plain_numbers("2 1/2 or 100 200 300 or sqrt(5)")
    ('x = -1000 or 1000', '5/2 or 100 200 300 or \\\\sqrt{5}')
    """
    if _SPACED.search(text):
        text = _MIXED.sub(_spell_mixed, _GROUPS.sub(_join_groups, text))
    text = _LOOSE_SIGN.sub(r"\1\2", text)
    roots = ("sqrt(", "sqrt (", "\u221a", "\u221b", "\u221c")
    return _ROOT.sub(_spell_root, text) if any(root in text for root in roots) else text


def plain_latex(text: str) -> str:
    """Write what math-verify misreads in the way it reads: groups of digits, powers of ten like 1e3, signs that are not
    ASCII, dollar signs in front of amounts, and numbers in another base, which equal only themselves.

    >>> plain_latex("1e3 = $1000.$"), plain_latex("11_2"), plain_latex("It costs \\$5.")
    ('1000 = $1000 $', 'B_{2}11', 'It costs 5.')
    """
    text = plain_numbers(plain_signs(text))
    text = re.sub(r"\\\$\s?(?=[-+]?\.?\d)", "", text)
    text = _POWER_OF_TEN.sub(lambda number: format(Decimal(number[1]), "f"), text)
    text = _BASE.sub(lambda number: f"B_{{{number[2].strip('{}')}}}{number[1]}".replace("\\text{", ""), text)
    return re.sub(r"(?<=\d)\.(?=\s?(?:\}|\$|\\\)|\\\]))", " ", text)


def space_answers(text: str) -> str:
    """Set apart what math-verify does not find: numbers in a script without spaces or right behind a colon, fractions
    before a full stop, and a formula at the end of a text without other formulas.

    >>> space_answers("\u7b54\u6848\u662f9\u3002") == "\u7b54\u6848\u662f 9. ", space_answers("It is 3/5.")
    (True, 'It is 3/5 ')
    >>> space_answers("The point is (3, 4).")
    'The point is $(3, 4)$.'
    """
    text = re.sub(rf"(?<={_SCRIPT})(?=[\d$\\-])|(?<=[\d$}}])(?={_SCRIPT})", " ", plain_latex(text))
    text = re.sub(r"(?<=[^\W\d_]:)(?=[-\d$\\])", " ", text)
    if not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")):
        text = text[:-200] + _LAST_FORMULA.sub(lambda formula: f"${formula[0]}$", text[-200:])
    return re.sub(r"(?<=/)(\d+)\.(?=\s|\Z)", r"\1 ", text)


def name_reader(gold: str) -> str:
    """Return in words which reward could compare completions with this gold answer."""
    answer = cut_final_answer(gold)
    if _whole_number(answer) is not None:
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
    """Return the value of a text that is one number and otherwise only white space, math marks, a box, brackets, the
    name of the number (``x =``), a percent or currency sign and a full stop.
    """
    text = text.strip().removesuffix(".")
    text = _plain_math(text if (boxed := find_boxed(text)) is None else boxed).strip()
    wrapped = _WRAPPED.fullmatch(text)
    text = wrapped[wrapped.lastindex or 0] if wrapped else text
    text = text.strip().removesuffix("$" if text.count("$") == 1 else "")  # an amount, no end of a formula
    text = _NAMED.sub("", text).removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    bracketed = re.fullmatch(r"\(([^()]*)\)", text)
    text = bracketed[1].strip() if bracketed else text
    return _value(_NUMBER.fullmatch(re.sub(r"\A([-+])\s+", r"\1", text)))


def _last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text; None if it is part of a power, a root or another formula."""
    last = deque(_NUMBER_OR_FORMULA.finditer(_plain_math(text)), maxlen=1)
    return _value(last[0]) if last else None


def _plain_math(text: str) -> str:
    """Write LaTeX's numbers as plain ones, and ``_FORMULA`` for what is no plain number.

    A fraction of two numbers becomes a/b. Exponents of units and indices of letters are dropped.
    """
    text = plain_numbers(plain_signs(text))
    if "!" in text:
        text = re.sub(r"(?<=\d)!", _FORMULA, _EXCLAIMED.sub(r"\1.", text))
    text = _HEXADECIMAL.sub(_FORMULA, text)
    text = re.sub(rf"(?<=\d)/\(([-+]{_UNSIGNED})\)", r"/\1", text) if "/(" in text else text
    if not any(sign in text for sign in ("\\", "^", "_", "**", "{,}", "\u03c0")):
        return text
    text = re.sub(r"\\(?:left|right|!)|\^\s*(?:\{\s*)?\\circ\b(?:\s*\})?|\\text\s*\{[^{}\d]*\}", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", text)
    if any(sign in text for sign in ("^", "_", "**", "\\pi", "\u03c0")):
        text = re.sub(r" {1,9}(?=[\^_])", "", text) if " ^" in text or " _" in text else text
        text = _LETTER_INDEX.sub("", text)
        text = _POWER_OR_BASE.sub(_FORMULA, text)
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
    if (
        re.fullmatch(rf"-?{_UNSIGNED}", top, re.ASCII) is None
        or re.fullmatch(rf"-?{_UNSIGNED}", bottom, re.ASCII) is None
    ):
        return _FORMULA
    if whole is None:
        return f"{top}/{bottom}"
    short = all(part.isdigit() and len(part) <= 15 for part in (whole, top, bottom))
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}" if short else _FORMULA


def _shift(mark: str, signs: str) -> str:
    """Return superscripts (``mark`` is ``^``) or subscripts (``_``) as LaTeX."""
    plain = unicodedata.normalize("NFKC", signs).translate(_ASCII_SIGNS)
    return mark + (plain if len(plain) == 1 else f"{{{plain}}}")


def _spell_half(match: re.Match[str]) -> str:
    """Return a sign such as one half, and the whole number before it, as one LaTeX fraction."""
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return f"\\frac{{{int(match[1] or '0') * int(bottom) + int(top)}}}{{{bottom}}}"


def _spell_mixed(match: re.Match[str]) -> str:
    """Return a whole number and a proper fraction as one fraction; two numbers stay as they are."""
    whole, top, bottom = int(match[1]), int(match[2]), int(match[3])
    return f"{whole * bottom + top}/{bottom}" if top < bottom else match[0]


def _spell_root(match: re.Match[str]) -> str:
    """Return a root as LaTeX."""
    root = {"\u221b": "\\sqrt[3]", "\u221c": "\\sqrt[4]"}.get(match[1], "\\sqrt")
    under = match[2] if match[2] is not None else match[3]
    return root if under is None else f"{root}{{{under}}}"


def _join_groups(match: re.Match[str]) -> str:
    """Return groups of digits as one number; what may be a list of numbers of three digits stays as it is."""
    groups = match[0].split(match["gap"])
    listed = match["gap"] == " " and len(groups[0]) == 3 and not any(group[0] == "0" for group in groups)
    return match[0] if listed else "".join(groups)
