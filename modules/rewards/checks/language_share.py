"""Measures the share of a text's words that are in a given language, or in that of the prompt."""

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from .words import name_script, split_words

# The language that a script alone determines.
ONLY = {
    "ARMENIAN": "hy",
    "GEORGIAN": "ka",
    "GREEK": "el",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "he",
    "HIRAGANA": "ja",
    "KANNADA": "kn",
    "KATAKANA": "ja",
    "KHMER": "km",
    "LAO": "lo",
    "MALAYALAM": "ml",
    "MYANMAR": "my",
    "ORIYA": "or",
    "SINHALA": "si",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
}
# The languages that share a script, of those that py3langid knows.
SHARED = {
    "ARABIC": ("ar", "fa", "ps", "sdh", "ug", "ur"),
    "BENGALI": ("as", "bn"),
    "CYRILLIC": ("ba", "be", "bg", "kk", "ky", "mk", "mn", "ru", "sr", "tg", "tt", "uk"),
    "DEVANAGARI": ("hi", "mr", "ne", "sa"),
    "ETHIOPIC": ("am",),
    "CJK": ("ja", "zh"),
}
NOT_LATIN = {*ONLY.values(), *(language for several in SHARED.values() for language in several)} - {"sr"}
# Dialects, old forms and what is no language, which would take part of the probability of another one.
LEFT_OUT = {"ary", "arz", "dz", "gom", "grc", "hbo", "wuu", "yue", "zxx"}
_IGNORED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+(?:\{[^{}]*\})*"  # LaTeX
    r"|https?://\S+|<\|[^|<>]*\|>|</?[A-Za-z][^<>\n]{0,60}>",  # addresses, special tokens and tags
    re.DOTALL,
)
_SYSTEM = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>)system.*?(?:<\|im_end\|>|<\|eot_id\|>)|<<SYS>>.*?<</SYS>>", re.DOTALL
)
_ROLE = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)\s*(?:user|assistant|model|tool)\b|\[/?INST\]"
)
_SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f\u0964\u06d4\n]+")
SURE = 0.95  # probability among the languages of a script above which a sentence is in another one
LONG = 4  # words from which a sentence is judged alone, and else with the rest of the text
HAN = 6  # Han letters without kana that make a sentence Chinese


def judge(text: str, answer: str | None, info: dict[str, Any], language: str | None = None) -> float | None:
    """Return the share of words in ``language``; None = that of ``info["prompt"]``.

    0.0 for a text without words, None where the prompt's language cannot be told.
    """
    target = language or find_language(find_question(info["prompt"]))
    return None if target is None else measure_share(text, target)


def find_question(prompt: str) -> str:
    """Return a rendered prompt without its system message and the names of roles, as ChatML and Llama write them."""
    return _ROLE.sub(" ", _SYSTEM.sub(" ", prompt))


def measure_share(text: str, language: str) -> float:
    """Return the share of words in a language, in [0, 1]; 0.0 without words.

    Code, LaTeX, addresses, tags, digits and the names of variables, see ``drop_variables``, are no words.
    """
    scripts = find_scripts(language)
    text = unicodedata.normalize("NFKC", _IGNORED.sub(" ", text))
    sentences = [words for part in _SENTENCE.split(text) if (words := find_words(part))]
    if "LATIN" not in scripts:
        sentences = [drop_variables(words) for words in sentences]
    whole = [word for words in sentences for word in words]
    if not whole:
        return 0.0
    doubted = is_other(whole, language)
    right = 0
    for words in sentences:
        mine = sum(script in scripts for _, script in words)
        other = is_other(words, language) if mine >= LONG else doubted
        right += 0 if other else mine
    return right / len(whole)


def drop_variables(words: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the words of a sentence without single Latin letters, unless it has longer Latin words too."""
    if any(script == "LATIN" and len(word) > 1 for word, script in words):
        return words
    return [word for word in words if word[1] != "LATIN"]


def find_words(text: str) -> list[tuple[str, str]]:
    """Return the words of a text that have letters, each with the script of its first letter."""
    named = [(word, next(filter(None, map(name_script, word)), "")) for word in split_words(text)]
    return [(word, script) for word, script in named if script]


def find_scripts(language: str) -> set[str]:
    """Return the scripts that a language is written in."""
    scripts = {script for script, only in ONLY.items() if only == language}
    scripts |= {script for script, several in SHARED.items() if language in several}
    return scripts | ({"LATIN"} if not scripts or language == "sr" else set())


def find_language(text: str) -> str | None:
    """Return the language of a text, by the script of most of its words and by py3langid; None without words."""
    words = find_words(unicodedata.normalize("NFKC", _IGNORED.sub(" ", text)))
    counts = Counter(script for _, script in words)
    if {"HIRAGANA", "KATAKANA"} & set(counts):  # Japanese has Han too
        counts["HIRAGANA"] += counts.pop("CJK", 0) + counts.pop("KATAKANA", 0)
    if not counts:
        return None
    script = max(counts, key=lambda name: counts[name])
    if script in ONLY:
        return ONLY[script]
    if script == "CJK":
        return "zh"
    return next(iter(rank_languages(" ".join(word for word, its in words if its == script), script)))


def is_other(words: list[tuple[str, str]], language: str) -> bool:
    """Return whether those of the words that are in a script of ``language`` are surely in another language."""
    counts = Counter(script for _, script in words)
    if language in ("zh", "ja"):
        kana = counts["HIRAGANA"] + counts["KATAKANA"]
        return kana > 0 if language == "zh" else kana == 0 and counts["CJK"] >= HAN
    script = max(find_scripts(language), key=lambda name: counts[name])
    if script in ONLY or not counts[script]:
        return False
    ranks = rank_languages(" ".join(word for word, its in words if its == script), script)
    return 1 - ranks.get(language, 0.0) > SURE


def rank_languages(text: str, script: str) -> dict[str, float]:
    """Return the probability of each language that a script is used for, the most likely first."""
    written = SHARED.get(script)
    found = {
        language: float(share)
        for language, share in load_identifier().rank(text)
        if language not in LEFT_OUT and (language in written if written else language not in NOT_LATIN)
    }
    total = sum(found.values()) or 1.0
    return {language: share / total for language, share in found.items()}


def prepare() -> None:
    """Load the identifier."""
    load_identifier()


@lru_cache(maxsize=1)
def load_identifier() -> Any:
    """Return py3langid's identifier, which gives probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
