"""The reward that an environment gives itself."""

from collections.abc import Sequence
from typing import Protocol

from modules.rewards.combined import walk_rewards
from modules.types import Reward, Rollout


class HasReward(Protocol):
    """An environment that tells whether its class gives rewards."""

    @property
    def factory(self) -> type:
        """The class."""

    @property
    def has_reward(self) -> bool:
        """Whether it has ``get_reward``."""


class EnvironmentReward(Reward):
    """Gives what ``get_reward()`` of the completion's environment returned at its end (``model.environment``).

    None if a tool was not done in time.
    """

    name = "environment"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return one number or None per rollout."""
        return [rollout.completion.earned for rollout in rollouts]


def check_earned(rewards: Sequence[Reward], environment: HasReward | None) -> None:
    """Refuse an ``EnvironmentReward`` without a ``get_reward``, and a ``get_reward`` that no reward reads.

    Raises:
        ValueError: it is refused; the message says what to change.
    """
    reads = any(isinstance(part, EnvironmentReward) for reward in rewards for part in walk_rewards(reward))
    if reads and (environment is None or not environment.has_reward):
        what = "model.environment names none" if environment is None else "that class has no get_reward() -> float"
        raise ValueError(
            f"EnvironmentReward reads what an environment gives, and {what}: add it, or use another reward"
        )
    if environment is not None and environment.has_reward and not reads:
        raise ValueError(
            f"environment {environment.factory.__name__} has get_reward(), and no reward reads it: name "
            "EnvironmentReward as model.reward, alone or in a WeightedSum, or leave get_reward out"
        )
