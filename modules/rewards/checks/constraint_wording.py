"""Where the library reads an IFBench instruction otherwise than its wording says: our own reading, or none.

The wording is that of IFBench (arXiv 2507.02833). ``REFUSED``, ``CLEANED`` and ``OWN`` hold what differs from the
package if-verifiable; the kinds in none of them are checked as it checks them.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from datetime import date
from itertools import groupby, pairwise
from typing import Any

# Kinds whose wording no rule can check, or that the library checks against another list or other positions.
REFUSED = {
    "format:thesis": "nothing says where a section begins, and if-verifiable looks at the first italics alone",
    "custom:reverse_newline": "any 52 sorted lines would do",
    "custom:word_reverse": "any words around 'eagle bald' would do",
    "custom:character_reverse": "any text with 'elgae dlab' would do",
    "custom:european_capitals_sort": "its list of capitals lacks Kyiv",
    "repeat:repeat_span": "it asks for indices of characters, and if-verifiable takes them for indices of words",
}

CONJUNCTIONS = {"for", "and", "nor", "but", "or", "yet", "so"}
NAMES = {
    "Emma", "Liam", "Sophia", "Jackson", "Olivia", "Noah", "Ava", "Lucas", "Isabella", "Mason", "Mia", "Ethan",
    "Charlotte", "Alexander", "Amelia", "Benjamin", "Harper", "Leo", "Zoe", "Daniel", "Chloe", "Samuel", "Lily",
    "Matthew", "Grace", "Owen", "Abigail", "Gabriel", "Ella", "Jacob", "Scarlett", "Nathan", "Victoria", "Elijah",
    "Layla", "Nicholas", "Audrey", "David", "Hannah", "Christopher", "Penelope", "Thomas", "Nora", "Andrew", "Aria",
    "Joseph", "Claire", "Ryan", "Stella", "Jonathan",
}  # fmt: skip
MARKS = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-"})
APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
PAIRS = {")": "(", "]": "[", "}": "{"}
GRADES = ["StudentID", "Subject", "Grade", "Semester", "Score"]
LABELS = ("My Answer:", "My Conclusion:", "Future Outlook:")
TEMPLATE = re.compile("(.+)".join(LABELS) + "(.+)", re.DOTALL)


def trim(text: str) -> str:
    """Return a text without blank lines before it and white space behind it; its first line keeps its indent."""
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def level_marks(text: str) -> str:
    """Return a text with straight quotes and with hyphens for dashes, as the library's checks expect them."""
    return text.translate(MARKS)


def read_benchmark_text(kind: str, text: str) -> str:
    """Return what the check of an IFBench kind gets of a text."""
    return text if kind in AS_IT_IS else CLEANED.get(kind, str)(level_marks(text))


def keep_words(text: str) -> str:
    """Return a text without what stands between spaces and has no letter or digit."""
    return re.sub(r"(?<!\S)[^\w\s]+(?!\S)", "", text)


def cut_words(text: str) -> list[str]:
    """Return the words in lower case, without the punctuation around them."""
    return [word for part in text.lower().split() if (word := part.strip(string.punctuation))]


def cut_sentences(text: str) -> list[str]:
    """Return the sentences as the library cuts them, without those that have no word."""
    from if_verifiable.ifbench.instructions_util import split_into_sentences

    return [sentence for sentence in split_into_sentences(text) if cut_words(sentence)]


def cut_lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def is_in_ratio(text: str, shares: dict[str, int]) -> bool:
    """Return whether the sentences that end in each mark are as many as some multiple of its share, at least one."""
    counts = [
        sum(sentence.endswith(mark) for sentence in cut_sentences(text)) / share for mark, share in shares.items()
    ]
    return counts[0] >= 1 and len(set(counts)) == 1


def measure_alliteration(sentence: str) -> int:
    """Return the most words in a row with one first letter."""
    return max((len(list(run)) for _, run in groupby(word[0] for word in cut_words(sentence))), default=0)


def measure_nesting(text: str) -> int:
    """Return how many pairs of brackets lie in each other at most; a bracket of another pair ends those around it."""
    waiting: list[tuple[str, int]] = []  # an open bracket, and the deepest closed pair in it
    deepest = 0
    for sign in text:
        if sign in "([{":
            waiting.append((sign, 0))
        elif sign in PAIRS and waiting and waiting[-1][0] == PAIRS[sign]:
            depth = waiting.pop()[1] + 1
            deepest = max(deepest, depth)
            if waiting:
                waiting[-1] = (waiting[-1][0], max(waiting[-1][1], depth))
        elif sign in PAIRS:
            waiting = []
    return deepest


