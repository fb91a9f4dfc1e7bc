"""A reward as a judge: does the completion score higher than the row's baseline answer?"""

from collections.abc import Sequence
from dataclasses import replace

from modules.types import Completion, Reward, Rollout


class Versus(Reward):
    """Gives 1 when ``reward`` scores the completion above the row's ``answer``, 0.5 when equal, 0 below.

    With a learned reward this measures win rates. The answer is scored as a completion that ended by itself, with text
    and without tokens. So ``reward`` must read text, as ``LearnedReward`` does for a completion without tokens. The
    score is None without an answer, or if either side cannot be scored.

    Args:
        reward: scores the completion and the answer.
    """

    def __init__(self, reward: Reward) -> None:
        self.name = f"versus_{reward.name}"
        self.reward = reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.5, 0.0 or None per rollout."""
        against = [
            replace(rollout, completion=Completion([], [], rollout.answer, "stop"))
            for rollout in rollouts
            if rollout.answer is not None
        ]
        mine = [rollout for rollout in rollouts if rollout.answer is not None]
        scores = self.reward([*mine, *against]) if mine else []
        verdicts = iter([verdict(a, b) for a, b in zip(scores[: len(mine)], scores[len(mine) :], strict=True)])
        return [None if rollout.answer is None else next(verdicts) for rollout in rollouts]


def verdict(score: float | None, other: float | None) -> float | None:
    """Return 1.0 if ``score`` is above ``other``, 0.5 if they are equal, 0.0 below; None if either is None."""
    if score is None or other is None:
        return None
    return 0.5 if score == other else float(score > other)
