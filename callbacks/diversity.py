"""Does the policy still try different things?"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.diagnostics import distinct_n
from modules.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Diversity(PhaseCallback):
    """The signs of mode collapse, read from the phase's own samples.

    Logs ``train/diversity/``: ``entropy``, nats per token, every token counting the same; ``distinct_1`` and
    ``distinct_2``, different over all token n-grams of a rank's completions; ``distinct_answers``, different completion
    texts over completions of a prompt, mean over prompts; ``frac_reward_zero_std``, the share of prompts whose scored
    completions all got the same reward and so teach nothing. Longer sets repeat more n-grams by themselves, so
    distinct-n reads only the first ``prefix_tokens`` tokens of each completion in every phase.

    Args:
        every_n_phases: phases between figures.
        prefix_tokens: tokens of each completion that distinct-n reads, at least 2. Shorter completions are read whole.

    Raises:
        ValueError: an argument out of range.
    """

    name = "diversity"

    def __init__(self, every_n_phases: int = 10, prefix_tokens: int = 32) -> None:
        super().__init__(every_n_phases)
        if prefix_tokens < 2:
            raise ValueError(
                f"prefix_tokens must be at least 2, or there is no pair of tokens to count, got {prefix_tokens}."
            )
        self.prefix_tokens = prefix_tokens

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """See ``PhaseCallback``; the measures are explained above."""
        groups: dict[int, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            groups[rollout.group].append(rollout)
        return {
            "entropy": _token_entropy(rollouts),
            "distinct_1": self._distinct(rollouts, 1),
            "distinct_2": self._distinct(rollouts, 2),
            "distinct_answers": Mean.of(
                [len({r.completion.text for r in group}) / len(group) for group in groups.values()]
            ),
            "frac_reward_zero_std": _equal_rewards(groups.values()),
        }

    def _distinct(self, rollouts: Sequence[Rollout], n: int) -> Mean:
        """distinct-n of this rank's set, weighted by its number of n-grams."""
        sequences = [rollout.completion.token_ids[: self.prefix_tokens] for rollout in rollouts]
        num_ngrams = sum(max(0, len(sequence) - n + 1) for sequence in sequences)
        return Mean(distinct_n(sequences, n) * num_ngrams, num_ngrams)

    def draw(self, figure: "Figure") -> None:
        """See ``PhaseCallback``."""
        left, right = figure.subplots(1, 2)
        draw_series(left, *self.series("entropy"))
        left.set(xlabel="phase", ylabel="entropy, nats per token")
        for name in ("distinct_1", "distinct_2", "distinct_answers", "frac_reward_zero_std"):
            draw_series(right, *self.series(name), label=name)
        right.set(xlabel="phase", ylabel="share", ylim=(-0.02, 1.02))
        right.legend()


def _token_entropy(rollouts: Sequence[Rollout]) -> Mean:
    known = [
        (rollout.entropy, len(rollout.completion.token_ids)) for rollout in rollouts if rollout.entropy is not None
    ]
    return Mean(sum(entropy * length for entropy, length in known), sum(length for _, length in known))


def _equal_rewards(groups: Iterable[Sequence[Rollout]]) -> Mean:
    """1 per group whose scores are all equal, else 0; a group without any score is not counted."""
    scores = [[rollout.reward for rollout in group if rollout.reward is not None] for group in groups]
    return Mean.of([float(min(group) == max(group)) for group in scores if group])