def is_option(text: str, options: str) -> bool:
    """Return whether a text is one of the options, apart from its case and marks; letters need their marks."""
    listed = [
        option.strip()
        for option in re.split("/" if "/" in options else r"\bor\b" if re.search(r"\bor\b", options) else ",", options)
    ]
    if re.match(r"\W*a\W+b\W+c\b", options, re.IGNORECASE):
        return text.strip() in listed
    bare = string.punctuation + string.whitespace
    return text.strip(bare).lower() in [option.strip(bare).lower() for option in listed]


def ends_in_emoji(text: str) -> bool:
    """Return whether an emoji stands before or behind the mark at the end of each sentence."""
    import emoji
    from if_verifiable.ifbench.instructions_util import split_into_sentences

    pieces = [piece.strip(".!?\"') ") for piece in split_into_sentences(emoji.replace_emoji(text, "\0"))]
    pieces = [piece for piece in pieces if piece] + [""]
    return all(
        piece.endswith("\0") or following.startswith("\0")
        for piece, following in pairwise(pieces)
        if re.search(r"\w", piece)
    )


def has_equal_sentences(text: str) -> bool:
    """Return whether a text is three sentences of one length in which no word occurs twice."""
    sentences, words = cut_sentences(text), cut_words(text)
    return len(sentences) == 3 and len({len(one) for one in sentences}) == 1 and len(words) == len(set(words))


def is_japanese_at(text: str, step: int) -> bool:
    """Return whether each ``step``-th word has kana or Han, and no other letters or digits."""
    words = [re.sub(r"[\W_]", "", word) for word in keep_words(text).split()]
    return all(re.fullmatch("[\u3005\u3040-\u30ff\u3400-\u9fff]+", word) for word in words[step - 1 :: step])


def match_ends(text: str) -> bool:
    """Return whether each sentence begins with the last word of the one before it."""
    sentences = [cut_words(sentence) for sentence in cut_sentences(text)]
    return all(last[-1] == now[0] for last, now in pairwise(sentences))


def is_stairs(text: str) -> bool:
    """Return whether there are at least two lines, each indented more than the one above."""
    indents = [len(line) - len(line.lstrip(" ")) for line in cut_lines(text)]
    return len(indents) > 1 and all(above < below for above, below in pairwise(indents))


def explain_quotes(text: str) -> bool:
    """Return whether each second double quote is followed by a word before the next quote."""
    behind = text.split('"')[2::2]
    return text.count('"') % 2 == 0 and all(re.search(r"\w", part) for part in behind)


def has_sub_bullets(text: str) -> bool:
    """Return whether there are lines with a bullet of ``*``, each with a line of ``-`` before the next."""
    bullets = re.split(r"^\s*\*(?!\*)", text, flags=re.MULTILINE)[1:]
    return bool(bullets) and all(re.search(r"^\s*-", bullet, re.MULTILINE) for bullet in bullets)


def has_sentences_then_bullets(text: str) -> bool:
    """Return whether at least two sentences with a full stop stand before at least two bullets of ``*``."""
    before, *bullets = re.split(r"^\s*\*(?!\*)", text, flags=re.MULTILINE)
    return sum(sentence.endswith(".") for sentence in cut_sentences(before)) >= 2 and len(bullets) >= 2


def is_quiz(text: str) -> bool:
    """Return whether a text is four questions with five options each, ever longer, and nothing else."""
    blocks = re.split(r"^Question\b[ \d.):;]*", text.strip(), flags=re.MULTILINE)
    lengths = []
    for block in blocks[1:]:
        first, *options = re.split(r"^\s*(?=[A-Ea-e][.)]\s*\S)", block.strip(), flags=re.MULTILINE)
        if len(options) != 5 or any(len(cut_lines(option)) != 1 for option in options):
            return False
        lengths.append(len(" ".join(first.split())))
    return not blocks[0] and len(lengths) == 4 and all(last < now for last, now in pairwise(lengths))


def is_quoted_table(text: str, columns: list[str], rows: int) -> bool:
    """Return whether a text is a table with tabs whose fields are all in double quotes."""
    table = [[field.strip(" ") for field in line.split("\t")] for line in text.split("\n")]
    fields = [field for row in table for field in row]
    return (
        table[0] == [f'"{name}"' for name in columns]
        and len(table) == rows + 1
        and all(len(row) == len(columns) for row in table)
        and all(re.fullmatch('"(?:[^"]|"")*"', field) for field in fields)
    )


