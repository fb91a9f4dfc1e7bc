"""Rewards that depend on the length of a completion."""

import math
from collections.abc import Sequence

from modules.types import Reward, Rollout


class LengthPenalty(Reward):
    """Subtracts ``per_token`` for each token of the completion from another reward.

    The end token counts. The score is None where the other reward gives None. In arXiv 2310.03716 length alone explains
    70 to 90 % of what PPO gains on reward models.

    Args:
        reward: the reward to correct.
        per_token: price of a token, in units of ``reward``; finite and >= 0.

    Raises:
        ValueError: ``per_token`` is out of range.
    """

    def __init__(self, reward: Reward, per_token: float) -> None:
        if not 0 <= per_token < math.inf:
            raise ValueError(f"LengthPenalty per_token must be a finite number >= 0, got {per_token}")
        self.name = f"{reward.name}_length_penalty"
        self.reward, self.per_token = reward, per_token

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the penalised score per rollout, or None.

        Raises:
            ValueError: a completion has text but no tokens, so that its length is unknown.
        """
        bare = [rollout.uid for rollout in rollouts if rollout.completion.text and not rollout.completion.token_ids]
        if bare:
            raise ValueError(
                f"{bare[0]}: LengthPenalty counts tokens, and this completion is text without tokens (a baseline of "
                "Versus?); use the reward without LengthPenalty"
            )
        scores = self.reward(rollouts)
        return [
            None if score is None else score - self.per_token * len(rollout.completion.token_ids)
            for score, rollout in zip(scores, rollouts, strict=True)
        ]
