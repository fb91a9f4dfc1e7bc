"""In which order the prompts of a run are drawn: easy ones first, or those that the policy gets wrong more often.

A run draws its prompts in stretches, numbered 0, 1, 2, ...; a phase draws one stretch, or several if it samples
dynamically.
"""

import math
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.curriculum.difficulty import require_some
from datamodules.formats.prompt_shapes import VerifiableExample
from datamodules.loaders.phase_loader import draw_from_stream
from modules.functional.ranges import check_numbers

Drawn = list[tuple[int, int]]  # the row, and a number that tells this instance from its earlier ones


class PromptOrder(ABC):
    """Says which rows each stretch holds, as a function of the seed and the number of the stretch.

    Attributes:
        columns: our names of the columns that it reads.
        rows: number of training rows.
        seed: of the draws.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    def begin(self, examples: Sequence[VerifiableExample], seed: int) -> None:
        """Begin a run over these training rows. Raises ValueError where a column that it needs is missing."""
        self.rows, self.seed = len(examples), seed
        self.origins = zlib.crc32("\n".join(example.origin for example in examples).encode(errors="surrogatepass"))

    @abstractmethod
    def draw(self, number: int, places: int) -> Drawn:
        """Return what stretch ``number`` >= 0 holds, ``places`` entries, the same on all ranks."""


class LearningOrder(PromptOrder):
    """A ``PromptOrder`` that also depends on how often earlier phases answered each row right."""

    @abstractmethod
    def learn(self, counts: Mapping[int, tuple[int, int]]) -> None:
        """Learn from a phase: row -> (right completions, judged completions >= 1), over all ranks."""

    @abstractmethod
    def tables(self) -> dict[str, torch.Tensor]:
        """Return what was learned, float64 [rows] each. ``load_state_dict`` writes into these tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        tables = {name: table.clone() for name, table in self.tables().items()}
        return {"order": type(self).__name__, "origins": self.origins, "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any], same_rows: bool) -> None:
        """Take over what was learned; if the order or the rows have changed, warn and begin anew."""
        name = type(self).__name__
        if state["order"] != name or not same_rows or state["origins"] != self.origins:
            what = f"by {state['order']}" if state["order"] != name else "about other rows"
            rank_zero_warn(f"data.order: what the checkpoint holds was learned {what}; {name} begins anew")
            return
        for table_name, table in self.tables().items():
            table.copy_(state["tables"][table_name])


class EasyToHard(PromptOrder):
    """Draws all rows evenly at first, and from a stretch on from the easiest to the hardest, over and over.

    Rows of equal ``pass_rate`` come in another order in every round.

    Args:
        start: the first stretch that is sorted, >= 0.

    Raises:
        ValueError: ``start`` is out of range; in ``begin``, a row has no ``pass_rate``.
    """

    columns = ("pass_rate",)

    def __init__(self, start: int = 0) -> None:
        check_numbers("data.order", start=(start, "[0, inf)"))
        self.start = start

    def begin(self, examples: Sequence[VerifiableExample], seed: int) -> None:
        """Read the pass rates."""
        super().begin(examples, seed)
        self.rates = read_all_rates(examples, type(self).__name__)

    def draw(self, number: int, places: int) -> Drawn:
        """Return a stretch of the shuffled stream, and from ``start`` on one of the sorted stream."""
        if number < self.start:
            return draw_from_stream(range(number * places, (number + 1) * places), self.rows, self.seed)
        first = (number - self.start) * places
        before = count_rounds(self.start * places, self.rows)
        turns = range(first // self.rows, count_rounds(first + places, self.rows))
        stream = [(row, before + turn) for turn in turns for row in self.sort(turn)]
        skipped = first - turns.start * self.rows
        return stream[skipped : skipped + places]

    def sort(self, turn: int) -> list[int]:
        """Return all rows from the easiest to the hardest."""
        order = list(range(self.rows))
        random.Random(f"{self.seed} sorted {turn}").shuffle(order)
        return sorted(order, key=lambda row: -self.rates[row])


class HarderLater(PromptOrder):
    """Draws all rows evenly at first, and from a stretch on only the hard ones, evenly.

    Source: Kimi k1.5 (arXiv 2501.12599, section 2.3.4 and figure 9), whose ablation turns to hard problems at iteration
    24.

    Args:
        start: the first stretch of hard rows alone, >= 0.
        max_pass_rate: a row is hard if its ``pass_rate`` is at most this, in [0, 1].

    Raises:
        ValueError: a number is out of range; in ``begin``, a row has no ``pass_rate``, or none is hard.
    """

    columns = ("pass_rate",)

    def __init__(self, start: int = 24, max_pass_rate: float = 0.5) -> None:
        check_numbers("data.order", start=(start, "[0, inf)"), max_pass_rate=(max_pass_rate, "[0, 1]"))
        self.start, self.max_pass_rate = start, max_pass_rate

    def begin(self, examples: Sequence[VerifiableExample], seed: int) -> None:
        """Find the hard rows, and say how many there are."""
        super().begin(examples, seed)
        rates = read_all_rates(examples, type(self).__name__)
        self.hard = [row for row, rate in enumerate(rates) if rate <= self.max_pass_rate]
        if not self.hard:
            raise ValueError(
                f"HarderLater: none of the {self.rows} rows has a pass_rate of at most {self.max_pass_rate}, the "
                f"lowest is {min(rates):.3g}; raise data.order.max_pass_rate"
            )
        rank_zero_info(
            f"order: from stretch {self.start} on, {len(self.hard)} of {self.rows} prompts, those with a pass_rate of "
            f"at most {self.max_pass_rate}"
        )

    def draw(self, number: int, places: int) -> Drawn:
        """Return a stretch of the shuffled stream, and from ``start`` on one of a stream of the hard rows."""
        if number < self.start:
            return draw_from_stream(range(number * places, (number + 1) * places), self.rows, self.seed)
        first = (number - self.start) * places
        before = count_rounds(self.start * places, self.rows)
        found = draw_from_stream(range(first, first + places), len(self.hard), self.seed)
        return [(self.hard[row], before + turn) for row, turn in found]


class Prioritised(LearningOrder):
    """Draws a row with probability proportional to 1 - s, its success rate in training.

    s follows the share of right completions of the phases that drew the row: s <- s + rate (share - s). A stretch holds
    no row twice as long as there are rows enough: it is drawn without replacement, so that the probability holds for
    each next row among those that are left. Source: Kimi k1.5 (arXiv 2501.12599, section 2.3.4); rate, floor and prior
    are not published. Example: s = (1, 0.5, 0) with floor 0 gives (0, 1/3, 2/3).

    Rows that are never right get the most draws and teach nothing: leave them out with ``data.keep``.

    Args:
        rate: weight of the newest share, in (0, 1].
        floor: smallest weight of a row, in [0, 1], so that what was always right is tried again now and then.
        prior: s of a row before its first draw, in [0, 1]. A row with a ``pass_rate`` starts from that.

    Raises:
        ValueError: a number is out of range.
    """

    columns = ("pass_rate",)

    def __init__(self, rate: float = 0.5, floor: float = 0.05, prior: float = 0.5) -> None:
        check_numbers("data.order", rate=(rate, "(0, 1]"), floor=(floor, "[0, 1]"), prior=(prior, "[0, 1]"))
        self.rate, self.floor, self.prior = rate, floor, prior

    def begin(self, examples: Sequence[VerifiableExample], seed: int) -> None:
        """Start from the pass rates, and from the prior where there is none."""
        super().begin(examples, seed)
        rates = [example.measures.get("pass_rate") for example in examples]
        self.success = torch.tensor([self.prior if rate is None else rate for rate in rates], dtype=torch.float64)

    def weights(self) -> list[float]:
        """Return the weight of each row in the draws, max(1 - s, floor)."""
        return (1 - self.success).clamp(min=self.floor).tolist()

    def draw(self, number: int, places: int) -> Drawn:
        """Return rows drawn without replacement by their weights; all of them first while there are fewer than places.

        The k rows with the largest log(u) / weight, u uniform in (0, 1), are such a draw (Efraimidis and Spirakis
        2006).
        """
        generator, weights = random.Random(f"{self.seed} {number}"), self.weights()
        drawn: Drawn = []
        turns = count_rounds(places, self.rows)
        for turn in range(turns):
            noise = [1 - generator.random() for _ in weights]  # in (0, 1]
            keys = [(w > 0, math.log(u) / w if w > 0 else u) for w, u in zip(weights, noise, strict=True)]
            best = nlargest(min(self.rows, places - len(drawn)), range(self.rows), key=keys.__getitem__)
            generator.shuffle(best)  # so that no single update of the phase gets the heaviest rows
            drawn += [(row, number * turns + turn) for row in best]
        return drawn

    def learn(self, counts: Mapping[int, tuple[int, int]]) -> None:
        """Move the success rates of the rows that were drawn."""
        for row, (right, judged) in counts.items():
            self.success[row] += self.rate * (right / judged - self.success[row])

    def tables(self) -> dict[str, torch.Tensor]:
        """Return the success rates."""
        return {"success": self.success}


class MoPPS(LearningOrder):
    """Draws the rows whose success rate is probably nearest to a target, by Bayesian estimates.

    The success rate of a row has a Beta(a, b) posterior, at first Beta(1, 1). A phase with x right and y wrong
    completions of the row makes it a <- decay a + (1 - decay) + x and b <- decay b + (1 - decay) + y. A stretch draws
    one rate from each posterior and takes the rows whose rates are nearest to ``target``. Source: arXiv 2507.04632 and
    its released code; here all rows are candidates for every stretch, there a random part of them.

    Args:
        target: the success rate to learn from, in (0, 1).
        decay: how much of the earlier counts stays with each new phase, in [0, 1]; 1 forgets nothing.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, target: float = 0.5, decay: float = 0.5) -> None:
        check_numbers("data.order", target=(target, "(0, 1)"), decay=(decay, "[0, 1]"))
        self.target, self.decay = target, decay

    def begin(self, examples: Sequence[VerifiableExample], seed: int) -> None:
        """Start from Beta(1, 1)."""
        super().begin(examples, seed)
        self.right = torch.ones(self.rows, dtype=torch.float64)
        self.wrong = torch.ones(self.rows, dtype=torch.float64)

    def draw(self, number: int, places: int) -> Drawn:
        """Return the rows nearest to the target; all of them first while there are fewer than places."""
        generator = random.Random(f"{self.seed} {number}")
        drawn: Drawn = []
        turns = count_rounds(places, self.rows)
        counts = list(zip(self.right.tolist(), self.wrong.tolist(), strict=True))
        for turn in range(turns):
            gaps = [-abs(generator.betavariate(right, wrong) - self.target) for right, wrong in counts]
            best = nlargest(min(self.rows, places - len(drawn)), range(self.rows), key=gaps.__getitem__)
            generator.shuffle(best)  # so that no single update of the phase gets the nearest rows
            drawn += [(row, number * turns + turn) for row in best]
        return drawn

    def learn(self, counts: Mapping[int, tuple[int, int]]) -> None:
        """Add the counts of a phase to the posteriors of the rows that were drawn."""
        for row, (right, judged) in counts.items():
            self.right[row] = self.decay * self.right[row] + 1 - self.decay + right
            self.wrong[row] = self.decay * self.wrong[row] + 1 - self.decay + judged - right

    def tables(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the posteriors."""
        return {"right": self.right, "wrong": self.wrong}


def count_rounds(places: int, rows: int) -> int:
    """Return how many rounds over the rows ``places`` begin."""
    return -(-places // rows)


def read_all_rates(examples: Sequence[VerifiableExample], asker: str) -> list[float]:
    """Return the ``pass_rate`` of every row. Raises ValueError where one has none."""
    require_some(examples, "pass_rate", asker)
    rates = [example.measures.get("pass_rate") for example in examples]
    without = [example.origin for example, rate in zip(examples, rates, strict=True) if rate is None]
    if without:
        raise ValueError(
            f"{asker} needs the pass_rate of every row, and {len(without)} of {len(rates)} have none (the first: "
            f"{without[0]}); leave them out with --data.keep Difficulty, or measure them with PassRates"
        )
    return [rate for rate in rates if rate is not None]
