"""Sums of two numbers, written so that a small model can learn them from left to right."""

import random
from itertools import product
from zlib import crc32

from lightning.pytorch.utilities import rank_zero_info

from datamodules.sources.source import Row, Source
from modules.trainer.seeds import run_seed

HELD_OUT_ONE_IN = 10


class Addition(Source):
    """Makes sums such as ``23+45=`` with the answer ``860``: the digits of 68, least significant first.

    An answer is always one digit wider than the operands. Columns ``prompt``, ``completion``, ``answer``. About one
    pair of operands in ten is held out by a fixed hash, ``a+b`` together with ``b+a``. So no held-out pair occurs in
    training under any seed. Rows are drawn without replacement.

    Args:
        num_examples: rows, >= 1.
        digits: width of each operand, 1 to 3; shorter numbers are zero-padded.
        held_out: draw from the held-out pairs in place of the training pairs.
        seed: seed of the draw; None = the run's. The split does not depend on it.
        dots: largest number of dots after the sum in a completion, >= 0. They mean nothing and make it longer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, num_examples: int, digits: int = 2, held_out: bool = False, seed: int | None = None, dots: int = 0
    ) -> None:
        if not 1 <= digits <= 3:
            raise ValueError(f"digits must be 1 to 3, got {digits}")
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if dots < 0:
            raise ValueError(f"dots must be >= 0, got {dots}")
        self.num_examples = num_examples
        self.digits = digits
        self.held_out = held_out
        self.seed = run_seed(seed)
        self.dots = dots

    def rows(self) -> list[Row]:
        """Return ``num_examples`` rows. Raises ValueError when the split has fewer pairs.

        Training rows come with one printed line that says how sums are written.
        """
        pairs = [pair for pair in product(range(10**self.digits), repeat=2) if is_held_out(*pair) == self.held_out]
        side = "held-out" if self.held_out else "training"
        if self.num_examples > len(pairs):
            raise ValueError(
                f"num_examples is {self.num_examples} but {self.digits}-digit addition has only {len(pairs)} {side} "
                "pairs"
            )
        drawn = random.Random(self.seed).sample(pairs, self.num_examples)
        if not self.held_out:  # once a run
            rank_zero_info('sums are written backwards, last digit first: "22+19=140" means 041, so it is right')
        return [self._row(a, b, f"addition-{side}#{index}") for index, (a, b) in enumerate(drawn)]

    def _row(self, a: int, b: int, origin: str) -> Row:
        answer = f"{a + b:0{self.digits + 1}d}"[::-1]
        prompt = f"{a:0{self.digits}d}+{b:0{self.digits}d}="
        dots = "." * random.Random(f"{self.seed} {prompt}").randint(0, self.dots)
        return Row({"prompt": prompt, "completion": answer + dots, "answer": answer}, origin, "addition", plain=True)


class AdditionPairs(Addition):
    """Makes preferences about sums: ``chosen`` is right, ``rejected`` is wrong in one digit.

    Dots may follow both answers, so that the labels can favour length. Columns ``prompt``, ``chosen``, ``rejected``,
    ``answer``. The rest is as in ``Addition``.

    Args:
        num_examples: pairs, >= 1.
        digits: width of each operand, 1 to 3.
        held_out: draw from the held-out operands.
        seed: seed of the draw; None = the run's.
        dots: largest number of dots after an answer, >= 0. The two answers of a pair always differ in them, unless it
            is 0.
        longer_chosen: how often the right answer is the longer one, [0, 1]; 0.5 = the labels do not depend on length.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_examples: int,
        digits: int = 2,
        held_out: bool = False,
        seed: int | None = None,
        dots: int = 0,
        longer_chosen: float = 0.5,
    ) -> None:
        super().__init__(num_examples, digits, held_out, seed, dots)
        if not 0 <= longer_chosen <= 1:
            raise ValueError(f"longer_chosen must lie in [0, 1], got {longer_chosen}")
        self.longer_chosen = longer_chosen

    def _row(self, a: int, b: int, origin: str) -> Row:
        plain = super()._row(a, b, origin).columns
        prompt, answer = plain["prompt"], plain["answer"]
        draw = random.Random(f"{self.seed} {prompt}")
        place = draw.randrange(len(answer))
        wrong = (
            answer[:place]
            + draw.choice([digit for digit in "0123456789" if digit != answer[place]])
            + answer[place + 1 :]
        )
        less, more = sorted(draw.sample(range(self.dots + 1), 2)) if self.dots else (0, 0)
        mine, other = (more, less) if draw.random() < self.longer_chosen else (less, more)
        columns = {"prompt": prompt, "chosen": answer + "." * mine, "rejected": wrong + "." * other, "answer": answer}
        return Row(columns, origin, "addition", plain=True)


def is_held_out(a: int, b: int) -> bool:
    """Return whether a pair of operands, in either order, is held out. The answer is the same in every process."""
    return crc32(f"{min(a, b)}+{max(a, b)}".encode()) % HELD_OUT_ONE_IN == 0
