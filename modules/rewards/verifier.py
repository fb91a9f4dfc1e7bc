"""The base of rewards that follow rules: their checks run in killable worker processes."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from modules.rewards.combined import walk_rewards
from modules.rewards.workers.pool import Verdict, get_pool
from modules.types import Reward, Rollout

CAUSES = ("timeout", "crash", "memory", "error")  # why a completion gets no verdict


class Verifier(Reward):
    """Judges completions by a check: a module with a function ``judge``, see ``modules.rewards.checks``.

    The check runs in the workers that all verifiers of the process share. A completion at which it hangs, crashes,
    takes all memory or raises gets None, is counted in ``failures``, and costs no other completion its score. A warning
    tells of each cause, again whenever its count has doubled. Equal completions of a call with equal answers are judged
    once.

    Args:
        name: label of the metric.
        settings: what ``judge`` gets by name, as JSON has it.
        timeout: seconds per completion, without the start of the worker.

    Attributes:
        check: name of a module in ``modules.rewards.checks``, or the path of a file.
        reads: what the check gets of the rollout: its ``final_text``, or all of its ``text``.
        needs_answer: True = a rollout without a gold answer gets None, unasked.
        failures: how many completions got no verdict so far, by cause, one of ``CAUSES``.
        faults: how many completions got their score for a fault that the check names.

    Raises:
        ValueError: ``timeout`` is not a finite number > 0.
        WorkerRefused: when called: the check cannot be loaded in a worker.
    """

    check: ClassVar[str]
    reads: Literal["final_text", "text"] = "final_text"
    needs_answer: ClassVar[bool] = False

    def __init__(self, name: str, settings: dict[str, Any] | None = None, timeout: float = 5.0) -> None:
        if not 0.0 < timeout < math.inf:
            raise ValueError(f"{type(self).__name__} timeout must be a finite number of seconds > 0, got {timeout}")
        self.name = name
        self.settings = dict(settings or {})
        self.timeout = timeout
        self.failures: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """Return what ``judge`` gets as ``info``, as JSON has it; by default nothing."""
        return {}

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return one score per rollout; None where the check has no verdict, or none in time."""
        asked = [i for i, rollout in enumerate(rollouts) if rollout.answer is not None or not self.needs_answer]
        items = [(getattr(rollouts[i], self.reads), rollouts[i].answer, self.describe(rollouts[i])) for i in asked]
        verdicts = self._judge(items)
        named = [verdict for verdict in verdicts if verdict.cause is not None]
        self.faults.update(str(verdict.cause) for verdict in named if verdict.score is not None)
        self._tell([verdict for verdict in named if verdict.score is None], len(rollouts))
        scores: list[float | None] = [None] * len(rollouts)
        for i, verdict in zip(asked, verdicts, strict=True):
            scores[i] = verdict.score
        return scores

    def _judge(self, items: list[tuple[str, str | None, dict[str, Any]]]) -> list[Verdict]:
        lines = [json.dumps(item) for item in items]
        distinct = list(dict.fromkeys(lines))
        found = get_pool().judge(self.check, self.settings, distinct, self.timeout) if distinct else []
        verdicts = dict(zip(distinct, found, strict=True))
        return [verdicts[line] for line in lines]

    def _tell(self, lost: list[Verdict], count: int) -> None:
        """Count the completions without a verdict, and tell of causes that are new or have doubled."""
        before, self.failures = self.failures, self.failures + Counter(str(verdict.cause) for verdict in lost)
        told = {verdict.cause: verdict.detail for verdict in lost}
        grown = [cause for cause, total in self.failures.items() if total.bit_length() > before[cause].bit_length()]
        if grown:
            causes = ", ".join(
                f"{cause} {self.failures[cause]}" + (f" (the last: {told[cause]})" if told[cause] else "")
                for cause in grown
            )
            warnings.warn(
                f"reward '{self.name}' got no verdict on {len(lost)} of {count} completions, which have no score; so "
                f"far by cause: {causes}",
                stacklevel=2,
            )


def count_failures(reward: Reward | None, before: Counter[str] | None = None) -> Counter[str]:
    """Count the completions on which the verifiers inside a reward had no verdict, by cause.

    A cause that has not occurred counts 0.

    Args:
        reward: walked through at any depth; None = there are no verifiers.
        before: an earlier count, which is taken away.
    """
    parts = {id(part): part for part in (walk_rewards(reward) if reward is not None else ())}
    found: Counter[str] = Counter()
    for part in parts.values():
        if isinstance(part, Verifier):
            found.update({cause: part.failures[cause] for cause in CAUSES})
    found.subtract(before or {})
    return found
