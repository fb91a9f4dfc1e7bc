"""What a phase samples, and dynamic sampling: it goes on until the phase has its share of groups that teach something."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from modules.functional.ranges import check_numbers
from modules.trainer.ranks import from_all_ranks
from modules.types import Outcome, Rollout


@dataclass(frozen=True)
class Gathered:
    """The scored completions of a phase of this rank."""

    rollouts: list[Rollout]
    earlier: int = 0  # how many of them, the first ones, belong to the record of the phase before
    # Groups to train on, by their number in the order of ``rollouts``; None = all.
    chosen: list[int] | None = None
    left: list[Rollout] = field(default_factory=list)  # groups to be trained on later
    metrics: dict[str, float] = field(default_factory=dict)  # metrics of the choice


@dataclass(frozen=True)
class DynamicSampling:
    """Samples further prompts until a phase has as many groups with right and wrong answers as it has prompts.

    Source: DAPO, arXiv 2503.14476, section 3.2. What decides is whether an answer is right, as in validation, not the
    reward, which may also hold length or format. Surplus groups are trained on first in the next phase, with the
    probabilities that they were drawn with. If ``max_rounds`` do not suffice, other groups fill the phase up. The run's
    reward, length and KL are those of all completions that the phase sampled.

    Raises:
        ValueError: a value is out of range.
    """

    max_rounds: int = 5  # >= 2, how often a phase may draw ``prompts_per_phase`` prompts; verl: max_num_gen_batches

    def __post_init__(self) -> None:
        check_numbers("dynamic_sampling", max_rounds=(self.max_rounds, "[2, inf)"))

    def __call__(
        self,
        carried: list[Rollout],
        need: int,
        sample: Callable[[int], list[Rollout]],
        judge: Callable[[list[Rollout]], list[Outcome]],
    ) -> Gathered:
        """Sample until every rank has what it needs, and choose the groups to train on (collective).

        Args:
            carried: groups of the phase before, all with right and wrong answers.
            need: groups to train on, on this rank.
            sample: number of a round, from 0 -> its scored completions.
            judge: says which of them are right.
        """
        rollouts = number_groups(carried, 0)
        mixed = list(dict.fromkeys(rollout.group for rollout in rollouts))
        other: list[int] = []
        waiting, drawn = len(mixed), 0
        for number in range(self.max_rounds):
            fresh = number_groups(sample(number), len(mixed) + len(other))
            found = find_mixed_groups(judge(fresh), [rollout.group for rollout in fresh])
            groups = list(dict.fromkeys(rollout.group for rollout in fresh))
            mixed += found
            other += [group for group in groups if group not in found]
            rollouts += fresh
            drawn += len(groups)
            if all(from_all_ranks([len(mixed) >= need])):
                break
        left = {*mixed[need:]}
        metrics = {
            "rounds": number + 1.0,
            "mixed": (len(mixed) - waiting) / drawn,
            "filled": float(max(0, need - len(mixed))),
            "carried": float(len(left)),
        }
        return Gathered(
            rollouts,
            len(carried),
            mixed[:need] + other[: max(0, need - len(mixed))],
            [rollout for rollout in rollouts if rollout.group in left],
            {f"dynamic_sampling/{name}": value for name, value in metrics.items()},
        )


def find_mixed_groups(outcomes: Sequence[Outcome], groups: Sequence[int]) -> list[int]:
    """Return the groups with right and with wrong answers, in order of appearance.

    Args:
        outcomes: one per completion; those that are neither right nor wrong do not count.
        groups: the group of each.
    """
    found: dict[int, set[bool]] = {}
    for group, outcome in zip(groups, outcomes, strict=True):
        found.setdefault(group, set())
        if outcome.right is not None:
            found[group].add(outcome.right)
    return [group for group, kinds in found.items() if len(kinds) == 2]


def number_groups(rollouts: Sequence[Rollout], first: int) -> list[Rollout]:
    """Number the groups of consecutive rollouts from ``first`` on, in order of appearance."""
    numbers = {group: first + i for i, group in enumerate(dict.fromkeys(rollout.group for rollout in rollouts))}
    return [replace(rollout, group=numbers[rollout.group]) for rollout in rollouts]
