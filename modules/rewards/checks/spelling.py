"""Writes numbers and formulas as readers of numbers and of LaTeX read them."""

import re
import unicodedata
from decimal import Decimal

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
_HALF = re.compile(rf"(?:(?<![A-Za-z0-9_.,])(\d{{1,9}})\s?)?({_HALVES})")
_CURRENCY = "[\u00a3\u00a5\u20a0-\u20cf]"  # without the dollar, which LaTeX uses
# Searches are fast where the pattern starts with a character, so that what must not stand before it comes second.
# Digits in groups of three, and whole numbers with a fraction, are not next to another number.
_GAP = r"(?:[ '_\u2019\u00a0\u2009\u202f]|\\[,;: ])"
_SPACED = re.compile(rf"[0-9]{_GAP}[0-9]")
_GROUPS = re.compile(
    rf"[0-9](?<![A-Za-z0-9_.,'].)(?<!\d .)\d{{0,2}}(?P<gap>{_GAP})\d{{3}}(?:(?P=gap)\d{{3}})*(?![\d_']| \d|,\d)"
)
_MIXED = re.compile(r"([0-9](?<![A-Za-z0-9_.,/].)(?<!\d .)\d{0,8}) (\d{1,3})/(\d{1,3})(?![\d/]|[.,]\d)")
_LOOSE_SIGN = re.compile(r"([={($](?:(?<==)\s{1,3})?)([-+])\s{1,3}(?=[\d.$\\])")
_BASE = re.compile(r"(?<![A-Za-z0-9_.,}])(\d+)_(\d+|\{\d+\}|\{\\text\s?\{[a-z]+\}\})")
_POWER_OF_TEN = re.compile(r"(?<![A-Za-z0-9_.,])((?:\d+(?:\.\d+)?|\.\d+)[eE][-+]?\d{1,2})(?!\w|\.\d)")
_TERM = r"(?:\\[a-z]+|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[-+*/^_.{}\d])"
_LAST_FORMULA = re.compile(
    rf"(?:(?<=[\s=:*])|\A)(?:[(\[](?:{_TERM}|[ ()])+(?:,(?:{_TERM}|[ ()])+)+[)\]]|\\\{{(?:{_TERM}|[ ,()])+\\\}}"
    rf"|-?(?=[\dB\\])(?=\S*(?:\\[a-z]|[\^_]\{{))(?:{_TERM}|[()])+?)(?=[.*\s]*\Z)"
)
_SCRIPT = "[\u0590-\u1fff\u3040-\ufaff]"  # letters and vowel signs of scripts that need no spaces
_ANSWER_TAG = re.compile(r"</?answer>")
_BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*\n]{1,200}?)\*\*(?![\w*])(?:\.(?=\s|\Z))?")


def plain_signs(text: str) -> str:
    """Write signs in ASCII, as LaTeX where needed: full-width forms, digits of other scripts, dashes for a minus,
    superscripts and signs of fractions. Drop currency signs other than the dollar.

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
    """Rewrite what math-verify misreads: groups of digits, powers of ten like 1e3, signs that are not ASCII, dollar
    signs in front of amounts, and numbers in another base, which equal only themselves.

    >>> plain_latex("1e3 = $1000.$"), plain_latex("11_2"), plain_latex("It costs \\$5.")
    ('1000 = $1000 $', 'B_{2}11', 'It costs 5.')
    """
    text = plain_numbers(plain_signs(text))
    text = re.sub(r"\\\$\s?(?=[-+]?\.?\d)", "", text)
    text = _POWER_OF_TEN.sub(lambda number: format(Decimal(number[1]), "f"), text)
    text = _BASE.sub(lambda number: f"B_{{{number[2].strip('{}')}}}{number[1]}".replace("\\text{", ""), text)
    return re.sub(r"(?<=\d)\.(?=\s?(?:\}|\$|\\\)|\\\]))", " ", text)


def space_answers(text: str) -> str:
    """Set apart what math-verify does not find: numbers in a script without spaces, right behind a colon, in bold type
    or in tags, commas of LaTeX between groups of digits, fractions before a full stop, and a formula at the end of a
    text without other formulas.

    >>> space_answers("\u7b54\u6848\u662f9\u3002") == "\u7b54\u6848\u662f 9. ", space_answers("It is 3/5.")
    (True, 'It is 3/5 ')
    >>> space_answers("The point is (3, 4).")
    'The point is $(3, 4)$.'
    """
    text = _BOLD.sub(r" \1 ", _ANSWER_TAG.sub(" ", text))
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", ",", text)
    text = re.sub(rf"(?<={_SCRIPT})(?=[\d$\\-])|(?<=[\d$}}])(?={_SCRIPT})", " ", plain_latex(text))
    text = re.sub(r"(?<=[^\W\d_]:)(?=[-\d$\\])", " ", text)
    if not any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")):
        text = text[:-200] + _LAST_FORMULA.sub(lambda formula: f"${formula[0]}$", text[-200:])
    return re.sub(r"(?<=/)(\d+)\.(?=\s|\Z)", r"\1 ", text)


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
