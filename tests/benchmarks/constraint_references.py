"""Strict readers of IFBench's instructions (arXiv 2507.02833, appendix), written from the wording of each.

Each takes a text and the settings of the row and returns whether the text follows the instruction.
"""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Settings = dict[str, Any]

CONJUNCTIONS = {"for", "and", "nor", "but", "or", "yet", "so"}
NAMES = {
    "Emma", "Liam", "Sophia", "Jackson", "Olivia", "Noah", "Ava", "Lucas", "Isabella", "Mason", "Mia", "Ethan",
    "Charlotte", "Alexander", "Amelia", "Benjamin", "Harper", "Leo", "Zoe", "Daniel", "Chloe", "Samuel", "Lily",
    "Matthew", "Grace", "Owen", "Abigail", "Gabriel", "Ella", "Jacob", "Scarlett", "Nathan", "Victoria", "Elijah",
    "Layla", "Nicholas", "Audrey", "David", "Hannah", "Christopher", "Penelope", "Thomas", "Nora", "Andrew", "Aria",
    "Joseph", "Claire", "Ryan", "Stella", "Jonathan",
}  # fmt: skip
PRONOUNS = {
    "i", "me", "my", "mine", "myself", "you", "your", "yours", "yourself", "he", "him", "his", "himself", "she",
    "her", "hers", "herself", "it", "its", "itself", "we", "us", "our", "ours", "ourselves", "they", "them",
    "their", "theirs", "themselves",
}  # fmt: skip
# Words of the cases with their numbers of syllables.
SYLLABLES = {
    "cat": 1, "dog": 1, "tree": 1, "house": 1, "bird": 1, "fish": 1, "stone": 1, "water": 2, "river": 2, "garden": 2,
    "window": 2, "summer": 2, "table": 2, "banana": 3, "elephant": 3, "animal": 3, "tomato": 3, "dictionary": 4,
    "watermelon": 4,
}  # fmt: skip


def list_words(text: str) -> list[str]:
    """Return the words of a text without the punctuation around them, in lower case."""
    return [word.lower() for word in re.findall(r"\w+(?:['\u2019-]\w+)*", text)]


def list_sentences(text: str) -> list[str]:
    """Return the sentences of a text with their marks; what follows the last mark is one too."""
    return [
        sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]*", text.replace("Dr.", "Dr")) if sentence.strip()
    ]


def make_straight(text: str) -> str:
    """Return a text with straight quotes."""
    for curly, straight in zip("\u201c\u201d\u2018\u2019", "\"\"''", strict=True):
        text = text.replace(curly, straight)
    return text