def is_date_list(text: str) -> bool:
    """Return whether a text is days of Napoleon's life, YYYY-MM-DD with commas between them."""
    for part in text.split(","):
        if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", part.strip()):
            return False
        try:
            day = date.fromisoformat(part.strip())
        except ValueError:
            return False
        if not 1769 <= day.year <= 1821:
            return False
    return True


def has_word_at(text: str, keyword: str, sentence: int, word: int) -> bool:
    """Return whether a word stands at a place; both are counted from 1."""
    sentences = cut_sentences(text)
    return len(sentences) >= sentence and cut_words(sentences[sentence - 1])[word - 1 : word] == [keyword.lower()]


def changes_first_word(text: str, request: str) -> bool:
    """Return whether only the first word of a request is another one."""
    said, asked = text.split(), request.split()
    return said[1:] == asked[1:] and said[:1] != asked[:1]


def fills_template(text: str) -> bool:
    """Return whether a text has the three labels in order, each once and with something behind it."""
    found = TEMPLATE.fullmatch(text) if all(text.count(label) == 1 for label in LABELS) else None
    return found is not None and all(part.strip() for part in found.groups())


# Kinds where a curly quote or a dash is not the straight quote or hyphen of the instruction.
AS_IT_IS = (
    "custom:csv_city",
    "custom:csv_special_character",
    "custom:csv_quotes",
    "format:list",
    "repeat:repeat_change",
)

# What the library's check gets in place of the text.
CLEANED: dict[str, Callable[[str], str]] = {
    "count:word_count_range": lambda text: APOSTROPHE.sub("", text),  # it takes one word for two
    "count:unique_word_count": keep_words,  # it counts a lonely dash
    "count:numbers": lambda text: re.sub(r"(?<=\d)-(?=\d)", " ", text),  # it takes 3-4 for one number
    "words:vowel": lambda text: unicodedata.normalize("NFD", text),  # it does not see those with accents
    "words:consonants": keep_words,
    "format:quotes": lambda text: APOSTROPHE.sub("", text),  # it takes don't for the beginning of a quote
    "count:pronouns": lambda text: APOSTROPHE.sub(" ", text),  # it does not see the pronoun of I'm
    "custom:sentence_alphabet": lambda text: text.replace('"', ""),  # it takes the quote for the first letter
}  # fmt: skip

# What checks a text in place of the library: text, settings -> whether the text follows.
OWN: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "ratio:sentence_type": lambda text, row: is_in_ratio(text, {".": 2, "?": 1}),
    "ratio:sentence_balance": lambda text, row: is_in_ratio(text, {".": 1, "?": 1, "!": 1}),
    "count:conjunctions": lambda text, row: len(CONJUNCTIONS & set(cut_words(text))) >= row["small_n"],
    "count:person_names": lambda text, row: len(NAMES & set(re.findall(r"[^\W\d_]+", text))) >= row["N"],
    "sentence:alliteration_increment": lambda text, row: all(
        last < now for last, now in pairwise(measure_alliteration(sentence) for sentence in cut_sentences(text))
    ),
    "format:parentheses": lambda text, row: measure_nesting(text) >= 5,
    "format:options": lambda text, row: is_option(text, row["options"]),
    "format:newline": lambda text, row: all(len(line.split()) == 1 for line in cut_lines(keep_words(text))),
    "format:emoji": lambda text, row: ends_in_emoji(text),
    "ratio:sentence_words": lambda text, row: has_equal_sentences(text),
    "count:words_japanese": lambda text, row: is_japanese_at(text, row["N"]),
    "words:last_first": lambda text, row: match_ends(text),
    "words:paragraph_last_first": lambda text, row: all(
        words[0] == words[-1] for line in cut_lines(text) if (words := cut_words(line))
    ),
    "format:line_indent": lambda text, row: is_stairs(text),
    "format:quote_unquote": lambda text, row: explain_quotes(text),
    "format:list": lambda text, row: sum(line.strip().startswith(row["sep"]) for line in cut_lines(text)) >= 2,
    "format:sub-bullets": lambda text, row: has_sub_bullets(text),
    "format:no_bullets_bullets": lambda text, row: has_sentences_then_bullets(text),
    "custom:mcq_count_length": lambda text, row: is_quiz(text),
    "custom:csv_quotes": lambda text, row: is_quoted_table(text, GRADES, 3),
    "custom:date_format_list": lambda text, row: is_date_list(text),
    "words:keywords_specific_position": lambda text, row: has_word_at(text, row["keyword"], row["n"], row["m"]),
    "repeat:repeat_change": lambda text, row: changes_first_word(text, row["prompt_to_repeat"]),
    "format:output_template": lambda text, row: fills_template(text),
}  # fmt: skip
