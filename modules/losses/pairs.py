"""Metrics of the pairs of a batch, and their records for callbacks."""

from typing import Any

import torch
from torch import Tensor

from modules.losses.preference import Pairs
from modules.types import PreferenceBatch, ScoredPair


def make_scored_pairs(tokenizer: Any, batch: PreferenceBatch, scores: Tensor, pairs: Pairs) -> list[ScoredPair]:
    """The pairs of a batch whose completions have ``scores`` [N], with their texts."""
    prompts, prompt_lengths = _decode_rows(tokenizer, batch["prompt_ids"], batch["prompt_mask"])
    texts, lengths = _decode_rows(tokenizer, batch["completion_ids"], batch["completion_mask"])
    index, score = batch["prompt_index"].tolist(), scores.tolist()
    margins = [None] * len(pairs.better) if pairs.margin is None else pairs.margin.tolist()
    return [
        ScoredPair(
            prompt=prompts[index[i]],
            prompt_length=prompt_lengths[index[i]],
            chosen=texts[i],
            rejected=texts[j],
            chosen_length=lengths[i],
            rejected_length=lengths[j],
            chosen_score=score[i],
            rejected_score=score[j],
            margin=margin,
        )
        for i, j, margin in zip(pairs.better.tolist(), pairs.worse.tolist(), margins, strict=True)
    ]


def _decode_rows(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[list[str], list[int]]:
    """The kept tokens of rows [R, T] as texts without special tokens, and their numbers."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), [len(row) for row in rows]


def measure_preferences(
    rewards: Tensor, logps: Tensor, rank: Tensor, pairs: Pairs | None, referenced: bool
) -> dict[str, tuple[Tensor, float]]:
    """TRL's names, each a mean [] and its weight (0 where there is nothing to average).

    Labelled completions have no accuracy and no margin.

    Args:
        rewards: [N], implicit rewards.
        logps: [N], log-probs of the completions.
        rank: int [N].
        pairs: None = labelled completions, one a prompt.
        referenced: whether the rewards are measured against a reference, below which both sides may fall.
    """
    sides = _find_sides(rank, pairs)
    kinds = {"rewards": rewards, "logps": logps}
    found = {
        f"{kind}/{side}": (values[rows], weight)
        for kind, values in kinds.items()
        for side, (rows, weight) in sides.items()
    }
    if pairs is not None:
        better, worse = rewards[pairs.better], rewards[pairs.worse]
        found |= {
            "rewards/accuracies": ((better - worse > 0).float(), pairs.weight),
            "rewards/margins": (better - worse, pairs.weight),
        }
        if referenced:
            found["likelihood_displacement"] = (((better < 0) & (worse < 0)).float(), pairs.weight)
    return {name: _weighted_mean(*each) for name, each in found.items()}


def measure_logits(
    mean_logits: Tensor, mask: Tensor, rank: Tensor, pairs: Pairs | None
) -> dict[str, tuple[Tensor, float]]:
    """TRL's ``logits/chosen`` and ``logits/rejected``: means [] over the tokens of a side, with their numbers.

    mean_logits [N, Tc]: mean over the vocabulary of the logits that a token was predicted from. mask bool [N, Tc]. rank
    int [N]. pairs: None = labelled completions.
    """
    sums, lengths = (mean_logits * mask).sum(1), mask.sum(1)  # [N]
    return {
        f"logits/{name}": _weighted_mean(sums[rows] / lengths[rows], weight * lengths[rows])
        for name, (rows, weight) in _find_sides(rank, pairs).items()
    }


def _find_sides(rank: Tensor, pairs: Pairs | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows int [M] and weights [M] of each side: the two of every pair, or the desirable and the undesirable."""
    if pairs is not None:
        return {"chosen": (pairs.better, pairs.weight), "rejected": (pairs.worse, pairs.weight)}
    sides = {"chosen": (rank == 0).nonzero()[:, 0], "rejected": (rank > 0).nonzero()[:, 0]}
    return {name: (rows, torch.ones_like(rows, dtype=torch.float32)) for name, rows in sides.items()}


def _weighted_mean(values: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Weighted mean [] of values [M], and the sum of the weights [M]."""
    return (values.detach() * weights).sum() / weights.sum().clamp(min=1e-9), float(weights.sum())
