"""Does the policy still produce varied answers?"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from callbacks.phase import Mean, PhaseCallback, draw_series
from modules.functional.diagnostics import distinct_n
from modules.trainer.ranks import from_all_ranks
from modules.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Diversity(PhaseCallback):
    """Measures signs of mode collapse on the completions of each phase.

    Logs under ``train/diversity/``:

    - ``entropy``: entropy of the next-token distribution in nats, mean over all sampled tokens.
    - ``distinct_1``, ``distinct_2``: different token n-grams over all token n-grams of the phase's completions.
    - ``distinct_answers``: different completion texts over completions of a prompt, mean over prompts.
    - ``frac_reward_zero_std``: share of prompts whose scored completions all have the same reward. Advantages relative
      to the group are then 0, so GRPO learns nothing from them.

    Longer completions repeat more n-grams by themselves. So distinct-n reads only the first ``prefix_tokens`` tokens of
    each completion.

    Args:
        every_n_phases: phases between figures.
        prefix_tokens: tokens of each completion that distinct-n reads, at least 2. Shorter completions are read whole.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "diversity"

    def __init__(self, every_n_phases: int = 10, prefix_tokens: int = 32) -> None:
        super().__init__(every_n_phases)
        if prefix_tokens < 2:
            raise ValueError(
                f"prefix_tokens must be at least 2, got {prefix_tokens}: distinct_2 counts pairs of tokens."
            )
        self.prefix_tokens = prefix_tokens

    def measure(self, rollouts: Sequence[Rollout]) -> dict[str, Mean]:
        """Measure this rank's rollouts; the class docstring explains the measures."""
        groups: dict[int, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            groups[rollout.group].append(rollout)
        starts = from_all_ranks([rollout.completion.sampled_ids[: self.prefix_tokens] for rollout in rollouts])
        return {
            "entropy": _token_entropy(rollouts),
            "distinct_1": _distinct(starts, 1),
            "distinct_2": _distinct(starts, 2),
            "distinct_answers": Mean.of(
                [len({r.completion.text for r in group}) / len(group) for group in groups.values()]
            ),
            "frac_reward_zero_std": _equal_rewards(groups.values()),
        }

    def draw(self, figure: "Figure") -> None:
        """Plot the entropy on the left and the shares on the right."""
        left, right = figure.subplots(1, 2)
        draw_series(left, *self.series("entropy"))
        left.set(xlabel="phase", ylabel="entropy, nats per token")
        for name in ("distinct_1", "distinct_2", "distinct_answers", "frac_reward_zero_std"):
            draw_series(right, *self.series(name), label=name)
        right.set(xlabel="phase", ylabel="share", ylim=(-0.02, 1.02))
        right.legend()


def _distinct(sequences: Sequence[Sequence[int]], n: int) -> Mean:
    """Return distinct-n over the sequences of all ranks, the same on each rank; empty if no sequence has n tokens."""
    return Mean.of([distinct_n(sequences, n)] if any(len(sequence) >= n for sequence in sequences) else [])


def _token_entropy(rollouts: Sequence[Rollout]) -> Mean:
    known = [(rollout.entropy, rollout.completion.length) for rollout in rollouts if rollout.entropy is not None]
    return Mean(sum(entropy * length for entropy, length in known), sum(length for _, length in known))


def _equal_rewards(groups: Iterable[Sequence[Rollout]]) -> Mean:
    """Average over groups: 1 where all scores are equal, else 0. A group without any score does not count."""
    scores = [[rollout.reward for rollout in group if rollout.reward is not None] for group in groups]
    return Mean.of([float(min(group) == max(group)) for group in scores if group])
