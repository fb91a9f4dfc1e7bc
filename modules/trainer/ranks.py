"""What all ranks hold together: their lists joined, and moments over all of their rows. Every function but
``log_equal``, which ends all logging, is collective.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed


def from_all_ranks(items: list[Any]) -> list[Any]:
    """The items [n] of all ranks, in the order of the ranks, as many as they are on each (collective); pickled, so keep
    them small.
    """
    if not distributed.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class Logs(Protocol):
    """What is called of a LightningModule."""

    def log(
        self,
        name: str,
        value: float,
        *,
        prog_bar: bool,
        logger: bool | None,
        sync_dist: bool,
        rank_zero_only: bool,
        batch_size: int,
    ) -> None:
        """Log a number."""


def log_equal(module: Logs, metrics: Mapping[str, float], prog_bar: bool = False, logger: bool | None = None) -> None:
    """Log numbers [] that are equal on all ranks, and leave no collective for whoever reads them.

    Every rank must call it. Lightning averages what is logged with ``sync_dist`` alone only when somebody first reads
    it: a progress bar, on one rank, would wait for ever. ``prog_bar``, ``logger``: as in ``LightningModule.log``.
    """
    for name, value in metrics.items():
        # rank_zero_only takes the average out, sync_dist the advice to ask for it; a batch size of 1 keeps
        # Lightning from guessing one.
        module.log(name, value, prog_bar=prog_bar, logger=logger, sync_dist=True, rank_zero_only=True, batch_size=1)


def weighted_means(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of each metric over all ranks, from this rank's (total, weight) [2] (collective); a mean of nothing is left
    out.

    Example: (6.0, 2) on one rank and (2.0, 2) on another make 2.0.
    """
    totals, weights = Counter[str](), Counter[str]()
    for found in from_all_ranks([{name: tuple(part) for name, part in parts.items()}]):
        for name, (total, weight) in found.items():
            totals[name] += total
            weights[name] += weight
    return {name: total / weights[name] for name, total in totals.items() if weights[name] > 0}


Join = Callable[[Iterable[float]], float]
JOINS: dict[Join, Callable[[Tensor, Tensor], Tensor]] = {sum: torch.add, min: torch.minimum, max: torch.maximum}


class Tally:
    """Numbers that each rank collects over its batches, joined over all batches of all ranks at the end.

    Example: ``add({"loss": 2.0}, weight=3)`` and ``add({"loss": 4.0}, weight=1)`` join to ``{"loss": 2.5}``.

    Args:
        device: where the numbers are, so that collecting them waits for nothing.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._parts: dict[str, Tensor] = {}  # (joined numbers, weight) [2] of this rank
        self._joins: dict[str, tuple[Join, bool]] = {}  # and whether a number is divided by its weight

    def add(self, metrics: Mapping[str, Tensor | float], weight: float | None = None, join: Join = sum) -> None:
        """Collect numbers [] of a batch: averaged with ``weight``, or without it joined by ``sum``, ``min`` or ``max``."""
        for name, value in metrics.items():
            number = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            factor = 1.0 if weight is None else weight
            part = torch.stack([number * factor, torch.full_like(number, factor)])
            self._parts[name] = JOINS[join](self._parts[name], part) if name in self._parts else part
            self._joins[name] = join, weight is not None

    def join(self) -> dict[str, float]:
        """The numbers over all ranks (collective), which need not have the same names; a mean of nothing is left out."""
        parts = torch.stack(list(self._parts.values())).tolist() if self._parts else []
        mine = {name: (part, self._joins[name]) for name, part in zip(self._parts, parts, strict=True)}
        gathered: dict[str, list[tuple[list[float], tuple[Join, bool]]]] = defaultdict(list)
        for found in from_all_ranks([mine]):
            for name, part in found.items():
                gathered[name].append(part)
        joined = {}
        for name, entries in gathered.items():
            join, averages = entries[0][1]
            number, weight = (join(part[place] for part, _ in entries) for place in (0, 1))
            if not averages or weight > 0:
                joined[name] = number / weight if averages else number
        return joined


def _moments_over_ranks(x: Tensor, mask: Tensor, label: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance [num_labels] of the kept entries of each label's rows on all ranks; 0 for a label
    without any.

    x [N, T]: float64 on the CPU, 0 where mask (bool [N, T]) drops. label: int [N]. Two passes, so two gathers.
    """

    def total(rows: Tensor) -> Tensor:
        """[N, k] -> [num_labels, k], the sums over the rows of all ranks."""
        here = torch.zeros(num_labels, rows.shape[1], dtype=torch.float64).index_add(0, label, rows)
        return torch.tensor(from_all_ranks([here.tolist()]), dtype=torch.float64).sum(0)

    count, summed = total(torch.stack([mask.sum(1).double(), x.sum(1)], dim=1)).unbind(1)
    count = count.clamp(min=1)
    mean = summed / count
    centered = (x - mean[label, None]).masked_fill(~mask, 0.0)
    return mean, total(centered.square().sum(1, keepdim=True))[:, 0] / count


def _exact(x: Tensor, mask: Tensor) -> Tensor:
    """x in float64 on the CPU (some accelerators have none), 0 where mask, there too, drops."""
    return x.detach().cpu().double().masked_fill(~mask, 0.0)


def whiten_over_ranks(x: Tensor, mask: Tensor, label: Tensor, num_labels: int, shift_mean: bool = True) -> Tensor:
    """``masked_whiten`` with the moments of the rows of one label on all ranks (collective): ``(x - mean) /
    sqrt(variance + 1e-8)``.

    x: [N, T]; N and T may differ between ranks. mask: bool [N, T]. label: int [N] in 0..num_labels-1, numbered alike on
    all ranks, which
    need not have rows of each. shift_mean: False adds the mean back, so that only the scale changes. Returns [N, T]
    without gradient, 0 at dropped entries. Population variance, computed in float64. Source: Ziegler et al. 2019
    (1909.08593), its released code.
    """
    keep, rows = mask.cpu(), label.cpu()
    exact = _exact(x, keep)
    mean, variance = (moment[rows, None] for moment in _moments_over_ranks(exact, keep, rows, num_labels))
    whitened = (exact - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return whitened.masked_fill(~keep, 0.0).to(x.dtype).to(x.device)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the kept tokens of all ranks (collective): 1 is perfect, a constant
    gives 0.

    values, returns: [N, T]; N and T may differ between ranks. mask: bool [N, T]. Population variances, computed in
    float64. 0.0 where
    the returns do not vary: a deviation of at most 1e-6 of the size of returns and errors is the rounding of float32.
    """
    keep = mask.cpu()
    exact = _exact(returns, keep)
    both = torch.cat([exact, exact - _exact(values, keep)])  # [2N, T]
    label = torch.arange(2).repeat_interleave(len(keep))
    mean, variance = _moments_over_ranks(both, torch.cat([keep, keep]), label, num_labels=2)
    of_returns, of_errors = variance.tolist()
    if of_returns <= 1e-12 * (mean.square().sum().item() + of_errors):
        return 0.0
    return 1.0 - of_errors / of_returns


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean of the values [n] of all ranks and its standard error, the sample deviation over sqrt(n) (collective).

    The error is 0.0 for fewer than two values, and so is the mean of none.
    """
    everything = torch.tensor(from_all_ranks(values), dtype=torch.float64)
    count = len(everything)
    return everything.sum().item() / max(1, count), everything.std().item() / math.sqrt(count) if count > 1 else 0.0
