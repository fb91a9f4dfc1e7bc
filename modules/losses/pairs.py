"""The pairs of a batch, and what a model makes of them: as metrics, and as records for callbacks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.losses.preference_loss import preference_pairs
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
        ScoredPair(
            prompts[index[i]],
            prompt_lengths[index[i]],
            texts[i],
            texts[j],
            lengths[i],
            lengths[j],
            score[i],
            score[j],
            margin,
        )
        for i, j, margin in zip(pairs.better.tolist(), pairs.worse.tolist(), margins, strict=True)
    ]


def _texts(tokenizer: Any, ids: Tensor, mask: Tensor) -> tuple[list[str], list[int]]:
    """The kept tokens of rows [R, T] as texts without special tokens, and their numbers."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), [len(row) for row in rows]


def preference_metrics(
    rewards: Tensor, logps: Tensor, prompt_index: Tensor, rank: Tensor, paired: bool, referenced: bool
) -> dict[str, tuple[Tensor, float]]:
    """TRL's names, each a mean [] and its weight (0 where there is nothing to average); labelled ones have no accuracy
    and no margin.

    rewards, logps [N]: implicit rewards and sequence log-probs. prompt_index, rank int [N]. paired: False for labelled
    completions, one a
    prompt. referenced: whether the rewards are measured against a reference, below which both sides may fall.
    """
    sides = _sides(prompt_index, rank, paired)
    kinds = {"rewards": rewards, "logps": logps}
    found = {
        f"{kind}/{side}": (values[rows], weight)
        for kind, values in kinds.items()
        for side, (rows, weight) in sides.items()
    }
    if paired:
        (better, weight), (worse, _) = sides.values()
        gap = rewards[better] - rewards[worse]
        found |= {"rewards/accuracies": ((gap > 0).float(), weight), "rewards/margins": (gap, weight)}
        if referenced:
            found["likelihood_displacement"] = (((rewards[better] < 0) & (rewards[worse] < 0)).float(), weight)
    return {name: _mean(*each) for name, each in found.items()}


def logit_metrics(
    mean_logits: Tensor, mask: Tensor, prompt_index: Tensor, rank: Tensor, paired: bool
) -> dict[str, tuple[Tensor, float]]:
    """TRL's ``logits/chosen`` and ``logits/rejected``: means [] over the tokens of a side, with their numbers.

    mean_logits [N, Tc]: mean over the vocabulary of the logits that a token was predicted from. mask bool [N, Tc].
    """
    sums, lengths = (mean_logits * mask).sum(1), mask.sum(1)  # [N]
    sides = _sides(prompt_index, rank, paired)
    return {
        f"logits/{name}": _mean(sums[rows] / lengths[rows], weight * lengths[rows])
        for name, (rows, weight) in sides.items()
    }


def _sides(prompt_index: Tensor, rank: Tensor, paired: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows int [M] of completions and their weights [M]: the two of every pair, or the desirable and the undesirable."""
    if not paired:
        sides = {"chosen": (rank == 0).nonzero()[:, 0], "rejected": (rank > 0).nonzero()[:, 0]}
        return {name: (rows, torch.ones_like(rows, dtype=torch.float32)) for name, rows in sides.items()}
    better, worse, weight = preference_pairs(prompt_index, rank)
    return {"chosen": (better, weight), "rejected": (worse, weight)}


def _mean(values: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Weighted mean [] of values [M], and the sum of the weights [M]."""
    return (values.detach() * weights).sum() / weights.sum().clamp(min=1e-9), float(weights.sum())
