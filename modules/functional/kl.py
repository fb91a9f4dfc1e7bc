"""Estimators of KL(policy || reference) from one sampled token (J. Schulman, "Approximating KL Divergence", 2020).

d = logprobs - ref_logprobs for a token drawn from the policy, in nats. An estimator is not the same as a value and as a
loss, because a gradient through samples does not differentiate the sampling distribution:

============ =================== ============================= ================================
function     formula             expected value                expected gradient
============ =================== ============================= ================================
k1           d                   KL(policy || reference)       0
k2           d^2 / 2             biased, close to the KL       that of KL(policy || reference)
k3           exp(-d) - 1 + d     KL(policy || reference)       that of KL(reference || policy)
weighted_k3  w * k3              KL(policy || reference)       that of KL(policy || reference)
============ =================== ============================= ================================

So use k1, detached, as a penalty inside a reward, and k2 or weighted_k3 as a loss. The estimators are elementwise and
know no mask. A caller whose padded columns may hold NaN or inf fills both log-probs there first, or the NaN comes back
through the gradient. Nothing is clamped.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute the log-ratio d, an unbiased value of either sign. logprobs, ref_logprobs: [...], in nats. Returns [...].

    As a loss it does nothing, because its expected gradient is 0.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute half the squared log-ratio. logprobs, ref_logprobs: [...], in nats. Returns [...], >= 0.

    It is biased as a value. As a loss its expected gradient is exactly that of the reverse KL(policy || reference).

    >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1250])
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Compute exp(-d) - 1 + d. logprobs, ref_logprobs: [...], in nats. Returns [...], >= 0.

    It is unbiased as a value, with little variance. As a loss its expected gradient is that of the forward
    KL(reference || policy).

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))  # exp(-.5) - 1 + .5
    tensor([0.1065])
    """
    log_ratio = logprobs - ref_logprobs
    return torch.expm1(-log_ratio) + log_ratio


def weighted_k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """Compute w * k3 with the importance weight w = exp(logprobs - old_logprobs), through which the gradient flows.

    logprobs, ref_logprobs: [...], in nats. old_logprobs: [...], of the policy that drew the tokens; None = the present
    one, so that w is 1 with the gradient of the sampling. Returns [...], >= 0. Drawn by the old policy, it is unbiased
    as a value, and as a loss its expected gradient is that of the reverse KL(policy || reference). Source: the bias
    correction of DeepSeek-V3.2 (2512.02556).

    >>> weighted_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.1065])
    >>> weighted_k3(torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([-1.6931]))  # w = 2
    tensor([0.2131])
    """
    drawn = logprobs.detach() if old_logprobs is None else old_logprobs
    return torch.exp(logprobs - drawn) * k3(logprobs, ref_logprobs)


def apply_estimator(
    estimator: Callable[..., Any], logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor
) -> Tensor:
    """Call an estimator, with ``old_logprobs`` too if one of its parameters has that name. All [...], in nats.

    >>> apply_estimator(k2, torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([-9.0]))
    tensor([0.1250])
    """
    asks = "old_logprobs" in inspect.signature(estimator).parameters
    found: Tensor = estimator(logprobs, ref_logprobs, **({"old_logprobs": old_logprobs} if asks else {}))
    return found
