"""A trial: completions of a few prompts with their scores, and statistics of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from callbacks.measures.prognosis import expect_equal
from modules.types import Rollout


class Tried(NamedTuple):
    """A completion with its verdict."""

    rollout: Rollout
    right: bool | None  # None = nothing tells right from wrong, or the answer cannot be read


@dataclass(frozen=True)
class Trial:
    """The completions of some prompts over all ranks, grouped by prompt."""

    groups: list[list[Tried]]

    @property
    def all(self) -> list[Tried]:
        """All completions."""
        return [one for group in self.groups for one in group]

    def cut(self) -> list[float]:
        """Return the share of each prompt's completions that used up their tokens."""
        return [mean(one.rollout.completion.finish != "stop" for one in group) for group in self.groups]

    def right(self) -> list[float]:
        """Return the pass rate of each prompt; its mean reward where nothing tells right from wrong."""
        return [
            mean(
                value
                for one in group
                if (value := one.rollout.reward if one.right is None else float(one.right)) is not None
            )
            for group in self.groups
        ]

    def idle(self, size: int, part: str | None = None) -> list[float]:
        """Return for each prompt the chance that ``size`` of its completions have the same score, or none has one.

        Args:
            size: of a group.
            part: name of a part of the reward whose scores count; None = the whole reward.
        """
        read = [
            [one.rollout.reward if part is None else one.rollout.rewards[part] for one in group]
            for group in self.groups
        ]
        scores = [[score for score in group if score is not None] for group in read]
        return [expect_equal(found, min(size, len(found))) if len(found) > 1 else 1.0 for found in scores]

    def entropy(self) -> float:
        """Estimate the entropy of the next token at the sampling temperature, in nats: the mean of -log p."""
        logprobs = [value for one in self.all for value in one.rollout.completion.logprobs]
        return -mean(logprobs)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values, 0 without any."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def percent(shares: Sequence[float]) -> str:
    """Write the mean of some shares in percent."""
    return f"{mean(shares):.0%}"


def quote(text: str, most: int = 40) -> str:
    """Return a text in quotes, cut in the middle if it is longer than ``most`` characters."""
    return repr(text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}")
