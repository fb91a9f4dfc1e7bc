"""Rewards on the length of a completion: the tokens that the policy sampled, with the end token."""

import math
from collections import defaultdict
from collections.abc import Sequence

from modules.rewards.combined import find_lengths
from modules.types import Reward, Rollout, as_reward, score


class KimiLength(Reward):
    """Gives short right answers of a prompt more than long ones, from 0.5 down to -0.5; wrong ones get no more than 0.

    lambda = 0.5 - (length - min) / (max - min), where min and max are over all completions of one prompt instance,
    wrong ones too. A right completion gets lambda, a wrong one min(0, lambda), and all get 0 where min = max. Source:
    Kimi k1.5 (arXiv 2501.12599, section 2.3.3).

    It is only the part for length. Add it to the reward for being right, in a ``WeightedSum``; the paper starts with a
    weight of 0. The score is None where ``reward`` gives None.

    Args:
        reward: a score above 0.5 means right.
        name: label of the metric.
    """

    checks_answer = False

    def __init__(self, reward: Reward, name: str = "kimi_length") -> None:
        self.reward, self.name = as_reward(reward), name

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the reward for the length of each rollout, in [-0.5, 0.5], or None.

        Raises:
            ValueError: see ``find_lengths``.
        """
        lengths = find_lengths(rollouts, "KimiLength")
        groups = defaultdict(list)
        for rollout, length in zip(rollouts, lengths, strict=True):
            groups[rollout.uid, rollout.group].append(length)
        scores: list[float | None] = []
        for rollout, length, value in zip(rollouts, lengths, score(self.reward, rollouts), strict=True):
            of_prompt = groups[rollout.uid, rollout.group]
            shortest, longest = min(of_prompt), max(of_prompt)
            share = 0.0 if shortest == longest else 0.5 - (length - shortest) / (longest - shortest)
            scores.append(None if value is None else share if value > 0.5 else min(0.0, share))
        return scores


class OverlongPenalty(Reward):
    """Takes away up to 1 from completions that come near the longest length.

    0 up to ``max_length`` - ``cache`` tokens, then (``max_length`` - ``cache`` - length) / ``cache``, and -1 beyond
    ``max_length``. Source: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).

    Args:
        max_length: tokens; as many as may be sampled, or fewer.
        cache: tokens of ``max_length`` over which the punishment grows, 1 to ``max_length``.
        name: label of the metric.

    Raises:
        ValueError: ``cache`` is out of range.
    """

    checks_answer = False

    def __init__(self, max_length: int, cache: int, name: str = "overlong") -> None:
        if not 1 <= cache <= max_length:
            raise ValueError(
                f"OverlongPenalty cache must be from 1 to max_length, which includes it, got {cache} of {max_length}"
            )
        self.max_length, self.cache, self.name = max_length, cache, name

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the penalty per rollout, in [-1, 0], never None.

        Raises:
            ValueError: see ``find_lengths``.
        """
        free = self.max_length - self.cache
        lengths = find_lengths(rollouts, "OverlongPenalty")
        return [min(0.0, max(-1.0, (free - length) / self.cache)) for length in lengths]


class CosineLength(Reward):
    """Rewards right completions for being short and wrong ones for being long, along half a cosine.

    The reward goes from ``start`` at length 0 to ``end`` at ``max_length``: end + (start - end) (1 + cos(pi length /
    max_length)) / 2. From ``max_length`` on it is ``exceeding``, right or wrong. Source: arXiv 2502.03373, section 4.2,
    with the values of its runs as defaults. It is the whole reward, so it takes the place of ``reward``; the score is
    None where that gives None.

    Args:
        reward: a score above 0.5 means right.
        max_length: tokens, >= 1; as many as may be sampled.
        right: (start, end) of a right completion.
        wrong: (start, end) of a wrong one.
        exceeding: of a completion that reaches ``max_length``.
        name: label of the metric.

    Raises:
        ValueError: ``max_length`` is below 1, or a value is not finite.
    """

    def __init__(
        self,
        reward: Reward,
        max_length: int,
        right: tuple[float, float] = (2.0, 1.0),
        wrong: tuple[float, float] = (-10.0, 0.0),
        exceeding: float = -10.0,
        name: str = "cosine_length",
    ) -> None:
        if max_length < 1 or not all(math.isfinite(value) for value in (*right, *wrong, exceeding)):
            raise ValueError(
                f"CosineLength needs a max_length of at least 1 and finite values, got {max_length}, {right}, {wrong} "
                f"and {exceeding}"
            )
        self.reward, self.max_length, self.name = as_reward(reward), max_length, name
        self.right, self.wrong, self.exceeding = right, wrong, exceeding

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the reward per rollout, or None.

        Raises:
            ValueError: see ``find_lengths``.
        """
        scores: list[float | None] = []
        lengths = find_lengths(rollouts, "CosineLength")
        for length, value in zip(lengths, score(self.reward, rollouts), strict=True):
            start, end = self.right if value is not None and value > 0.5 else self.wrong
            curve = end + (start - end) * (1 + math.cos(math.pi * length / self.max_length)) / 2
            scores.append(None if value is None else self.exceeding if length >= self.max_length else curve)
        return scores
