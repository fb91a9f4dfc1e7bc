"""Decides which machine-written tasks are kept, with the checks of Self-Instruct (arXiv 2212.10560, 2.2) as in Alpaca.

Source: tatsu-lab/stanford_alpaca, generate_instruction.py. Each task is compared with all tasks kept before it, so the
result depends on their order.
"""

import re
import string
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

FEWEST_WORDS, MOST_WORDS = 4, 150
# What a language model cannot see or do.
BLACKLIST = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b", re.IGNORECASE
)
# Reasons to refuse a task, in the order of the checks.
REASONS = ("length", "blacklist", "program", "first_character", "no_output", "duplicate", "similar")


def split_plain_words(text: str) -> list[str]:
    """Split ``text`` into lower-case words without punctuation.

    On ASCII text these are the words of the package rouge-score without stemming.
    """
    return re.findall(r"[^\W_]+", text.lower())


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the ROUGE-L F1 of two lists of n and m words, in [0, 1]; 0 if either is empty.

    It is 2 LCS / (n + m), where LCS is the length of the longest common subsequence.

    Raises:
        ImportError: rapidfuzz is not installed.

    Example:
        a b c d and a c d e have LCS 3, so precision, recall and F1 are 0.75.
    """
    if not first or not second:
        return 0.0
    return 2.0 * _rapidfuzz("distance").LCSseq.similarity(first, second) / (len(first) + len(second))


def find_objection(instruction: str, output: str) -> str | None:
    """Return why a task is refused whatever else was kept, one of the first five ``REASONS``; None = it is not.

    Args:
        instruction: what the task asks, stripped.
        output: the answer to it, stripped.
    """
    checks = {
        "length": not FEWEST_WORDS <= len(instruction.split()) <= MOST_WORDS,
        "blacklist": BLACKLIST.search(instruction) is not None,
        "program": instruction.startswith("Write a program"),  # unclear: is the program to be run?
        "first_character": instruction[:1] in string.punctuation or not instruction[:1].isascii(),
        "no_output": not output,
    }
    return next((reason for reason, refused in checks.items() if refused), None)


class InstructionPool:
    """The instructions that a new one must differ from: the seeds and those already kept.

    Args:
        instructions: the instructions at the start.
        max_similarity: [0, 1]; a new instruction is refused if its ROUGE-L F1 to any of them is greater.

    Raises:
        ImportError: rapidfuzz is not installed.
        ValueError: ``max_similarity`` is out of range.
    """

    def __init__(self, instructions: Iterable[str], max_similarity: float = 0.7) -> None:
        if not 0 <= max_similarity <= 1:
            raise ValueError(f"max_similarity must lie in [0, 1], got {max_similarity}")
        self._process, self._scorer = _rapidfuzz("process"), _rapidfuzz("distance").Indel.normalized_similarity
        self.instructions = list(instructions)
        self.max_similarity = max_similarity
        self._words = [split_plain_words(instruction) for instruction in self.instructions]

    def add(self, instruction: str) -> None:
        """Add an instruction to the pool; later ones are compared with it too."""
        self.instructions.append(instruction)
        self._words.append(split_plain_words(instruction))

    def nearest(self, instruction: str) -> tuple[str, float]:
        """Return the most similar instruction, the earliest of equals, and its ROUGE-L F1 in [0, 1]; ("", 0) in an
        empty pool.

        Rapidfuzz's normalised similarity by insertions and deletions, 1 - (n + m - 2 LCS) / (n + m), equals this F1. It
        skips an instruction whose length alone keeps the bound 2 min(n, m) / (n + m) below the best similarity so far.
        """
        mine = split_plain_words(instruction)
        found = self._process.extractOne(mine, self._words, scorer=self._scorer) if mine else None
        return ("", 0.0) if found is None else (self.instructions[found[2]], rouge_l(mine, found[0]))

    def judge(self, instruction: str, output: str) -> tuple[str | None, str, float]:
        """Decide whether a new task is kept.

        Returns:
            one of ``REASONS``, or None = keep it; then the most similar instruction and its ROUGE-L F1 in [0, 1], or ""
            and 0 if the task was refused before the comparison.
        """
        reason = find_objection(instruction, output)
        if reason is not None:
            return reason, "", 0.0
        similar, score = self.nearest(instruction)
        reason = "duplicate" if score == 1 else "similar" if score > self.max_similarity else None
        return reason, similar, score


def _rapidfuzz(part: str) -> ModuleType:
    """Import a part of rapidfuzz only when it is needed.

    Raises:
        ImportError: rapidfuzz is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(f"rapidfuzz.{part}")
    except ModuleNotFoundError as error:
        raise ImportError("rapidfuzz is not installed: pip install 'lightning-align[instruct]'") from error
