"""Finds the option letter that a completion ends with, and compares it with the gold one."""

import re
import unicodedata
from typing import Any

from .words import cut_answer_tag

_LEFT, _RIGHT = r"[\s*_$`\"'(\[{]*", r"[\s*_$`\"')\]}.\u3002,;!]*"
_STYLE = r"(?:\\(?:text|textbf|mathrm|mathbf|mathsf|bf|rm)\s*\{?\s*)?"
# A letter alone: B, (b), **B**, $\text{B}$, "Option B.".
_ALONE = re.compile(rf"{_LEFT}(?:(?:option|choice)\s+)?{_STYLE}{_LEFT}([A-Za-z]){_RIGHT}", re.IGNORECASE)
# A letter in front of its option's text: B) Paris, (B) Paris, B. Paris, B: Paris.
_LABEL = re.compile(rf"{_LEFT}(?:(?:option|choice)\s+)?([A-Za-z])[*_]*\s?[).:\]][*_]*\s*\S.*", re.IGNORECASE)
# What announces an answer, as NFKC writes it. Without a colon or a verb, "answer" is any other word.
_MARK = re.compile(
    r"(?:\banswer|\bchoice|\boption)\**(?:\s+(?:is|would\s+be|should\s+be|must\s+be)\b(?!\s*n[o']t)\s*:?|\s*[:=])"
    r"|\u7b54\u6848(?:\u662f|\u4e3a|\u70ba|\u9009|\u9078)?\s*:?|\u7b54\u3048\u306f?\s*:?|\uc815\ub2f5(?:\uc740)?\s*:?"
    r"|\u0e04\u0e4d\u0e32\u0e15\u0e2d\u0e1a(?:\u0e17\u0e35\u0e48\u0e16\u0e39\u0e01\u0e15\u0e49\u0e2d\u0e07)?"
    r"(?:\u0e04\u0e37\u0e2d)?\s*:?\s*(?:\u0e02\u0e49\u0e2d)?",
    re.IGNORECASE,
)
# The letter behind such words: in upper case, or in lower case with a bracket or a box around it.
_SAID = re.compile(
    rf"[\s*_$`\"']*(?:(?:option|choice)\s+|\u9009\u9879\s*)?(?P<mark>[(\[]|\\boxed\s*\{{)?\s*{_STYLE}"
    rf"[\s*_(]*(?P<letter>[A-Za-z])(?![A-Za-z0-9'])",
)
_BOX = re.compile(r"\\boxed\s*\{")
_OTHER = re.compile(
    r"\s*[)\]}*_$.]*\s*(?:,|/|&|\bor\b|\band\b|\u6216|\u548c|\u6216\u8005|\u0e2b\u0e23\u0e37\u0e2d|\u0e41\u0e25\u0e30)"
    r"\s*(?:maybe\s+|perhaps\s+|option\s+|\u0e02\u0e49\u0e2d\s*)?[*_$(\[]*(?:\\boxed\s*\{\s*)?([A-Z])(?![A-Za-z0-9'])"
)
_WORD_AHEAD = re.compile(r"\s+(?!(?:because|since|as|which|for|due|or|and)\b)[a-z]")


def judge(text: str, answer: str | None, info: dict[str, Any]) -> float | None:
    """Return 1.0 if the completion's last stated letter is the gold one, else 0.0; None without a gold letter."""
    gold = None if answer is None else read_gold_letter(answer, info)
    if gold is None:
        return None
    said = cut_answer_tag(text)
    if said is None:
        return 0.0
    return float((read_whole(said) if "<answer>" in text else read_letter(said)) == gold)


def read_gold_letter(answer: str, info: dict[str, Any]) -> str | None:
    """Return the letter of a gold answer: B, (B), B) Paris, or the text of one of the row's ``options``."""
    letter = read_whole(answer.rpartition("####")[2])
    options = info.get("options")
    if letter is None and isinstance(options, dict) and set(options) == {"text", "label"}:
        options = dict(zip(options["label"], options["text"], strict=False))
    if letter is None and isinstance(options, list):
        options = {chr(ord("A") + place): text for place, text in enumerate(options)}
    if letter is None and isinstance(options, dict):
        same = [name for name, text in options.items() if str(text).strip() == answer.strip()]
        letter = str(same[0]).upper() if len(same) == 1 else None
    return letter


def read_whole(text: str) -> str | None:
    """Return the letter of a text that is nothing else, but for its option's text behind a bracket, dot or colon."""
    text = unicodedata.normalize("NFKC", text).strip()
    boxed = _BOX.match(text.strip("$ *"))
    if boxed:
        text = text.strip("$ *.")[boxed.end() :].removesuffix("}")
    found = _ALONE.fullmatch(text) or _LABEL.fullmatch(text)
    return found[1].upper() if found else None


def read_letter(text: str) -> str | None:
    """Return the letter on the last line that states one; None without such a line or if it states several.

    >>> read_letter("A looks right.\\nAnswer: (B)"), read_letter("The answer is A or B."), read_letter("**c**")
    ('B', None, 'C')
    """
    lines = [line for line in unicodedata.normalize("NFKC", text).splitlines() if line.strip()]
    for line in reversed(lines):
        if line is lines[-1] and (alone := _ALONE.fullmatch(line)):
            return alone[1].upper()
        if len(lines) == 1 and (label := _LABEL.fullmatch(line)) and not _MARK.search(line) and not _BOX.search(line):
            return label[1].upper()
        if stated := find_stated(line):
            return stated.pop() if len(stated) == 1 else None
    return None


def find_stated(line: str) -> set[str]:
    """Return the letters that a line states as the answer: in boxes, and behind words that announce an answer."""
    stated = set()
    for start in [mark.end() for mark in _MARK.finditer(line)] + [box.start() for box in _BOX.finditer(line)]:
        said = _SAID.match(line, start)
        if said is None or said["letter"].islower() and said["mark"] is None:
            continue
        if said["mark"] is None and said["letter"] in "AI" and _WORD_AHEAD.match(line, said.end()):
            continue  # "the answer is A lot"
        stated.add(said["letter"].upper())
        place = said.end()
        while other := _OTHER.match(line, place):
            stated.add(other[1])
            place = other.end()
    return stated
