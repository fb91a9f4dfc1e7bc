"""Plain texts about numbers, to pretrain a small model on."""

import random
from itertools import islice, product

from datamodules.sources.source import Row, Source
from datamodules.sources.toys.addition import is_held_out
from modules.trainer.seeds import run_seed

PER_TEXT = 12


class NumberTexts(Source):
    """Makes texts of twelve items on one of two subjects. Column ``text``.

    - ``sums``: "12,34:640", with the sum written as in ``Addition``, least significant digit first. Only training pairs
      of ``Addition`` occur.
    - ``counting``: "07 10 13 16;", four numbers with equal steps.

    Args:
        num_texts: rows, >= 1.
        subject: ``sums`` or ``counting``, for all texts.
        seed: seed of the draw; None = the run's.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_texts: int, subject: str = "sums", seed: int | None = None) -> None:
        if num_texts < 1:
            raise ValueError(f"num_texts must be at least 1, got {num_texts}")
        if subject not in ("sums", "counting"):
            raise ValueError(f"subject must be sums or counting, got {subject!r}")
        self.num_texts, self.subject, self.seed = num_texts, subject, run_seed(seed)

    def rows(self) -> list[Row]:
        """Return ``num_texts`` rows."""
        draw = random.Random(f"{self.seed} {self.subject}")
        pairs = [(a, b) for a, b in product(range(100), repeat=2) if not is_held_out(a, b)]
        items = (
            (_sum(draw, pairs) if self.subject == "sums" else _count(draw)) for _ in range(self.num_texts * PER_TEXT)
        )
        texts = [" ".join(islice(items, PER_TEXT)) for _ in range(self.num_texts)]
        return [Row({"text": text}, f"{self.subject}#{index}", self.subject) for index, text in enumerate(texts)]


def _sum(draw: random.Random, pairs: list[tuple[int, int]]) -> str:
    a, b = draw.choice(pairs)
    return f"{a:02d},{b:02d}:{f'{a + b:03d}'[::-1]}"


def _count(draw: random.Random) -> str:
    start, step = draw.randrange(70), draw.randint(1, 9)
    return " ".join(f"{start + step * place:02d}" for place in range(4)) + ";"
