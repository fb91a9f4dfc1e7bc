"""What an audit of a verifier is made of: cases whose label is known by how they were made, and their count."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from modules.types import Completion, Reward, Rollout


@dataclass(frozen=True)
class Case:
    """One completion, and what a strict reader gives it."""

    kind: str  # how it was made
    text: str
    label: float | None  # None = nobody can score it
    answer: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    prompt: str = "Question?"
    tokens: int = 1
    group: int = 0


@dataclass(frozen=True)
class Audit:
    """How a verifier is audited."""

    name: str
    verifier: Callable[[], Reward] | Callable[[list[Case]], list[float | None]]  # makes it, or is one
    cases: Callable[[Random], Iterable[Case]]
    tolerance: float | None = None  # None = right and wrong; else how far a score may be from its label


@dataclass(frozen=True)
class Finding:
    """What an audit found."""

    name: str
    cases: int
    high: int  # wrong ones called right, or scores above the label
    may_be_high: int
    low: int  # right ones called wrong or not scored, or scores below the label
    may_be_low: int
    kinds: tuple[str, ...]  # those with an error, and how many of how many
    examples: tuple[tuple[Case, float | None], ...]


def run_audit(audit: Audit, seed: int = 0) -> Finding:
    """Make the cases of a verifier, score them and compare."""
    cases = list(audit.cases(Random(f"{seed} {audit.name}")))
    rollouts = [make_rollout(number, case) for number, case in enumerate(cases)]
    scores = audit.verifier(cases) if audit.verifier.__name__.startswith("score_") else audit.verifier()(rollouts)
    high, low, errors = 0, 0, []
    for case, score in zip(cases, scores, strict=True):
        if audit.tolerance is None:
            score_high = score is not None and score > 0.5 and case.label != 1.0
            score_low = case.label == 1.0 and not (score is not None and score > 0.5)
            score_low |= case.label is not None and score is None  # a wrong one without a score leaves its group
            score_low |= case.label is None and score is not None and not score_high
        else:
            score_high = score is not None and (case.label is None or score > case.label + audit.tolerance)
            score_low = case.label is not None and (score is None or score < case.label - audit.tolerance)
        high, low = high + score_high, low + score_low
        if score_high or score_low:
            errors.append((case, score))
    made, failed = Counter(case.kind for case in cases), Counter(case.kind for case, _ in errors)
    graded = audit.tolerance is not None
    return Finding(
        audit.name,
        len(cases),
        high,
        len(cases) if graded else sum(case.label != 1.0 for case in cases),
        low,
        len(cases) if graded else sum(case.label == 1.0 for case in cases),
        tuple(f"{kind} ({failed[kind]} of {made[kind]})" for kind in sorted(failed)),
        tuple(errors),
    )


def make_rollout(number: int, case: Case) -> Rollout:
    """Return a case as the rollout that a reward reads."""
    completion = Completion([7] * case.tokens, [0.0] * case.tokens, case.text, "stop")
    return Rollout(
        f"case {case.group or number}", case.prompt, [1], case.answer, completion, case.group, {}, None, case.info
    )


def find_interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    share, scale = count / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / scale
    width = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / scale
    return max(0.0, middle - width), min(1.0, middle + width)
