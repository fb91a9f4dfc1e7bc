"""Leaves out prompts that teach nothing: too easy, too hard, guessed or too long, by what ``predict`` measured."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from datamodules.formats.prompt_shapes import VerifiableExample

Item = TypeVar("Item")


class Difficulty:
    """Keeps the prompts that a policy can learn from, by the columns that the callback ``PassRates`` writes.

    A group of completions that are all right or all wrong has no gradient in GRPO and its kin, so the defaults leave
    out both kinds. Source: Kimi k1.5 (arXiv 2501.12599, section 2.1), Qwen3 (2505.09388, section 4.2).

    Args:
        above: keep pass rates above this, in [0, 1]; None = no bound. At 0 what was never right is left out.
        below: keep pass rates below this, in [0, 1]; None = no bound. At 1 what was always right is left out.
        max_guess_rate: leave out prompts that are answered right without thinking more often than this
            (``guess_rate``), in [0, 1]; None = no bound. Kimi k1.5 leaves out prompts that any of 8 guesses gets right:
            0.
        max_length: leave out prompts whose completions have more tokens than this on average; None = no bound.
        max_truncated: leave out prompts if a larger share of their completions is cut off, in [0, 1]; None = no bound.

    Raises:
        ValueError: a number is out of range, or no bound is set.
    """

    def __init__(
        self,
        above: float | None = 0.0,
        below: float | None = 1.0,
        max_guess_rate: float | None = None,
        max_length: float | None = None,
        max_truncated: float | None = None,
    ) -> None:
        shares = {"above": above, "below": below, "max_guess_rate": max_guess_rate, "max_truncated": max_truncated}
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"keep.{name} is a share in [0, 1], got {share}")
        if above is not None and below is not None and above >= below:
            raise ValueError(f"keep.above ({above}) must be less than keep.below ({below}), or no prompt is kept")
        if max_length is not None and not max_length > 0:
            raise ValueError(f"keep.max_length is a number of tokens above 0, got {max_length}")
        self.above, self.below, self.max_guess_rate = above, below, max_guess_rate
        self.max_length, self.max_truncated = max_length, max_truncated
        asked = {
            "pass_rate": above is not None or below is not None,
            "guess_rate": max_guess_rate is not None,
            "pass_length": max_length is not None,
            "pass_truncated": max_truncated is not None,
        }
        self.columns = [name for name, used in asked.items() if used]
        if not self.columns:
            raise ValueError("keep asks for nothing; set one of its bounds, or leave keep out")

    def split(
        self, items: Sequence[Item], example: Callable[[Item], VerifiableExample]
    ) -> tuple[list[Item], Counter[str]]:
        """Return what is kept, in order, and the number of the others by reason.

        Args:
            items: prompts.
            example: gives the example of an item.

        Raises:
            ValueError: a column is missing in all rows, or nothing is kept.
        """
        for name in self.columns:
            require_some([example(item) for item in items], name, "data.keep")
        reasons = [self.find_reason(example(item)) for item in items]
        kept = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
        counts = Counter(reason for reason in reasons if reason is not None)
        if not kept:
            told = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            raise ValueError(f"data.keep leaves none of the {len(items)} prompts: {told}; move its bounds")
        return kept, counts

    def find_reason(self, example: VerifiableExample) -> str | None:
        """Return why a prompt is left out, None if it is kept."""
        found = {name: example.measures.get(name) for name in self.columns}
        missing = next((name for name, value in found.items() if value is None), None)
        if missing is not None:
            return f"without {missing}"
        rate = found.get("pass_rate")
        if rate is not None and self.above is not None and rate <= self.above:
            return "never right" if rate == 0 else "too hard"
        if rate is not None and self.below is not None and rate >= self.below:
            return "always right" if rate == 1 else "too easy"
        for name, bound, reason in (
            ("guess_rate", self.max_guess_rate, "right without thinking"),
            ("pass_length", self.max_length, "with long answers"),
            ("pass_truncated", self.max_truncated, "with answers cut off"),
        ):
            value = found.get(name)
            if value is not None and bound is not None and value > bound:
                return reason
        return None


def require_some(examples: Sequence[VerifiableExample], name: str, asker: str) -> None:
    """Refuse rows if none of them has the column ``name``, which ``asker`` reads. Raises ValueError."""
    if all(example.measures.get(name) is None for example in examples):
        raise ValueError(
            f"{asker} reads {name}, and none of the {len(examples)} training rows has it (the first: "
            f"{examples[0].origin}): measure it with predict and the callback PassRates, without data.keep, or name "
            f"its column with --data.columns '{{{name}: ...}}'"
        )
