"""Adds several rewards, and checks the scores that rewards return."""

import math
from collections.abc import Iterator, Sequence

from modules.rewards.function import as_reward
from modules.types import Reward, Rollout


def score(reward: Reward, rollouts: Sequence[Rollout]) -> list[float | None]:
    """Call a reward and check what it returned.

    Returns:
        one finite score per rollout, in order; None = unscorable.

    Raises:
        ValueError: the number of scores is not the number of rollouts, or a score is NaN or infinite.
    """
    values = reward(rollouts)
    if len(values) != len(rollouts):
        raise ValueError(
            f"reward '{reward.name}' returned {len(values)} scores for {len(rollouts)} rollouts; return one per rollout"
        )
    bad = [index for index, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"reward '{reward.name}' returned {values[bad[0]]} for rollout {bad[0]}; return None for unscorable"
        )
    return [None if value is None else float(value) for value in values]


class WeightedSum(Reward):
    """Adds several rewards, each times its weight.

    If one component is None, so is the total, because a partial sum would be on another scale.

    Args:
        rewards: the components, with distinct names.
        weights: one finite factor per component; None = 1 each, as in DeepSeek-R1 (arXiv 2501.12948).

    Raises:
        ValueError: there is no component, the number of weights differs, a weight is not finite, or two components
            share a name.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        rewards = as_reward(rewards)
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        names = [reward.name for reward in rewards]
        if not rewards:
            raise ValueError("WeightedSum needs at least one reward, got an empty list")
        if len(weights) != len(rewards):
            raise ValueError(
                f"WeightedSum got {len(rewards)} rewards but {len(weights)} weights; give one weight per reward"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"WeightedSum weights must be finite numbers, got {weights}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"WeightedSum got several rewards named {repeated}; give each its own name")
        self.name = "weighted_sum"
        self.rewards = list(rewards)
        self.weights = weights

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the weighted total per rollout; None if any component is None."""
        return [self.total(parts) for parts in self.components(rollouts)]

    def components(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        """Return the unweighted scores by reward name, one dict per rollout."""
        columns = [score(reward, rollouts) for reward in self.rewards]
        names = [reward.name for reward in self.rewards]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def total(self, parts: dict[str, float | None]) -> float | None:
        """Return the weighted sum of one rollout's ``components``; None if any of them is None."""
        total = 0.0
        for value, weight in zip(parts.values(), self.weights, strict=True):
            if value is None:
                return None
            total += weight * value
        return total


def breakdown(reward: Reward, rollouts: Sequence[Rollout]) -> tuple[list[dict[str, float | None]], list[float | None]]:
    """Score the rollouts once and keep the parts.

    Returns:
        the unweighted components of each rollout by name, and the totals. A reward that is not a ``WeightedSum`` is its
        own only component.

    Raises:
        ValueError: see ``score``.
    """
    if isinstance(reward, WeightedSum):
        parts = reward.components(rollouts)
        return parts, [reward.total(row) for row in parts]
    totals = score(reward, rollouts)
    return [{reward.name: value} for value in totals], totals


def every_reward(reward: Reward) -> Iterator[Reward]:
    """Yield the reward and all rewards inside it, at any depth."""
    yield reward
    for part in vars(reward).values():
        for inner in part if isinstance(part, list | tuple) else [part]:
            if isinstance(inner, Reward):
                yield from every_reward(inner)
