"""Rewards that are made of other rewards: sums, a price on length, a comparison with the gold answer."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FunctionType

from modules.functional.ranges import check_numbers
from modules.rewards.dispatch import Dispatch
from modules.types import Completion, HasEveryPrompt, Reward, Rollout, as_reward, score


@dataclass(frozen=True)
class Ramp:
    """A weight that goes in a straight line from ``start`` to ``end`` between two phases, and stays there.

    With ``first`` equal to ``last`` it jumps, as Kimi k1.5 warms up its length reward (arXiv 2501.12599, section
    2.3.3). Outside of training, as in a validation, it is ``end``, so that scores can be compared over a run.

    Raises:
        ValueError: a value is out of range.
    """

    start: float
    end: float
    first: int  # >= 0, the last phase with ``start``; phases are counted from 0
    last: int  # >= first, the first phase with ``end``; if it is ``first``, this phase has ``end``

    def __post_init__(self) -> None:
        check_numbers(
            "Ramp",
            start=(self.start, "(-inf, inf)"),
            end=(self.end, "(-inf, inf)"),
            first=(self.first, "[0, inf)"),
            last=(self.last, f"[{self.first}, inf)"),
        )

    def __call__(self, phase: int | None) -> float:
        """Compute the weight in a phase; None = outside of training."""
        if phase is None or phase >= self.last:
            return self.end
        share = max(0, phase - self.first) / max(1, self.last - self.first)
        return self.start + share * (self.end - self.start)


class WeightedSum(Reward):
    """Adds several rewards, each times its weight.

    If one component is None, so is the total, because a partial sum would be on another scale.

    Args:
        rewards: the components, with distinct names.
        weights: one finite factor per component, or a ``Ramp`` for one that changes during training; None = 1 each, as
            in DeepSeek-R1 (arXiv 2501.12948).

    Raises:
        ValueError: there is no component, the number of weights differs, a weight is not finite, or two components
            share a name.
    """

    def __init__(self, rewards: list[Reward], weights: list[float | Ramp] | None = None) -> None:
        rewards = as_reward(rewards)
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        names = [reward.name for reward in rewards]
        if not rewards:
            raise ValueError("WeightedSum needs at least one reward, got an empty list")
        if len(weights) != len(rewards):
            raise ValueError(
                f"WeightedSum got {len(rewards)} rewards but {len(weights)} weights; give one weight per reward"
            )
        if not all(math.isfinite(weight) for weight in weights if not isinstance(weight, Ramp)):
            raise ValueError(f"WeightedSum weights must be finite numbers, got {weights}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"WeightedSum got several rewards named {repeated}; give each its own name")
        self.name = "weighted_sum"
        self.rewards = list(rewards)
        self.weights = weights

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the weighted total per rollout; None if any component is None."""
        return [self.add_parts(parts) for parts in self.score_parts(rollouts)]

    def score_parts(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        """Return the unweighted scores by reward name, one dict per rollout."""
        columns = [score(reward, rollouts) for reward in self.rewards]
        names = [reward.name for reward in self.rewards]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def list_parts(self) -> list[Reward]:
        """Return the components."""
        return self.rewards

    def add_parts(self, parts: dict[str, float | None]) -> float | None:
        """Return the weighted sum of one rollout's ``score_parts``; None if any of them is None."""
        total = 0.0
        for value, weight in zip(parts.values(), self.find_weights(self.phase), strict=True):
            if value is None:
                return None
            total += weight * value
        return total

    def find_weights(self, phase: int | None) -> list[float]:
        """Return the weights in a phase of the training; None = outside of it."""
        return [weight(phase) if isinstance(weight, Ramp) else weight for weight in self.weights]


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
        self.reward, self.per_token = as_reward(reward), per_token
        self.name = f"{self.reward.name}_length_penalty"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the penalised score per rollout, or None."""
        return [self.add_parts(parts) for parts in self.score_parts(rollouts)]

    def score_parts(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        """Return the parts of the other reward and the penalty (<= 0), one dict per rollout.

        Raises:
            ValueError: a completion has text but no tokens, so that its length is unknown.
        """
        lengths = find_lengths(rollouts, "LengthPenalty")
        return [
            {**parts, self.name: -self.per_token * length}
            for parts, length in zip(self.reward.score_parts(rollouts), lengths, strict=True)
        ]

    def add_parts(self, parts: dict[str, float | None]) -> float | None:
        """Return the score of the other reward and the penalty, added; None if the other gave None."""
        inner = self.reward.add_parts({name: value for name, value in parts.items() if name != self.name})
        penalty = parts[self.name]
        return None if inner is None or penalty is None else inner + penalty

    def list_parts(self) -> list[Reward]:
        """Return the parts of the other reward; the penalty is no score of its own."""
        return self.reward.list_parts()

    def name_parts(self) -> list[str]:
        """Return the names of the other reward's parts and that of the penalty."""
        return [*self.reward.name_parts(), self.name]


def find_lengths(rollouts: Sequence[Rollout], owner: str) -> list[int]:
    """Return how many tokens of each completion the policy sampled, the end token included.

    Raises:
        ValueError: a completion has text but no tokens, so that its length is unknown; ``owner`` is named.
    """
    bare = [rollout.uid for rollout in rollouts if rollout.completion.text and not rollout.completion.token_ids]
    if bare:
        raise ValueError(
            f"{bare[0]}: {owner} counts tokens, and this completion is text without tokens (a baseline of Versus?); "
            f"use the reward without {owner}"
        )
    return [rollout.completion.length for rollout in rollouts]


class Versus(Reward):
    """Gives 1 when ``reward`` scores the completion above the row's ``answer``, 0.5 when equal, 0 below.

    With a learned reward this measures win rates. The answer is scored as a completion that ended by itself, with text
    and without tokens; if the prompt opens a thought, the answer closes it first. So ``reward`` must read text, as
    ``LearnedReward`` does for a completion without tokens. The score is None without an answer, or if either side
    cannot be scored.

    Args:
        reward: scores the completion and the answer.
    """

    checks_answer = False

    def __init__(self, reward: Reward) -> None:
        self.reward = as_reward(reward)
        self.name = f"versus_{self.reward.name}"

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return 1.0, 0.5, 0.0 or None per rollout."""
        mine = [rollout for rollout in rollouts if rollout.answer is not None]
        against = [
            replace(rollout, completion=Completion([], [], self.end_with_answer(rollout), "stop")) for rollout in mine
        ]
        scores = score(self.reward, [*mine, *against])
        verdicts = iter([compare_scores(a, b) for a, b in zip(scores[: len(mine)], scores[len(mine) :], strict=True)])
        return [None if rollout.answer is None else next(verdicts) for rollout in rollouts]

    @staticmethod
    def end_with_answer(rollout: Rollout) -> str:
        """Return the gold answer as a completion of the prompt."""
        answer = rollout.answer or ""
        return (
            f"</think>\n\n{answer}" if rollout.text != rollout.completion.text and "</think>" not in answer else answer
        )


def compare_scores(score: float | None, other: float | None) -> float | None:
    """Return 1.0 if ``score`` is above ``other``, 0.5 if they are equal, 0.0 below; None if either is None."""
    if score is None or other is None:
        return None
    return 0.5 if score == other else float(score > other)


def walk_rewards(reward: Reward) -> Iterator[Reward]:
    """Yield the reward and all rewards inside it, at any depth."""
    yield reward
    for part in vars(reward).values():
        for inner in part if isinstance(part, list | tuple) else [part]:
            if isinstance(inner, Reward) and not isinstance(inner, FunctionType):  # a reward's own function
                yield from walk_rewards(inner)


def describe_reward(reward: Reward) -> str:
    """Return the class of a reward with those of its settings that are plain values, as text."""
    plain = {}
    for name, value in sorted(vars(reward).items()):
        with suppress(TypeError, ValueError):
            plain[name] = json.dumps(value, sort_keys=True)
    return f"{type(reward).__name__} {json.dumps(plain)}"


def require_tasks(reward: Reward, data: object) -> None:
    """Raise ValueError if a ``Dispatch`` inside the reward has no reward for the task of a prompt of a DataModule."""
    for part in walk_rewards(reward):
        if isinstance(part, Dispatch) and isinstance(data, HasEveryPrompt):
            prompts = data.every_prompt()
            for name, source, info in zip(prompts["uid"], prompts["source"], prompts["info"], strict=True):
                part.find_task(name, source, info)


@contextmanager
def in_phase(reward: Reward, phase: int | None) -> Iterator[None]:
    """Let the rewards inside ``reward`` know, in the ``with`` block, which phase of the training they score for."""
    parts = list(walk_rewards(reward))
    for part in parts:
        part.phase = phase
    try:
        yield
    finally:
        for part in parts:
            vars(part).pop("phase", None)  # a part may stand at two places


def find_accuracy(reward: Reward) -> Reward | None:
    """Return the reward that tells right from wrong: the one that compares answers, or the only one there is.

    A part of the sum that compares answers goes before those inside other parts, as ``KimiLength`` has one.

    A part of a ``Dispatch`` judges the prompts of its own task only, so it is never the one.

    None = several or none compare answers, or it is known that scores of this kind say nothing about that.
    """
    parts = list(walk_rewards(reward))
    of_a_task = {
        id(each) for part in parts if isinstance(part, Dispatch) for own in part.rewards for each in walk_rewards(own)
    }
    checking = [part for part in reward.list_parts() if part.checks_answer] or [
        part for part in parts if part.checks_answer and id(part) not in of_a_task
    ]
    if len(parts) == 1 and reward.checks_answer is not False:
        return reward
    return checking[0] if len(checking) == 1 else None
