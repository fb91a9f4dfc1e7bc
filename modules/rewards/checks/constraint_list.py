"""Checks whether an answer follows the constraints of its row: the kinds of IFEval and IFBench."""

import inspect
import logging
from functools import lru_cache
from typing import Any

from .constraint_wording import OWN, REFUSED, read_benchmark_text, trim

# Kinds that read files of NLTK, which are downloaded apart from the library: kind -> the files.
NEEDS_FILES = {
    "length_constraints:number_sentences": ("tokenizers/punkt_tab",),
    "change_case:capital_word_frequency": ("tokenizers/punkt_tab",),
    "words:words_position": ("tokenizers/punkt_tab",),
    "format:title_case": ("tokenizers/punkt_tab",),
    "words:start_verb": ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng"),
    "ratio:stop_words": ("corpora/stopwords",),
}

CAPITALS, LOWERCASE = "change_case:english_capital", "change_case:english_lowercase"


def judge(text: str, answer: str | None, info: dict[str, Any], every: bool) -> float | None:
    """Return the share of constraints that a text follows, or with ``every`` 1.0 if it follows all and else 0.0.

    None without constraints, and where one of them is of an unknown kind, lacks what it needs, or cannot be checked. A
    constraint that takes all memory raises MemoryError, which the worker counts.
    """
    kinds, settings = info.get("instruction_id_list"), info.get("kwargs")
    if not kinds or not settings:
        return None
    if not text.strip():  # an empty answer has no comma and no capital letter, and follows nothing
        return 0.0
    known = load_kinds()
    followed = []
    text = trim(text)
    for kind, given in zip(kinds, settings, strict=True):
        if kind not in known or kind in REFUSED or not has_files(kind):
            return None
        constraint = known[kind](kind)
        given = {name: value for name, value in given.items() if value is not None}
        if list_settings(constraint) - set(given):  # the library would draw them at random
            return None
        try:
            constraint.build_description(**given)
            if kind == CAPITALS:  # langdetect takes English in capitals for other languages
                constraint = known[LOWERCASE](LOWERCASE)
                constraint.build_description()
                fine = text.isupper() and constraint.check_following(text.lower())
            elif kind in OWN:
                fine = OWN[kind](read_benchmark_text(kind, text), given)
            elif "ifbench" in type(constraint).__module__:
                fine = constraint.check_following(read_benchmark_text(kind, text))
            else:
                fine = constraint.check_following(text)
            followed.append(bool(fine))
        except MemoryError:
            raise
        except Exception:
            return None
    return float(all(followed)) if every else sum(followed) / len(followed)


def list_settings(constraint: Any) -> set[str]:
    """Return the names of the settings that a constraint must be given."""
    parameters = inspect.signature(constraint.build_description).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def has_files(kind: str) -> bool:
    """Return whether the files that a kind reads are on this machine."""
    import nltk

    try:
        for file in NEEDS_FILES.get(kind, ()):
            nltk.data.find(file)
    except LookupError:
        return False
    return True


def prepare() -> None:
    """Load the library, without its messages on texts that have no language."""
    logging.disable(logging.CRITICAL)
    load_kinds()


@lru_cache(maxsize=1)
def load_kinds() -> dict[str, Any]:
    """Return the classes of all kinds of constraints by their ids; nothing is downloaded."""
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # it draws at random
    download, nltk.download = nltk.download, lambda *_, **__: False  # IFBench's module calls it when it is imported
    try:
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL
    finally:
        nltk.download = download
    return {**IFBENCH, **IFEVAL}
