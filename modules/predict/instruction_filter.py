"""Which machine-written tasks are kept, one after another: the checks of Self-Instruct (arXiv 2212.10560, 2.2) as
Alpaca runs them.

Source: tatsu-lab/stanford_alpaca, generate_instruction.py. The outcome depends on the order in which tasks come, since
each is measured against all that were kept before it.
"""

import re
import string
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

FEWEST_WORDS, MOST_WORDS = 4, 150
BLACKLIST = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b", re.IGNORECASE
)  # what a model of text cannot see or do
REASONS = (
    "length",
    "blacklist",
    "program",
    "first_character",
    "no_output",
    "duplicate",
    "similar",
)  # in the order in which they are looked for


def words(text: str) -> list[str]:
    """``text`` -> lower-case words [n] without punctuation. On ASCII text those of the package rouge-score without
    stemming.
    """
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L F1 of words [n] and [m], in [0, 1]: 2 LCS / (n + m), with LCS their longest common subsequence; 0 where
    either is empty.

    Example: a b c d against a c d e: LCS 3, so precision, recall and F1 are 0.75. Raises ImportError without rapidfuzz.
    """
    if not first or not second:
        return 0.0
    return 2.0 * _rapidfuzz("distance").LCSseq.similarity(first, second) / (len(first) + len(second))


def objection(instruction: str, output: str) -> str | None:
    """Why a task is refused whatever else was kept: the first five of ``REASONS`` [5]; None = it is not. Both texts are
    stripped.
    """
    checks = {
        "length": not FEWEST_WORDS <= len(instruction.split()) <= MOST_WORDS,
        "blacklist": BLACKLIST.search(instruction) is not None,
        "program": instruction.startswith("Write a program"),  # it is unclear whether the program is to be run
        "first_character": instruction[:1] in string.punctuation or not instruction[:1].isascii(),
        "no_output": not output,
    }
    return next((reason for reason, refused in checks.items() if refused), None)


class InstructionPool:
    """The instructions that a new one must differ from: seeds and kept ones, as words.

    Args:
        instructions: what is there from the start.
        max_similarity: a new instruction with a greater ROUGE-L F1 to any of them is refused, [0, 1].

    Raises:
        ImportError: rapidfuzz is not installed.
        ValueError: ``max_similarity`` out of range.
    """

    def __init__(self, instructions: Iterable[str], max_similarity: float = 0.7) -> None:
        if not 0 <= max_similarity <= 1:
            raise ValueError(f"max_similarity must lie in [0, 1], got {max_similarity}")
        self._process, self._scorer = _rapidfuzz("process"), _rapidfuzz("distance").Indel.normalized_similarity
        self.instructions = list(instructions)
        self.max_similarity = max_similarity
        self._words = [words(instruction) for instruction in self.instructions]

    def add(self, instruction: str) -> None:
        """Keep an instruction, a text: later ones are measured against it too; the pool [n] becomes [n + 1]."""
        self.instructions.append(instruction)
        self._words.append(words(instruction))

    def nearest(self, instruction: str) -> tuple[str, float]:
        """The most similar of the n instructions, the earliest of several, and its ROUGE-L F1 in [0, 1]; "" and 0 in an
        empty pool.

        Rapidfuzz's similarity by insertions and deletions is 1 - (n + m - 2 LCS) / (n + m), so that F1; it looks for no
        common subsequence where the lengths alone keep 2 min(n, m) / (n + m) below the best so far.
        """
        mine = words(instruction)
        found = self._process.extractOne(mine, self._words, scorer=self._scorer) if mine else None
        return ("", 0.0) if found is None else (self.instructions[found[2]], rouge_l(mine, found[0]))

    def judge(self, instruction: str, output: str) -> tuple[str | None, str, float]:
        """One of ``REASONS``, None = to be kept; then the most similar instruction and its ROUGE-L F1 in [0, 1], "" and
        0 if unasked.
        """
        reason = objection(instruction, output)
        if reason is not None:
            return reason, "", 0.0
        similar, score = self.nearest(instruction)
        reason = "duplicate" if score == 1 else "similar" if score > self.max_similarity else None
        return reason, similar, score


def _rapidfuzz(part: str) -> ModuleType:
    """Imported late. ImportError names the extra that brings it."""
    try:
        return import_module(f"rapidfuzz.{part}")
    except ModuleNotFoundError as error:
        raise ImportError("rapidfuzz is not installed: pip install 'lightning-align[instruct]'") from error
