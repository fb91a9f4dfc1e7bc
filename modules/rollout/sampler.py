"""Draw next tokens by inverting the cumulative distribution: one uniform number per row instead of one per vocabulary
entry.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.rollout.engine import Sampling

BLOCK = 256  # entries of one block of the two-level search
SINGLE_BLOCK = 1024  # vocabularies up to this size are searched in one go


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability under the distribution it was drawn from.

    Args:
        logits: [N, V] fp32.
        uniforms: float64 [N] in [0, 1); row i's token depends on row i alone. Unused for greedy.
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
    """Logits [N, V] with -inf outside the ``top_k`` largest (ties kept, 0 = all) and then outside the ``top_p``
    nucleus.

    The nucleus holds the likeliest tokens in order, up to and including the one whose probability brings the sum to
    ``top_p``.
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
    """Index int [N] whose slice of the cumulative distribution holds ``uniforms``: exact sampling, never a
    zero-probability entry.

    Finds the block first, then the entry in it, so that only one pass reads all of the vocabulary. Sums are float64.

    Args:
        probabilities: [N, V], >= 0, each row with a positive sum.
        uniforms: float64 [N] in [0, 1).
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
    """The slice of cumulative ``weights`` float64 [N, K] that holds each of ``uniforms`` [N], and how far inside it, in
    [0, 1].
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total there is always a next larger sum, and the entry that makes it larger is not zero.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    return index[:, 0], ((target - (cumulative.gather(1, index) - weight)) / weight)[:, 0].clamp(0, 1)
