"""How often does the policy beat a baseline, and how often would it at equal length?"""

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.measures.preferences import length_controlled_win_rate, win_rate, win_rate_standard_error
from callbacks.phase import record_of
from modules.trainer.ranks import from_all_ranks, log_equal, weighted_means
from modules.types import Reward, Rollout, as_reward, score


@runtime_checkable
class Reports(Protocol):
    """A judge that reports its own statistics."""

    def report(self) -> dict[str, float]:
        """Return this rank's numbers so far."""


class Duel(NamedTuple):
    """One completion compared with the baseline's answer."""

    preference: float | None  # 1 = win, 0.5 = tie, 0 = loss, None = unscorable
    length: int  # characters
    baseline_length: int


class WinRate(Callback):
    """Compares the policy's sampled completions with a baseline's, which a column of the held-out rows holds.

    Logs after every validation, the sanity check included, over all ranks, in percent:

    - ``val/win_rate``: comparisons that the policy wins, a tie counting half.
    - ``val/win_rate_standard_error``: the standard error of the win rate.
    - ``val/length_controlled_win_rate``: the win rate at equal length in characters, reasoning left out (Dubois et al.
      2404.04475, the form without instruction difficulties).
    - ``val/win_rate_ties``: ties among the scorable comparisons.
    - ``val/win_rate_unscorable``: unscorable comparisons among all. They count in no other number.

    If the judge has a ``report``, its numbers are logged as ``val/judge/<key>``, averaged over the ranks.

    Args:
        judge: scores a completion against its rollout's ``answer``, here the baseline's completion: 1 win, 0.5 tie,
            0 loss, None unscorable.
        baseline: the column that holds the baseline's completions; an empty completion is one too.

    Raises:
        ValueError: in ``setup``, when the module samples no completions; in validation, when a row has no baseline or a
            score is outside [0, 1].
    """

    def __init__(self, judge: Reward, baseline: str = "answer") -> None:
        self.judge, self.baseline = as_reward(judge), baseline
        self.duels: list[Duel] = []  # this rank's comparisons in the current validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that samples no completions. Raises ValueError."""
        if record_of(pl_module).held_out is None:
            raise ValueError(
                f"WinRate compares sampled completions, but {type(pl_module).__name__} samples none: remove the "
                "callback."
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted validation left."""
        self.duels = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge the completions of the batch."""
        rollouts = [self.against_baseline(rollout) for rollout in record_of(pl_module).held_out or []]
        for rollout, value in zip(rollouts, score(self.judge, rollouts), strict=True):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"WinRate: {self.judge.name} scored {value} for {rollout.uid}; a judge gives 1 (win), 0.5 (tie), 0 "
                    "(loss) or None."
                )
            self.duels.append(Duel(value, len(rollout.final_text), len(rollout.answer or "")))

    def against_baseline(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the baseline's completion as its answer. Raises ValueError when the row has none."""
        found = rollout.answer if self.baseline == "answer" else (rollout.info or {}).get(self.baseline)
        if not isinstance(found, str):
            raise ValueError(
                f"WinRate: {rollout.uid} has no baseline completion in column {self.baseline!r}; set baseline of "
                "WinRate to the column that holds it."
            )
        return replace(rollout, answer=found)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rates over all batches and ranks."""
        metrics = measure_rates(from_all_ranks(self.duels))
        if isinstance(self.judge, Reports):
            own = {key: (value, 1.0) for key, value in self.judge.report().items()}
            metrics |= {f"judge/{key}": value for key, value in weighted_means(own).items()}
        log_equal(pl_module, {f"val/{name}": value for name, value in metrics.items()})
        self.duels = []


def measure_rates(duels: list[Duel]) -> dict[str, float]:
    """Return metric name -> percent; without a scorable comparison, only the share of unscorable ones."""
    scored = [(preference, mine, other) for preference, mine, other in duels if preference is not None]
    unscorable = {"win_rate_unscorable": 100.0 * (len(duels) - len(scored)) / max(1, len(duels))}
    if not scored:
        return unscorable
    preference, lengths, baseline_lengths = torch.tensor(scored, dtype=torch.float64).unbind(dim=1)  # [N] each
    return {
        "win_rate": win_rate(preference),
        "win_rate_standard_error": win_rate_standard_error(preference),
        "length_controlled_win_rate": length_controlled_win_rate(preference, lengths, baseline_lengths),
        "win_rate_ties": 100.0 * (preference == 0.5).double().mean().item(),
        **unscorable,
    }
