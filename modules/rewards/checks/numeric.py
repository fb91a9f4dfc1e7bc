"""Compares the number in a completion with the gold number."""

import re
from collections import deque
from fractions import Fraction
from typing import Any

from .golds import cut_final_answer, find_boxed
from .spelling import plain_numbers, plain_signs

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
_EXCLAIMED = re.compile(r"(?<=[A-Za-z] )(\\?\$?-?[\d.,/]{1,40})!+(?=\s{0,9}\Z|\s{1,9}[A-Z])")
_UNIT = re.compile(r"(.*\d)\s*([^\W\d_]{2,20})\.?", re.DOTALL)
_FACTORS = {"pi", "tau", "ten", "dozen", "hundred", "thousand", "million", "billion", "trillion", "bn", "mn", "mio"}
_HEXADECIMAL = re.compile(r"0(?<![\w.]0)(?:[xX][\da-fA-F]+|[oO][0-7]+|[bB][01]+)\b")


def judge(
    text: str, answer: str | None, info: dict[str, Any], pattern: str | None = None, tolerance: float = 0.0
) -> float | None:
    """Return 1.0 if the last number of a text (or the group of ``pattern``) is the gold number, else 0.0.

    Returns:
        None without a gold number.
    """
    gold = None if answer is None else read_gold_number(answer)
    if gold is None:
        return None
    if pattern is None:
        found = read_last_number(text)
    else:
        match = re.compile(pattern, re.DOTALL).fullmatch(text)
        found = read_number(match[1]) if match and match[1] else None
    if found is None or found == gold or not tolerance:
        return float(found is not None and found == gold)
    return float(abs(found - gold) <= Fraction(str(tolerance)))  # as it is written: 0.1 is one tenth


def _fraction(digits: str) -> Fraction | None:
    """Return the exact value of an unsigned decimal; None when its power of ten is out of range."""
    exponent = int(digits.lower().partition("e")[2] or "0")
    return None if abs(exponent) > _MAX_CHARACTERS else Fraction(digits.replace(",", ""))


def _value(match: re.Match[str] | None) -> Fraction | None:
    """Return the exact value of a matched number. None without a match, or if it is no plain number, has a zero
    denominator, or is too long.
    """
    if match is None or match["top"] is None or len(match[0]) > _MAX_CHARACTERS:
        return None
    top, bottom = _fraction(match["top"]), _fraction(match["bottom"] or "1")
    if top is None or not bottom:
        return None
    return -top / bottom if match["prefix"].count("-") == 1 else top / bottom


def read_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number and otherwise only white space, math marks, a box, brackets, the
    name of the number (``x =``), a percent or currency sign and a full stop.
    """
    text = text.strip().removesuffix(".")
    text = _plain_math(text if (boxed := find_boxed(text)) is None else boxed).strip()
    text = _unwrap(text).strip().removesuffix("$" if text.count("$") == 1 else "")  # an amount, no end of a formula
    text = _NAMED.sub("", text).removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    bracketed = re.fullmatch(r"\(([^()]*)\)", text)
    text = bracketed[1].strip() if bracketed else text
    return _value(_NUMBER.fullmatch(re.sub(r"\A([-+])\s+", r"\1", text)))


def read_gold_number(answer: str) -> Fraction | None:
    """Return the number of a gold answer: what ``read_number`` reads, also in braces or ``\\text{}``, behind ``=``, or with
    a unit of two letters or more behind it. A single letter may stand for a factor (``5m``), so it is no unit.

    >>> read_gold_number("= 5 dollars"), read_gold_number("{5}"), read_gold_number("5m"), read_gold_number("5 million")
    (Fraction(5, 1), Fraction(5, 1), None, None)
    """
    text = cut_final_answer(answer)
    if (found := read_number(text)) is not None:
        return found
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|boxed)\b", "", _unwrap(text).replace("\\,", " "))
    text = re.sub(r"\A\s*=", "", re.sub(r"\{([^{}]*)\}", r" \1 ", text)).strip()
    unit = _UNIT.fullmatch(text)
    if unit is not None and unit[2].lower() not in _FACTORS:
        text = unit[1]
    return read_number(text)


def _unwrap(text: str) -> str:
    """Return a text without LaTeX's marks of a formula around all of it."""
    wrapped = _WRAPPED.fullmatch(text)
    return wrapped[wrapped.lastindex or 0] if wrapped else text


def read_numbers(text: str) -> list[Fraction]:
    """Return the values of the numbers in a text, in order; parts of powers, roots and other formulas are none."""
    found = (_value(match) for match in _NUMBER_OR_FORMULA.finditer(_plain_math(text)))
    return [value for value in found if value is not None]


def read_last_number(text: str) -> Fraction | None:
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
