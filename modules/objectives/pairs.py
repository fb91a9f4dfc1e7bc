"""The pairs of a batch, and what a model makes of them, as records for callbacks."""

from typing import Any, NamedTuple

from torch import Tensor

from modules.functional.preference_loss import preference_pairs
from modules.types import PreferenceBatch, ScoredPair


class Pairs(NamedTuple):
    """M times a better and a worse completion of one prompt."""

    better: Tensor  # int [M], row of the completion
    worse: Tensor  # int [M]
    weight: Tensor  # [M], 1 / pairs of the example
    margin: Tensor | None  # [M]


def pairs_of(batch: PreferenceBatch) -> Pairs:
    """All pairs of all examples of a batch; fillers make none."""
    better, worse, weight = preference_pairs(batch["prompt_index"], batch["rank"])
    return Pairs(better, worse, weight, batch["margin"][batch["prompt_index"][better]] if "margin" in batch else None)


def describe(tokenizer: Any, batch: PreferenceBatch, scores: Tensor, pairs: Pairs) -> list[ScoredPair]:
    """The pairs of a batch whose completions have ``scores`` [N], with their texts."""
    prompts, prompt_lengths = _texts(tokenizer, batch["prompt_ids"], batch["prompt_mask"])
    texts, lengths = _texts(tokenizer, batch["completion_ids"], batch["completion_mask"])
    index, score = batch["prompt_index"].tolist(), scores.tolist()
    margins = [None] * len(pairs.better) if pairs.margin is None else pairs.margin.tolist()
    return [
        ScoredPair(prompts[index[i]], prompt_lengths[index[i]], texts[i], texts[j], lengths[i], lengths[j], score[i], score[j], margin)
        for i, j, margin in zip(pairs.better.tolist(), pairs.worse.tolist(), margins, strict=True)
    ]


def _texts(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[list[str], list[int]]:
    """The kept tokens of rows [R, T] as texts without special tokens, and their numbers."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), [len(row) for row in rows]
