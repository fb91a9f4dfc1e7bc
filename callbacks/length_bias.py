"""Is the policy paid for length?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.diagnostics import within_group_correlation
from modules.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LengthBias(PhaseCallback):
    """Whether longer answers to the same prompt earn more, and whose length grows.

    Logs ``train/length_bias/``: ``correlation``, Pearson of reward and tokens within prompts, 0 where either never
    varies; with several ranks the mean of theirs, by scored rollouts. ``right_length`` and ``wrong_length``, mean
    tokens of rollouts with a reward above ``right_above``, and of the other scored ones; wrong answers that grow alone
    are the sign of a length-biased loss (Dr. GRPO, 2503.20783). ``truncated``, the share of completions that used up
    the token budget.

    Args:
        every_n_phases: phases between figures.
        right_above: a reward above this counts as a right answer; 0.5 suits rewards of 0 and 1.
    """

    name = "length_bias"

    def __init__(self, every_n_phases: int = 10, right_above: float = 0.5) -> None:
        super().__init__(every_n_phases)
        self.right_above = right_above

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """See ``PhaseCallback``; the measures are explained above."""
        scored = [(r.reward, len(r.completion.token_ids), r.group) for r in rollouts if r.reward is not None]
        rewards = torch.tensor([reward for reward, _, _ in scored], dtype=torch.float64)  # [N]
        lengths = torch.tensor([length for _, length, _ in scored], dtype=torch.float64)  # [N]
        groups = torch.tensor([group for _, _, group in scored], dtype=torch.long)  # [N]
        return {
            "correlation": Mean(within_group_correlation(rewards, lengths, groups) * len(scored), len(scored)),
            "right_length": Mean.of([length for reward, length, _ in scored if reward > self.right_above]),
            "wrong_length": Mean.of([length for reward, length, _ in scored if reward <= self.right_above]),
            "truncated": Mean.of([float(r.completion.finish == "length") for r in rollouts]),
        }

    def draw(self, figure: "Figure") -> None:
        """See ``PhaseCallback``."""
        left, right = figure.subplots(1, 2)
        for name, label in (("right_length", "right"), ("wrong_length", "wrong")):
            draw_series(left, *self.series(name), label=label)
        left.set(xlabel="phase", ylabel="mean tokens")
        left.legend()
        for name in ("correlation", "truncated"):
            draw_series(right, *self.series(name), label=name)
        right.set(xlabel="phase", ylim=(-1.02, 1.02))
        right.legend()
