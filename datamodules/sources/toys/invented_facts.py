"""Invented facts, which no model can know unless it was taught them."""

import random
from zlib import crc32

from datamodules.sources.source import Row, Source
from modules.trainer.seeds import run_seed

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
NUM_NAMES = (len(CONSONANTS) * len(VOWELS)) ** 2
RELATIONS = ("boss", "food", "home", "wish")


class Facts(Source):
    """Makes facts such as ``home bazu`` with the answer ``kito``: a relation, a subject and an object of four letters
    each.

    Fact i depends on i alone: subject number i // 4, relation i % 4, and one of 10000 objects by a fixed hash. So a
    stage that gets facts 0 to 399 teaches those, and facts from 400 on are new to its model. Columns ``question``,
    ``answer``, ``relation``, and for tuning ``prompt`` (the question and ``mark``) with ``completion``.

    Args:
        num_facts: rows, >= 1, in the order of their numbers.
        first: number of the first fact, >= 0.
        mark: text after the question in ``prompt``.

    Raises:
        ValueError: an argument is out of range; there are 40000 facts.
    """

    def __init__(self, num_facts: int, first: int = 0, mark: str = "=") -> None:
        if num_facts < 1 or first < 0 or first + num_facts > NUM_NAMES * len(RELATIONS):
            raise ValueError(
                "num_facts must be at least 1, first at least 0 and both together at most "
                f"{NUM_NAMES * len(RELATIONS)}, got {num_facts} and {first}"
            )
        self.num_facts, self.first, self.mark = num_facts, first, mark

    def rows(self) -> list[Row]:
        """Return ``num_facts`` rows."""
        return [
            Row(make_fact(number, self.mark), f"facts#{number}", "facts", plain=True)
            for number in range(self.first, self.first + self.num_facts)
        ]


class FactDocuments(Facts):
    """Makes texts that tell facts, for a model to learn from as in pretraining. Column ``text``.

    A text has five lines of one relation, such as ``home bazu=kito``. Each pass tells every fact once, in another order
    and with other facts beside it.

    Args:
        num_facts: facts to tell, a multiple of 20 (five lines, four relations).
        passes: times that each fact is told, >= 1.
        first: number of the first fact, a multiple of 4.
        seed: seed of the order; None = the run's.
        marks: characters that may stand between question and answer; each line draws one. A fact that is told in
            several ways is easier to ask for in another way (arXiv 2309.14316).

    Raises:
        ValueError: an argument is out of range.
    """

    LINES = 5

    def __init__(self, num_facts: int, passes: int, first: int = 0, seed: int | None = None, marks: str = "=") -> None:
        super().__init__(num_facts, first)
        if num_facts % (self.LINES * len(RELATIONS)) or first % len(RELATIONS) or passes < 1 or not marks:
            raise ValueError(
                f"num_facts must be a multiple of {self.LINES * len(RELATIONS)}, first of {len(RELATIONS)}, and passes "
                f"at least 1, got {num_facts}, {first} and {passes}"
            )
        self.passes, self.seed, self.marks = passes, run_seed(seed), marks

    def rows(self) -> list[Row]:
        """Return ``passes`` x ``num_facts`` / 5 rows."""
        facts = [row.columns for row in super().rows()]
        texts = []
        for number in range(self.passes):
            for relation in RELATIONS:
                draw = random.Random(f"{self.seed} {number} {relation}")
                told = [fact for fact in facts if fact["relation"] == relation]
                draw.shuffle(told)
                lines = [fact["question"] + self._mark(draw) + fact["answer"] + "\n" for fact in told]
                texts += ["".join(lines[start : start + self.LINES]) for start in range(0, len(lines), self.LINES)]
        return [Row({"text": text}, f"fact-documents#{index}", "fact-documents") for index, text in enumerate(texts)]

    def _mark(self, draw: random.Random) -> str:
        return self.marks if len(self.marks) == 1 else draw.choice(self.marks)


def make_fact(number: int, mark: str) -> dict[str, str]:
    """Return the columns of one fact."""
    subject, relation = make_name(number // len(RELATIONS) * 7919 % NUM_NAMES), RELATIONS[number % len(RELATIONS)]
    question, answer = f"{relation} {subject}", make_name(crc32(f"{relation} of {subject}".encode()) % NUM_NAMES)
    return {
        "question": question,
        "answer": answer,
        "relation": relation,
        "prompt": f"{question}{mark}",
        "completion": answer,
    }


def make_name(number: int) -> str:
    """Return a name: consonant, vowel, consonant, vowel. Each number below 10000 has another one."""
    first, second = divmod(number, len(CONSONANTS) * len(VOWELS))
    return "".join(CONSONANTS[half // len(VOWELS)] + VOWELS[half % len(VOWELS)] for half in (first, second))
