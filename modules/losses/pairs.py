"""The pairs of a batch, their metrics, and their records for callbacks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.types import PolicyBatch, PreferenceBatch, ScoredPair


class Pairs(NamedTuple):
    """M pairs, each of a better and a worse completion of one prompt."""

    better: Tensor  # int [M], row of the completion
    worse: Tensor  # int [M]
    weight: Tensor  # [M], 1 / pairs of the prompt, so that each prompt with any pair weighs 1
    margin: Tensor | None  # [M], by how much the better one should lead; None if the data have no margins


def find_pairs(batch: PreferenceBatch | PolicyBatch) -> Pairs:
    """Find all pairs of completions of one prompt with different ranks.

    Rank 0 is best. Equal ranks make no pair, and a negative rank (a filler, or not compared) is in no pair. Pairs are
    ordered by the row of the better completion, then by that of the worse. Example: ranks 0 1 1 of one prompt give
    (0, 1) and (0, 2), with weight 1/2 each.
    """
    prompt_index, rank = batch["prompt_index"], batch["rank"]
    same_prompt = prompt_index[:, None] == prompt_index  # [N, N]
    before = (rank[:, None] >= 0) & (rank[:, None] < rank)  # [N, N]
    better, worse = (same_prompt & before).nonzero(as_tuple=True)
    prompt = prompt_index[better]  # [M]
    margin = batch["margin"][prompt] if "margin" in batch else None  # type: ignore[typeddict-item]
    return Pairs(better, worse, 1.0 / torch.bincount(prompt)[prompt], margin)


def make_scored_pairs(tokenizer: Any, batch: PreferenceBatch, scores: Tensor, pairs: Pairs) -> list[ScoredPair]:
    """Return the pairs of a batch with their texts and their scores, from ``scores`` [N] of the completions."""
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
    """Decode the kept tokens of rows [R, T] without special tokens; return the texts and the numbers of tokens."""
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True), [len(row) for row in rows]


def measure_preferences(
    rewards: Tensor, logps: Tensor, rank: Tensor, pairs: Pairs | None, referenced: bool
) -> dict[str, tuple[Tensor, float]]:
    """Compute TRL's metrics of preferences, each a mean [] and its weight, which is 0 for an empty mean.

    Labelled completions have no accuracy and no margin.

    Args:
        rewards: [N], implicit rewards.
        logps: [N], log-probs of the completions.
        rank: int [N].
        pairs: None = labelled completions, one per prompt.
        referenced: whether the rewards are log-ratios to a reference, so that both sides can fall below it.
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
    """Compute TRL's ``logits/chosen`` and ``logits/rejected``: means [] over the tokens of a side, with their weights.

    mean_logits [N, Tc]: mean over the vocabulary of the logits that predict a token. mask: bool [N, Tc]. rank: int [N].
    pairs: None = labelled completions.
    """
    sums, lengths = (mean_logits * mask).sum(1), mask.sum(1)  # [N]
    return {
        f"logits/{name}": _weighted_mean(sums[rows] / lengths[rows], weight * lengths[rows])
        for name, (rows, weight) in _find_sides(rank, pairs).items()
    }


def _find_sides(rank: Tensor, pairs: Pairs | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Find rows int [M] and weights [M] of both sides: of each pair, or the desirable and the undesirable ones."""
    if pairs is not None:
        return {"chosen": (pairs.better, pairs.weight), "rejected": (pairs.worse, pairs.weight)}
    sides = {"chosen": (rank == 0).nonzero()[:, 0], "rejected": (rank > 0).nonzero()[:, 0]}
    return {name: (rows, torch.ones_like(rows, dtype=torch.float32)) for name, rows in sides.items()}


def _weighted_mean(values: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Compute the weighted mean [] of values [M], and the sum of the weights [M]."""
    return (values.detach() * weights).sum() / weights.sum().clamp(min=1e-9), float(weights.sum())