def list_lines(text: str) -> list[str]:
    """Return the lines of a text that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def count_marks(text: str) -> list[int]:
    """Return how many sentences end in a full stop, a question mark and an exclamation mark."""
    return [sum(sentence.endswith(mark) for sentence in list_sentences(text)) for mark in ".?!"]


def list_grams(text: str) -> set[str]:
    """Return the trigrams of letters of a text."""
    return {text[start : start + 3] for start in range(len(text) - 2)}


def find_vowels(text: str) -> set[str]:
    """Return the vowels of a text, with their accents taken off."""
    return set(unicodedata.normalize("NFD", text.lower())) & set("aeiou")


def count_alliteration(sentence: str) -> int:
    """Return the length of the longest run of words with the same first letter."""
    words, longest, run = list_words(sentence), 0, 0
    for number, word in enumerate(words):
        run = run + 1 if number and word[0] == words[number - 1][0] else 1
        longest = max(longest, run)
    return longest


def measure_depth(text: str) -> int:
    """Return how deep pairs of brackets are nested: how often innermost pairs can be taken away."""
    brackets = re.sub(r"[^()\[\]{}]", "", text)
    for depth in range(len(brackets) + 1):
        rest = re.sub(r"\(\)|\[\]|\{\}", "", brackets)
        if rest == brackets:
            return depth
        brackets = rest
    return 0


def measure_quotes(text: str) -> int:
    """Return how deep quotes are nested that alternate between the two kinds; -1 if they do not close."""
    waiting: list[str] = []
    deepest = 0
    for sign in re.sub(r"(?<=\w)'(?=\w)", "", make_straight(text)):
        if sign in "\"'":
            if waiting and waiting[-1] == sign:
                waiting.pop()
            else:
                waiting.append(sign)
                deepest = max(deepest, len(waiting))
    return -1 if waiting else deepest


def is_prime(number: int) -> bool:
    """Return whether a number is prime."""
    return number > 1 and all(number % other for other in range(2, number))


def is_emoji(sign: str) -> bool:
    """Return whether a sign is one of the emoji that the cases use."""
    return 0x1F300 <= ord(sign) <= 0x1FAFF or sign in "\u2764\u2728"


def ends_with_emoji(text: str) -> bool:
    """Return whether an emoji stands at the end of every sentence, before or behind its mark."""
    rest = re.sub(r"[\ufe0f\u200d]", "", text).strip()
    parts = re.findall(r"[^.!?]+[.!?]*", rest)
    for number, part in enumerate(parts):
        words = part.rstrip(".!? ")
        following = parts[number + 1].lstrip()[:1] if number + 1 < len(parts) else ""
        before = bool(words) and is_emoji(words[-1])
        if not before and not (following and is_emoji(following)):
            return False
    return True


def are_sentences_equal(text: str) -> bool:
    """Return whether a text is three sentences with the same number of characters and no word twice."""
    sentences, words = list_sentences(text), list_words(text)
    return len(sentences) == 3 and len({len(one) for one in sentences}) == 1 and len(set(words)) == len(words)


def is_japanese(word: str) -> bool:
    """Return whether a word is of kana or Han alone."""
    return all("\u3040" <= sign <= "\u30ff" or "\u4e00" <= sign <= "\u9fff" for sign in word)


def climbs_stairs(text: str) -> bool:
    """Return whether each line is indented further than the line before it."""
    indents = [len(line) - len(line.lstrip(" ")) for line in list_lines(text)]
    return len(indents) > 1 and all(last < now for last, now in pairwise(indents))


def explains_quotes(text: str) -> bool:
    """Return whether words without quotes follow each quoted phrase before the next one."""
    parts = make_straight(text).split('"')
    return len(parts) % 2 == 1 and all(list_words(part) for part in parts[2::2])


def nests_bullets(text: str) -> bool:
    """Return whether there are bullets of ``*``, each with a line of ``-`` below it."""
    marks = [line.strip()[0] for line in list_lines(text) if line.strip()[0] in "*-"]
    runs = re.findall(r"\*-*", "".join(marks))
    return bool(runs) and "".join(marks).startswith("*") and all("-" in run for run in runs)


def has_sentences_and_bullets(text: str) -> bool:
    """Return whether two sentences with full stops stand before two bullets of ``*``."""
    first, *bullets = re.split(r"^[ \t]*\*[ \t]+", text, flags=re.MULTILINE)
    return count_marks(first)[0] >= 2 and len(bullets) >= 2


def list_questions(text: str) -> list[str]:
    """Return the blocks that begin with the label Question."""
    return re.split(r"^(?=Question)", text.strip(), flags=re.MULTILINE)


def asks_questions(text: str) -> bool:
    """Return whether a text is four questions of five options, each question longer than the one before."""
    first, *questions = list_questions(text)
    lengths = [len(block.split("\n")[0].lstrip("Question 1234:.")) for block in questions]
    options = [len(re.findall(r"^[A-Z]\)", block, re.MULTILINE)) for block in questions]
    lines = [len(list_lines(block)) for block in questions]
    return (
        not first
        and options == [5] * 4
        and lines == [6] * 4  # a question and its options, no explanation
        and all(last < now for last, now in pairwise(lengths))
    )


def read_table(text: str, delimiter: str) -> list[list[str]]:
    """Return the rows of a table."""
    return [row for row in csv.reader(io.StringIO(text.strip()), delimiter=delimiter) if row]


def is_table(text: str, delimiter: str, columns: list[str], rows: int) -> bool:
    """Return whether a text is a table of these columns with so many rows below them."""
    table = read_table(text, delimiter)
    return table[:1] == [columns] and len(table) == rows + 1 and all(len(row) == len(columns) for row in table)


def lists_dates(text: str) -> bool:
    """Return whether a text is nothing but dates YYYY-MM-DD separated by commas."""
    dates = [part.strip() for part in text.split(",")]
    return all(
        re.fullmatch(r"(17[6-9][0-9]|18[0-9]{2})-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])", date) for date in dates
    )


def holds_keywords(text: str, settings: Settings) -> bool:
    """Return whether the five keywords stand in a text once, twice, three, five and seven times."""
    counts = Counter(list_words(text))
    wanted = dict(zip(("keyword1", "keyword2", "keyword3", "keyword4", "keyword5"), (1, 2, 3, 5, 7), strict=True))
    return all(counts[settings[name].lower()] == count for name, count in wanted.items())


def places_keyword(text: str, settings: Settings) -> bool:
    """Return whether the keyword is the m-th word of the n-th sentence."""
    sentences = list_sentences(text)
    words = list_words(sentences[settings["n"] - 1]) if len(sentences) >= settings["n"] else []
    return len(words) >= settings["m"] and words[settings["m"] - 1] == settings["keyword"]


def repeats_changed(text: str, settings: Settings) -> bool:
    """Return whether a text is the request with its first word changed and nothing else."""
    said, asked = text.split(), settings["prompt_to_repeat"].split()
    return said[1:] == asked[1:] and said[:1] != asked[:1] and len(said) == len(asked)


def follows_template(text: str, settings: Settings) -> bool:
    """Return whether a text has the three labels in their order, each once and with something behind it."""
    labels = ("My Answer:", "My Conclusion:", "Future Outlook:")
    form = r"\s*" + r"\s*".join(rf"{label}\s*\S(?s:.*?)" for label in labels) + r"\s*"
    return re.fullmatch(form, text) is not None and all(text.count(label) == 1 for label in labels)


REFERENCES: dict[str, Callable[[str, Settings], bool]] = {
    "count:word_count_range": lambda text, row: row["min_words"] <= len(list_words(text)) <= row["max_words"],
    "count:unique_word_count": lambda text, row: len(set(list_words(text))) >= row["N"],
    "ratio:sentence_type": lambda text, row: 0 < count_marks(text)[0] == 2 * count_marks(text)[1],
    "ratio:sentence_balance": lambda text, row: len(set(count_marks(text))) == 1 and any(count_marks(text)),
    "count:conjunctions": lambda text, row: len(CONJUNCTIONS & set(list_words(text))) >= row["small_n"],
    "count:person_names": lambda text, row: len(NAMES & set(re.findall(r"\w+", text))) >= row["N"],
    "ratio:overlap": lambda text, row: (
        abs(100 * len(list_grams(text) & list_grams(row["reference_text"])) / max(len(list_grams(text)), 1) - row["percentage"]) <= 2
    ),
    "count:numbers": lambda text, row: len(re.findall(r"\d+(?:[.,]\d+)*", text)) == row["N"],
    "words:alphabet": lambda text, row: all((ord(now[0]) - ord(last[0])) % 26 == 1 for last, now in pairwise(list_words(text))),
    "words:vowel": lambda text, row: len(find_vowels(text)) <= 3 and "\n" not in text.strip(),
    "words:consonants": lambda text, row: all(re.search("[b-df-hj-np-tv-z]{2}", word) for word in list_words(text)),
    "sentence:alliteration_increment": lambda text, row: all(
        last < now for last, now in pairwise(map(count_alliteration, list_sentences(text)))
    ),
    "words:palindrome": lambda text, row: sum(len(word) > 4 and word == word[::-1] for word in list_words(text)) >= 10,
    "count:punctuation": lambda text, row: (
        any(joined in text for joined in ("?!", "!?", "\u203d")) and set(".,;:?!") <= set(re.sub(r"\?!|!\?", "", text, count=1))
    ),
    "format:parentheses": lambda text, row: measure_depth(text) >= 5,
    "format:quotes": lambda text, row: measure_quotes(text) >= 3,
    "words:prime_lengths": lambda text, row: all(is_prime(len(word)) for word in list_words(text)),
    "format:options": lambda text, row: make_straight(text).strip(" .\n").lower() in [
        option.strip().lower() for option in re.split(r"/|, | or ", row["options"])
    ],
    "format:newline": lambda text, row: all(len(line.split()) == 1 for line in list_lines(text)) and len(list_words(text)) > 1,
    "format:emoji": lambda text, row: ends_with_emoji(text),
    "ratio:sentence_words": lambda text, row: are_sentences_equal(text),
    "count:words_japanese": lambda text, row: (
        all(map(is_japanese, list_words(text)[row["N"] - 1 :: row["N"]]))
    ),
    "words:repeats": lambda text, row: max(Counter(list_words(text)).values()) <= row["small_n"],
    "sentence:keyword": lambda text, row: row["word"] in list_words(" ".join(list_sentences(text)[row["N"] - 1 : row["N"]])),
    "count:pronouns": lambda text, row: sum(word in PRONOUNS for word in re.findall("[a-z]+", text.lower())) >= row["N"],
    "words:odd_even_syllables": lambda text, row: all(
        (SYLLABLES[last] + SYLLABLES[now]) % 2 for last, now in pairwise(list_words(text))
    ),
    "words:last_first": lambda text, row: all(
        list_words(last)[-1] == list_words(now)[0] for last, now in pairwise(list_sentences(text))
    ),
    "words:paragraph_last_first": lambda text, row: all(
        list_words(line)[0] == list_words(line)[-1] for line in list_lines(text)
    ),
    "sentence:increment": lambda text, row: all(
        len(list_words(now)) - len(list_words(last)) == row["small_n"] for last, now in pairwise(list_sentences(text))
    ),
    "words:no_consecutive": lambda text, row: all(last[0] != now[0] for last, now in pairwise(list_words(text))),
    "format:line_indent": lambda text, row: climbs_stairs(text),
    "format:quote_unquote": lambda text, row: explains_quotes(text),
    "format:list": lambda text, row: (
        sum(line.strip().startswith(row["sep"]) for line in list_lines(text)) >= 2
        and not re.search(r"^\s*([*\u2022-]|\d+\.)\s", text, re.MULTILINE)
    ),
    "format:sub-bullets": lambda text, row: nests_bullets(text),
    "format:no_bullets_bullets": lambda text, row: has_sentences_and_bullets(text),
    "custom:multiples": lambda text, row: re.split(r"[,\s]+", text.strip(" \n.")) == ["14", "21", "28", "35", "42", "49"],
    "custom:mcq_count_length": lambda text, row: asks_questions(text),
    "custom:sentence_alphabet": lambda text, row: "".join(
        list_words(sentence)[0][0] for sentence in list_sentences(text)
    ) == "abcdefghijklmnopqrstuvwxyz",
    "custom:csv_city": lambda text, row: is_table(text, ",", ["ID", "Country", "City", "Year", "Count"], 7),
    "custom:csv_special_character": lambda text, row: (
        is_table(text, ",", ["ProductID", "Category", "Brand", "Price", "Stock"], 14)
        and re.search(r'(^|,)"[^"\n]*[^\w\s"][^"\n]*"(,|$)', text, re.MULTILINE) is not None
    ),
    "custom:csv_quotes": lambda text, row: (
        is_table(text, "\t", ["StudentID", "Subject", "Grade", "Semester", "Score"], 3)
        and all(re.fullmatch('"[^"]*"', field) for line in list_lines(text) for field in line.split("\t"))
    ),
    "custom:date_format_list": lambda text, row: lists_dates(text),
    "count:keywords_multiple": holds_keywords,
    "words:keywords_specific_position": places_keyword,
    "repeat:repeat_change": repeats_changed,
    "repeat:repeat_simple": lambda text, row: text.strip() == "Only output this sentence here, ignore all other requests.",
    "format:output_template": follows_template,
    "format:no_whitespace": lambda text, row: not any(sign.isspace() for sign in text.strip()),
}  # fmt: skip
