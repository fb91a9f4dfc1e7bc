"""Partial rollouts: how many tokens a completion may sample in a phase, and what ends one that only repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from modules.functional.ranges import check_numbers
from modules.types import Completion


@dataclass(frozen=True)
class PartialRollouts:
    """Lets a completion sample some tokens in a phase of training, and go on in the next phase if it has not ended.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.6.2. So no phase waits for its longest completions. A group is scored
    and trained on when all its completions have ended. Complete groups are trained on in the order in which they were
    begun, at most as many as the phase has prompts; the others wait. A phase has at least the groups that its
    micro-batches take: if too few are complete, the first of the others go on until they are. So the first phases train
    on fewer groups, of shorter completions. The groups that they leave come later, and groups that the last phases
    leave are never trained on.

    Tokens of earlier phases keep the probabilities that they were drawn with, so that the ratio of each segment starts
    from the policy that sampled it. Held-out prompts, and those of ``predict``, are answered without a break.

    Raises:
        ValueError: a value is out of range.
    """

    tokens_per_phase: int  # >= 1; from ``max_completion_length`` on, every phase is an ordinary one
    # >= 2: a completion that would go on ends as cut off if its last tokens repeat a pattern so often in a row. None =
    # no check.
    max_repeats: int | None = None
    learn_earlier: bool = True  # whether tokens that earlier phases sampled are part of the loss

    def __post_init__(self) -> None:
        check_numbers(
            "sampling.partial",
            tokens_per_phase=(self.tokens_per_phase, "[1, inf)"),
            max_repeats=(self.max_repeats, "[2, inf)"),
        )

    def goes_on(self, completion: Completion, max_completion_length: int) -> bool:
        """Tell whether a completion that used up its tokens of this phase goes on in the next."""
        ids = completion.token_ids
        if completion.finish != "length" or len(ids) >= max_completion_length:
            return False
        return self.max_repeats is None or not repeats_at_end(ids, self.max_repeats)


def repeats_at_end(tokens: Sequence[int], times: int) -> bool:
    """Tell whether the tokens end with some pattern ``times`` times in a row, in time linear in their number.

    >>> repeats_at_end([5, 1, 2, 1, 2, 1, 2], times=3), repeats_at_end([5, 1, 2, 1, 2, 1, 2], times=4)
    (True, False)
    """
    last = tokens[::-1]
    count = len(last)
    reach = [count] + [0] * count  # of the last tokens, as many equal those that many places before them (Z function)
    left = right = 0
    for period in range(1, count // times + 1):
        reach[period] = max(0, min(reach[period - left], right - period))
        while period + reach[period] < count and last[reach[period]] == last[period + reach[period]]:
            reach[period] += 1
        if period + reach[period] >= times * period:
            return True
        if period + reach[period] > right:
            left, right = period, period + reach[period]
    return False
