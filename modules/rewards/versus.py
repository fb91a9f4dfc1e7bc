"""A reward as a judge: does the completion score higher than the row's baseline answer?"""

from collections.abc import Sequence
from dataclasses import replace

from modules.types import Completion, Reward, Rollout


class Versus(Reward):
    """1 where a completion scores above the row's ``answer`` under ``reward``, 0.5 where equal, 0 below: win rates with
    a learned judge.

    The answer is scored as a completion that ended by itself, with text and no tokens: ``reward`` must read text, as
    ``LearnedReward`` does for a completion without tokens. None without an answer, or where either side is unscorable.

    Args:
        reward: scores completion and answer alike.
    """

    def __init__(self, reward: Reward) -> None:
        self.name = f"versus_{reward.name}"
        self.reward = reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """1.0, 0.5, 0.0 or None per rollout."""
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
    """1.0 above, 0.5 equal, 0.0 below; None where either is None."""
    if score is None or other is None:
        return None
    return 0.5 if score == other else float(score > other)
