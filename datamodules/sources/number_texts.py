"""Plain texts about numbers, for a small model to be pretrained on."""

import random
from itertools import product

from datamodules.sources.addition import is_held_out
from datamodules.sources.base import Row, Source

SENTENCES = ("{a} and {b} make {sum}.", "adding {b} to {a} gives {sum}.", "the sum of {a} and {b} is {sum}.")
PER_TEXT = 6


class NumberTexts(Source):
    """Texts of six sentences, column ``text``, on one of two subjects.

    ``sums``: "12 and 34 make 640." in three wordings, the sum written as in ``Addition``, least significant digit first, and of its training
    pairs alone; ``counting``: "from 07 by 3: 07 10 13 16 19.".

    Args:
        num_texts: rows, >= 1.
        subject: of all texts.
        seed: of the draw.
    """

    def __init__(self, num_texts: int, subject: str = "sums", seed: int = 0) -> None:
        if num_texts < 1:
            raise ValueError(f"num_texts must be at least 1, got {num_texts}")
        if subject not in ("sums", "counting"):
            raise ValueError(f"subject must be sums or counting, got {subject!r}")
        self.num_texts, self.subject, self.seed = num_texts, subject, seed

    def rows(self) -> list[Row]:
        """``num_texts`` rows."""
        draw = random.Random(f"{self.seed} {self.subject}")
        pairs = [pair for pair in product(range(100), repeat=2) if not is_held_out(*pair)]
        sentence = (lambda: _sum(draw, pairs)) if self.subject == "sums" else (lambda: _count(draw))
        texts = [" ".join(sentence() for _ in range(PER_TEXT)) for _ in range(self.num_texts)]
        return [Row({"text": text}, f"{self.subject}#{index}", self.subject) for index, text in enumerate(texts)]


def _sum(draw: random.Random, pairs: list[tuple[int, int]]) -> str:
    a, b = draw.choice(pairs)
    return draw.choice(SENTENCES).format(a=f"{a:02d}", b=f"{b:02d}", sum=f"{a + b:03d}"[::-1])


def _count(draw: random.Random) -> str:
    start, step = draw.randrange(60), draw.randint(1, 9)
    return f"from {start:02d} by {step}: {' '.join(f'{start + step * place:02d}' for place in range(5))}."
