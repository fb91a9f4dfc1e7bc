"""Splits text into words, in any script; a script without spaces gives one word for each of its letters."""

import re
import unicodedata
from functools import lru_cache

# Han, kana, Thai, Lao, Burmese and Khmer, and their signs that belong to the letter in front.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
_SIGNS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3\u3099\u309a"
WORD = re.compile(f"[{SPACELESS}][{_SIGNS}]*|[^\\s{SPACELESS}]+")
_TAG = re.compile(r"</?(?:think|answer)>")


class _Spaces(dict[int, str]):
    """Table for ``str.translate`` that keeps letters, marks and digits and writes a space for all else."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        self[code] = sign if unicodedata.category(sign)[0] in "LMN" else " "
        return self[code]


_SPACES = _Spaces()


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and the tags of thoughts and answers.

    A letter of a script without spaces is a word, with the signs above and below it.

    >>> split_words("The cat, the \u732b\u304c."), split_words("\u0915\u094d\u092f\u093e\uff1f 3.5")
    (['the', 'cat', 'the', '\u732b', '\u304c'], ['\u0915\u094d\u092f\u093e', '3', '5'])
    """
    return WORD.findall(unicodedata.normalize("NFKC", _TAG.sub(" ", text)).lower().translate(_SPACES))


@lru_cache(maxsize=65536)
def name_script(letter: str) -> str:
    """Return the script of a letter by its name in Unicode, such as LATIN or THAI; "" for what is no letter."""
    if not letter.isalpha():
        return ""
    first = unicodedata.name(letter, "").partition(" ")[0]
    return {"KATAKANA-HIRAGANA": "KATAKANA", "IDEOGRAPHIC": "CJK"}.get(first, first)


def cut_answer_tag(text: str) -> str | None:
    """Return what the only ``<answer>`` of a text holds, or all of it without tags; None for several or unclosed ones.

    >>> cut_answer_tag("So <answer> 4 </answer>"), cut_answer_tag(" 4"), cut_answer_tag("<answer>4</answer><answer>5</answer>")
    ('4', '4', None)
    """
    if "<answer>" not in text and "</answer>" not in text:
        return text.strip()
    before, _, rest = text.partition("<answer>")
    inside, closed, after = rest.partition("</answer>")
    tags = ("<answer>", "</answer>")
    if not closed or any(tag in part for tag in tags for part in (before, inside, after)):
        return None
    return inside.strip()
