"""Numbers over all ranks: gathered lists, means, moments. Every rank must call a function marked (collective)."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

# What tells a process that it is one of several ranks.
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
RANK_VARIABLES |= {"ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def leave_ranks() -> dict[str, str]:
    """Return the environment variables for a child process that is no rank."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith("TORCHELASTIC_")
    }


def from_all_ranks(items: list[Any]) -> list[Any]:
    """Gather the items [n] of all ranks, in the order of the ranks (collective).

    Ranks may have different numbers of items. The items are pickled, so keep them small.
    """
    if not distributed.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class Logs(Protocol):
    """The part of a LightningModule that ``log_equal`` calls."""

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
    """Log numbers [] that are equal on all ranks, so that reading them waits for no other rank.

    Every rank must call it. With ``sync_dist`` alone Lightning averages a number when it is first read: a progress bar,
    which reads on one rank, would wait for ever. ``prog_bar`` and ``logger`` are those of ``LightningModule.log``.
    """
    for name, value in metrics.items():
        if not log_again(module, name, value):
            # rank_zero_only switches the average off, and sync_dist the warning that it is off. A batch size of 1 keeps
            # Lightning from guessing one.
            module.log(name, value, prog_bar=prog_bar, logger=logger, sync_dist=True, rank_zero_only=True, batch_size=1)


def log_again(module: Any, name: str, value: float) -> bool:
    """Log a number of a step that the same hook has logged in an earlier step of the epoch, as ``log`` does.

    Each call of ``log`` copies what Lightning knows of the number, which takes longer than all else that a step of a
    small model logs. Returns False, and does nothing, where the number is new in the epoch or belongs to an epoch.
    """
    results = getattr(getattr(module, "_trainer", None), "_results", None)
    if results is None or results.dataloader_idx is not None:
        return False
    key = f"{module._current_fx_name}.{name}"
    known = results.get(key)
    if known is None or known.has_reset or not known.meta.on_step or known.meta.on_epoch:
        return False
    results.update_metrics(key, torch.tensor(value, device=module.device), 1)
    return True


def weighted_means(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Average each metric over all ranks, from this rank's (total, weight) [2] (collective).

    A metric whose weights sum to 0 is left out. Example: (6.0, 2) on one rank and (2.0, 2) on another make 2.0.
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
    """Collects numbers over the batches of a rank, and joins them over all batches of all ranks.

    Example: ``add({"loss": 2.0}, weight=3)`` and ``add({"loss": 4.0}, weight=1)`` join to ``{"loss": 2.5}``.

    Args:
        device: of the numbers. They stay there, so that ``add`` does not wait for the device.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._parts: dict[str, Tensor] = {}  # (joined numbers, weight) [2] of this rank
        self._joins: dict[str, tuple[Join, bool]] = {}  # how to join a number, and whether to divide it by its weight

    def add(
        self, metrics: Mapping[str, Tensor | float], weight: Tensor | float | None = None, join: Join = sum
    ) -> None:
        """Collect numbers [] of a batch. With ``weight`` [] they are averaged; without, ``join`` joins them."""
        factor = torch.as_tensor(1.0 if weight is None else weight, dtype=torch.float32, device=self.device).detach()
        for name, value in metrics.items():
            number = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach()
            part = torch.stack([number * factor, factor])
            self._parts[name] = JOINS[join](self._parts[name], part) if name in self._parts else part
            self._joins[name] = join, weight is not None

    def join(self) -> dict[str, float]:
        """Join the numbers of all ranks (collective). Ranks may have different names; an empty mean is left out."""
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
    """Compute mean and population variance [num_labels] of the kept entries of each label, over all ranks.

    x [N, T]: float64 on the CPU, 0 at dropped entries. mask: bool [N, T]. label: int [N]. A label without kept entries
    has mean and variance 0. It gathers twice, once for each moment.
    """

    def total(rows: Tensor) -> Tensor:
        """Sum the rows [N, k] of all ranks by label, to [num_labels, k]."""
        here = torch.zeros(num_labels, rows.shape[1], dtype=torch.float64).index_add(0, label, rows)
        return torch.tensor(from_all_ranks([here.tolist()]), dtype=torch.float64).sum(0)

    count, summed = total(torch.stack([mask.sum(1).double(), x.sum(1)], dim=1)).unbind(1)
    count = count.clamp(min=1)
    mean = summed / count
    centered = (x - mean[label, None]).masked_fill(~mask, 0.0)
    return mean, total(centered.square().sum(1, keepdim=True))[:, 0] / count


def _exact(x: Tensor, mask: Tensor) -> Tensor:
    """Move x to the CPU in float64, which some accelerators lack, and set it to 0 where ``mask`` drops."""
    return x.detach().cpu().double().masked_fill(~mask, 0.0)


def whiten_over_ranks(x: Tensor, mask: Tensor, label: Tensor, num_labels: int, shift_mean: bool = True) -> Tensor:
    """Whiten the rows of each label with their moments over all ranks: (x - mean) / sqrt(variance + 1e-8) (collective).

    x: [N, T]; N and T may differ between ranks. mask: bool [N, T]. label: int [N] in 0..num_labels-1, with the same
    meaning on all ranks; a rank may lack some labels. shift_mean: False adds the mean back, so that only the scale
    changes. Returns [N, T] without gradient, 0 at dropped entries. The variance is that of the population, in float64.
    Source: Ziegler et al. 2019 (1909.08593), its released code; see ``masked_whiten``.
    """
    keep, rows = mask.cpu(), label.cpu()
    exact = _exact(x, keep)
    mean, variance = (moment[rows, None] for moment in _moments_over_ranks(exact, keep, rows, num_labels))
    whitened = (exact - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return whitened.masked_fill(~keep, 0.0).to(x.dtype).to(x.device)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Compute 1 - Var(returns - values) / Var(returns) over the kept tokens of all ranks (collective).

    1 is perfect, and a constant gives 0. values, returns: [N, T]; N and T may differ between ranks. mask: bool [N, T].
    Variances are those of the population, in float64. Returns that do not vary give 0.0; a deviation of at most 1e-6 of
    the size of returns and errors counts as rounding of float32.
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
    """Compute the mean of the values [n] of all ranks, and its standard error (collective).

    The error is the sample deviation over sqrt(n), and 0.0 for fewer than two values. The mean of no value is 0.0.
    """
    everything = torch.tensor(from_all_ranks(values), dtype=torch.float64)
    count = len(everything)
    return everything.sum().item() / max(1, count), everything.std().item() / math.sqrt(count) if count > 1 else 0.0
