"""Draws next tokens by inverting the cumulative distribution.

A row needs one uniform number instead of one per vocabulary entry.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.rollout.engine import Sampling

BLOCK = 256  # entries of one block of the two-level search
SINGLE_BLOCK = 1024  # vocabularies up to this size are searched as one block


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row, and return it with its log-probability under the distribution it was drawn from.

    Args:
        logits: [N, V] fp32.
        uniforms: float64 [N] in [0, 1); the token of row i depends on entry i alone. Greedy sampling does not use them.
        sampling: temperature, top_k, top_p.

    Returns:
        tokens int [N], log-probs [N] in nats (greedy: of the softmax at temperature 1).
    """
    if sampling.temperature == 0:
        probabilities = logits.softmax(-1)
        tokens = logits.argmax(-1)
    else:
        probabilities = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
        tokens = invert_cdf(probabilities, uniforms)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits [N, V] to -inf outside the ``top_k`` largest, and then outside the ``top_p`` nucleus.

    The nucleus holds the most likely tokens in order, up to and including the one that brings their sum to ``top_p``.

    Args:
        logits: [N, V].
        top_k: how many to keep; ties are all kept; 0 = all.
        top_p: (0, 1]; 1 = no nucleus.
    """
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Find the entry whose slice of the cumulative distribution holds the uniform number: exact sampling.

    It finds the block first and then the entry inside it, so that only one pass reads the whole vocabulary. Sums are
    float64. An entry with probability zero is never chosen.

    Args:
        probabilities: [N, V], >= 0, each row with a positive sum.
        uniforms: float64 [N] in [0, 1).

    Returns:
        index int [N].
    """
    size = probabilities.shape[1]
    block = size if size <= SINGLE_BLOCK else BLOCK
    blocks = F.pad(probabilities, (0, -size % block)).unflatten(1, (-1, block))  # [N, V/block, block]
    totals = blocks.sum(-1).double()
    chosen, rest = _locate(totals, uniforms)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), chosen].double()
    entry, _ = _locate(inside, rest)
    return (chosen * block + entry).clamp(max=size - 1)


def _locate(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Find the slice of the cumulative ``weights`` float64 [N, K] that holds each of ``uniforms`` [N].

    Returns:
        index int [N] of the slice, and the place inside it, float64 [N] in [0, 1].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total there is always a larger cumulative sum, and the entry that makes it larger is not zero.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    return index[:, 0], ((target - (cumulative.gather(1, index) - weight)) / weight)[:, 0].clamp(0, 1)
