"""Log-probabilities and entropies from logits, in nats."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.functional.masked import masked_sum


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each target token under the distribution sampled at ``temperature``.

    logits: [N, T, V], aligned to the targets: ``logits[:, t]`` scores ``targets[:, t]``; nothing is shifted here.
    targets: int [N, T], each in 0..V-1. temperature: > 0; logits are divided by it before the softmax, so that ratios
    and KL describe the distribution that was sampled from. Returns [N, T] in nats, <= 0, in float32 or wider. Raises
    ValueError for a temperature that is not positive.

    >>> token_logprobs(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0]]), temperature=2.0)  # log sigma(1)
    tensor([[-0.3133]])
    """
    if temperature <= 0:
        raise ValueError(
            f"token_logprobs: temperature is {temperature}, expected > 0; score greedy samples with temperature=1.0"
        )
    return vocabulary_logprobs(logits, temperature).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_entropies(logits: Tensor) -> Tensor:
    """Compute the entropy of the next-token distribution at each position.

    logits: [N, T, V]; -inf (a forbidden token) is allowed. Returns [N, T] in nats, 0..log V, in float32 or wider.

    >>> token_entropies(torch.zeros(1, 2, 4))  # log 4
    tensor([[1.3863, 1.3863]])
    """
    return entropies(vocabulary_logprobs(logits))


def vocabulary_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the log-probabilities of all tokens under the distribution sampled at ``temperature``.

    logits: [..., V]. temperature: > 0. Returns [..., V] in nats, in float32 or wider.

    >>> vocabulary_logprobs(torch.tensor([2.0, 0.0]), temperature=2.0)
    tensor([-0.3133, -1.3133])
    """
    wide = _at_least_float32(logits)
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def chosen_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target token and, for the backward pass alone, those of all tokens.

    The gradient of the logits is made in place of the log-probabilities of all tokens, so no other tensor of their size
    is needed, and there can be one backward pass only.

    logits: [K, V] in float32. targets: int [K]. temperature: > 0. Returns [K], and [K, V] without gradient, which the
    caller must neither keep nor change.

    >>> chosen_logprobs(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))[0]
    tensor([-2.1269])
    """
    found: tuple[Tensor, Tensor] = _ChosenLogprobs.apply(logits, targets, temperature)
    return found


class _ChosenLogprobs(torch.autograd.Function):
    """log p of a target y; the gradient of logit v is (1 if v = y else 0) - p_v, divided by the temperature."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        whole = vocabulary_logprobs(logits, temperature)
        ctx.save_for_backward(whole, targets)  # and not on ``ctx``, so that ``checkpoint`` can drop it
        ctx.temperature = temperature
        ctx.mark_non_differentiable(whole)
        ctx.set_materialize_grads(False)
        return whole.gather(-1, targets[:, None])[:, 0], whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        whole, targets = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        scaled = gradient[:, None] / ctx.temperature
        return whole.exp_().mul_(-scaled).scatter_add_(-1, targets[:, None], scaled), None, None


def entropies(logprobs: Tensor) -> Tensor:
    """Compute the entropy of each distribution from the log-probabilities of all tokens.

    logprobs: [..., V] in nats; -inf is allowed. Returns [...] in nats.

    >>> entropies(torch.tensor([0.5, 0.5, 0.0]).log())  # log 2
    tensor(0.6931)
    """
    # A token of probability 0 adds 0, but the product would be 0 * -inf.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum the log-probabilities of the kept tokens of each completion.

    logprobs: [N, T] in nats. mask: [N, T], bool keep-mask, or float weights >= 0 for a weighted sum. Returns [N]; an
    empty row gives 0.

    >>> sequence_logprobs(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[True, True, False]]))
    tensor([-3.])
    """
    return masked_sum(logprobs, mask, dim=-1)
