"""Is length rewarded?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.diagnostics import within_group_correlation
from modules.trainer.ranks import from_all_ranks
from modules.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LengthBias(PhaseCallback):
    """Measures whether longer answers to the same prompt earn more, and which answers grow.

    Logs under ``train/length_bias/``:

    - ``correlation``: Pearson correlation of reward and tokens within prompts; 0 where either never varies.
    - ``right_length``, ``wrong_length``: mean tokens of the rollouts with a reward above ``right_above``, and of the
      other scored ones. If only wrong answers grow, suspect a loss that is biased to length (Dr. GRPO, 2503.20783).
    - ``truncated``: share of completions that used up the token budget.

    Args:
        every_n_phases: phases between figures.
        right_above: a reward above this counts as a right answer; 0.5 suits rewards of 0 and 1.
    """

    name = "length_bias"

    def __init__(self, every_n_phases: int = 10, right_above: float = 0.5) -> None:
        super().__init__(every_n_phases)
        self.right_above = right_above

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Measure this rank's rollouts; the class docstring explains the measures."""
        scored = [(r.reward, r.completion.length, r.group) for r in rollouts if r.reward is not None]
        return {
            "correlation": _correlate_within_prompts(scored),
            "right_length": Mean.of([length for reward, length, _ in scored if reward > self.right_above]),
            "wrong_length": Mean.of([length for reward, length, _ in scored if reward <= self.right_above]),
            "truncated": Mean.of([float(r.completion.finish == "length") for r in rollouts]),
        }

    def draw(self, figure: "Figure") -> None:
        """Plot the lengths on the left, the correlation and the truncated share on the right."""
        left, right = figure.subplots(1, 2)
        for name, label in (("right_length", "right"), ("wrong_length", "wrong")):
            draw_series(left, *self.series(name), label=label)
        left.set(xlabel="phase", ylabel="mean tokens")
        left.legend()
        for name in ("correlation", "truncated"):
            draw_series(right, *self.series(name), label=name)
        right.set(xlabel="phase", ylim=(-1.02, 1.02))
        right.legend()


def _correlate_within_prompts(scored: list[tuple[float, int, int]]) -> Mean:
    """Correlate reward and length of all ranks' (reward, length, group), the same on each rank.

    A group's number is unique on its own rank only.
    """
    ranks = from_all_ranks([scored])
    rows = [(reward, length, (rank, group)) for rank, mine in enumerate(ranks) for reward, length, group in mine]
    if not rows:
        return Mean.of([])
    numbers = {group: number for number, group in enumerate(dict.fromkeys(group for _, _, group in rows))}
    rewards = torch.tensor([reward for reward, _, _ in rows], dtype=torch.float64)  # [N]
    lengths = torch.tensor([length for _, length, _ in rows], dtype=torch.float64)  # [N]
    groups = torch.tensor([numbers[group] for _, _, group in rows])  # [N]
    return Mean.of([within_group_correlation(rewards, lengths, groups)])
