"""Products that a small model cannot work out in its head, and conversations that ask a calculator for them."""

import random
from itertools import product

from datamodules.sources.source import Row, Source
from datamodules.sources.toys.addition import is_held_out
from modules.trainer.seeds import run_seed

FACTORS = range(10, 100)


class Products(Source):
    """Makes products such as ``37*84=`` with the answer ``3108``.

    Columns ``prompt`` and ``answer``. About one pair of factors in ten is held out, as in ``Addition``. Rows are drawn
    without replacement from the 8100 pairs of two-digit factors.

    Args:
        num_examples: rows, >= 1.
        held_out: draw from the held-out pairs in place of the training pairs.
        seed: seed of the draw; None = the run's. The split does not depend on it.

    Raises:
        ValueError: ``num_examples`` is below 1.
    """

    def __init__(self, num_examples: int, held_out: bool = False, seed: int | None = None) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.num_examples, self.held_out, self.seed = num_examples, held_out, run_seed(seed)

    def rows(self) -> list[Row]:
        """Return ``num_examples`` rows. Raises ValueError when the split has fewer pairs."""
        pairs = [pair for pair in product(FACTORS, repeat=2) if is_held_out(*pair) == self.held_out]
        side = "held-out" if self.held_out else "training"
        if self.num_examples > len(pairs):
            raise ValueError(f"num_examples is {self.num_examples} but there are only {len(pairs)} {side} pairs")
        drawn = random.Random(self.seed).sample(pairs, self.num_examples)
        return [
            Row(self.columns(a, b), f"products-{side}#{index}", "products", plain=False)
            for index, (a, b) in enumerate(drawn)
        ]

    def columns(self, a: int, b: int) -> dict[str, object]:
        """Return the columns of a row."""
        return {"prompt": f"{a}*{b}=", "answer": str(a * b)}


class ProductCalls(Products):
    """Makes conversations about ``Products`` in which some ask ``Calculator`` and the others guess a number.

    Column ``messages``. A call stands as a plain line, as the built-in models write it. What the calculator returns is
    no turn of the assistant, and so is not learned.

    Args:
        num_examples: rows, >= 1.
        calls: share of the conversations with a call, [0, 1].
        held_out: draw from the held-out pairs.
        seed: seed of the draws; None = the run's.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_examples: int, calls: float = 0.5, held_out: bool = False, seed: int | None = None) -> None:
        super().__init__(num_examples, held_out, seed)
        if not 0 <= calls <= 1:
            raise ValueError(f"calls must lie in [0, 1], got {calls}")
        self.calls = calls

    def columns(self, a: int, b: int) -> dict[str, object]:
        """Return the conversation."""
        draw = random.Random(f"{self.seed} {a} {b}")
        turns = [("user", f"{a}*{b}=")]
        if draw.random() < self.calls:
            turns += [("assistant", f'calculate("{a}*{b}")'), ("tool", str(a * b)), ("assistant", str(a * b))]
        else:
            turns += [("assistant", str(draw.choice(FACTORS) * draw.choice(FACTORS)))]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
