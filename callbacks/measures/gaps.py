"""The gaps between the log-probs of trainer and engine, token by token, and statistics of these gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from modules.functional.kl import k3
from modules.types import Rollout

LARGEST = 20.0  # nats; a larger log w would make a mean infinite
WINDOW = 10  # values in which a growth is looked for
# Rising minus falling pairs, of the 45 in a window. A series without trend reaches it in 1 of 5600 cases (Kendall's
# tau).
RISING = 37


@dataclass(frozen=True)
class Gaps:
    """The K tokens that the policy sampled in some rollouts; float64 unless it says otherwise."""

    log_weights: Tensor  # [K], log p of the trainer - log p of the sampler, nats
    places: Tensor  # int [K], in the completion, from 0
    ages: Tensor  # int [K], optimiser updates between the weights that sampled it and those of the trainer
    completions: Tensor  # int [K], number of the rollout

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "Gaps":
        """Find the gaps of rollouts that carry the trainer's log-probs; the others are left out."""
        kept = [rollout for rollout in rollouts if rollout.trainer_logprobs is not None]
        lengths = torch.tensor([len(rollout.completion.token_ids) for rollout in kept], dtype=torch.long)
        trainer, sampler = (
            torch.tensor([x for row in rows for x in row], dtype=torch.float64)
            for rows in ([r.trainer_logprobs or [] for r in kept], [r.completion.logprobs for r in kept])
        )
        versions = torch.tensor([v for r in kept for v in r.completion.token_versions], dtype=torch.long)
        sampled = torch.tensor([x for r in kept for x in r.completion.sampled or [True] * len(r.completion.token_ids)])
        number = torch.arange(len(kept)).repeat_interleave(lengths)
        places = torch.arange(len(number)) - (lengths.cumsum(0) - lengths)[number]
        ages = torch.tensor([rollout.trainer_version for rollout in kept], dtype=torch.long)[number] - versions
        columns = ((trainer - sampler).clamp(-LARGEST, LARGEST), places, ages, number)
        return cls(*(column[sampled.bool()] for column in columns))

    @property
    def distances(self) -> Tensor:
        """The KL of sampler and trainer at each token, w - 1 - log w (k3), nats [K]."""
        return k3(-self.log_weights, torch.zeros_like(self.log_weights))

    def sum_gaps(self) -> Tensor:
        """Return, for each token, the sum of the log weights of its completion [K]."""
        number = int(self.completions.max()) + 1 if len(self.completions) else 0
        sums = torch.zeros(number, dtype=torch.float64).index_add(0, self.completions, self.log_weights)
        return sums[self.completions]

    def sum_completions(self, kept: Tensor) -> list[tuple[float, float, float]]:
        """Return (tokens, sum of ``distances``, sum of w - 1) of each completion, over its tokens in ``kept`` bool [K].
        Completions without such tokens are left out. In the distances, log w is capped at 1: a few large w would spoil
        their standard error.
        """
        bounded = self.log_weights.clamp(max=1.0)
        distances = k3(-bounded, torch.zeros_like(bounded))
        rows = torch.stack([torch.ones_like(bounded), distances, self.log_weights.expm1()], 1)[kept]
        number = self.completions[kept]
        sums = torch.zeros(int(number.max()) + 1 if len(number) else 0, 3, dtype=torch.float64).index_add(
            0, number, rows
        )
        return [(count, distance, weight) for count, distance, weight in sums.tolist() if count > 0]


def estimate_ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return the total of ``sums`` over the total of ``counts``, and its standard error. Only the n pairs are
    independent.

    The error is that of a ratio estimator, infinite for fewer than two pairs.

    >>> estimate_ratio([1.0, 3.0], [1.0, 1.0])  # 2 +- sqrt(2 * (1 + 1)) / 2
    (2.0, 1.0)
    """
    number, total = len(counts), sum(counts)
    mean = sum(sums) / total if total else 0.0
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return mean, sqrt(number / (number - 1) * squares) / total if number > 1 else inf


def count_rising(values: Sequence[float]) -> int:
    """Return the number of pairs that rise minus those that fall, in order (the statistic S of Mann and Kendall).

    >>> count_rising([1, 2, 3]), count_rising([1, 3, 2]), count_rising([2, 2, 1])
    (3, 1, -2)
    """
    pairs = [(a, b) for place, b in enumerate(values) for a in values[:place]]
    return sum((b > a) - (b < a) for a, b in pairs)


def average_stretches(values: Sequence[float], number: int) -> list[float]:
    """Return the means of ``number`` stretches of equal length, in order. Surplus values at the front are left out;
    fewer values than stretches give an empty list.

    >>> average_stretches([9.0, 1.0, 3.0, 5.0, 5.0], 2)
    [2.0, 5.0]
    """
    size = len(values) // number
    kept = values[len(values) - size * number :]
    return [sum(kept[start : start + size]) / size for start in range(0, len(kept), size or 1)]


def find_growth(values: Sequence[float], least: float) -> tuple[int, float] | None:
    """Find a steady growth in the last ten values, or in the means of ten stretches of all values.

    The growth is steady if 37 more of the 45 pairs rise than fall and one of the last three values reaches ``least``.

    Returns:
        the number of the first value, and mean of the last three / mean of the first three; None = there is no growth.

    >>> find_growth([9.0, *range(1, 11)], 0.0)
    (1, 4.5)
    """
    for first, ten in (
        (len(values) - WINDOW, values[-WINDOW:]),
        (len(values) % WINDOW, average_stretches(values, WINDOW)),
    ):
        if len(ten) == WINDOW and max(ten[-3:]) >= least and count_rising(ten) >= RISING:
            return first, sum(ten[-3:]) / max(sum(ten[:3]), 1e-30)
    return None
