"""Policy-gradient losses from sampled completions: a sum over kept tokens (or rows), divided once by the caller's
denominator.

Shared arguments. logprobs [N, T]: log-probs of the sampled tokens now, with gradient. old_logprobs [N, T]: those of the
policy that defines the ratio, without gradient. advantages [N, T] (or [N, 1], one for the whole row). mask [N, T]: bool
keep-mask, or float weights >= 0 (see ``aggregate``). denominator []: kept tokens (or rows) of the whole optimiser step
on all ranks. All log-probs are in nats; ratio = exp(logprobs - old_logprobs), never clamped before the exponential.

Each loss returns (loss [], metrics): metrics are detached scalars. ``approx_kl`` is the mean over kept tokens of ratio
- 1 - log ratio, the k3 estimate of KL(old || now). Whatever stands in dropped columns reaches neither the loss, nor a
  metric, nor a gradient.
"""

import torch
from torch import Tensor

from modules.functional.advantages import group_center
from modules.functional.logprobs import sequence_logprobs
from modules.functional.masked import aggregate, masked_mean

Metrics = dict[str, Tensor]


def _check_shapes(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, advantages: Tensor) -> None:
    """One advantage per row given as [N] would silently broadcast along the wrong axis when N == T."""
    if logprobs.shape != old_logprobs.shape or logprobs.shape != mask.shape or logprobs.dim() != advantages.dim():
        shapes = [tuple(x.shape) for x in (logprobs, old_logprobs, mask, advantages)]
        raise ValueError(
            f"policy loss: logprobs, old_logprobs, mask and advantages have shapes {shapes}, expected [N, T] each; "
            "give one advantage per row as [N, 1]."
        )


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(now / old) [N, T], 0 at dropped columns: filled before the subtraction and before any exp, for the gradient's
    sake.
    """
    dropped = mask == 0
    return logprobs.masked_fill(dropped, 0.0) - old_logprobs.masked_fill(dropped, 0.0)


def _approx_kl(log_ratio: Tensor, mask: Tensor) -> Tensor:
    log_ratio = log_ratio.detach()
    return masked_mean(torch.expm1(log_ratio) - log_ratio, mask != 0)


def _clipped_losses(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _clip_metrics(ratio: Tensor, advantages: Tensor, keep: Tensor, clip_low: float, clip_high: float) -> Metrics:
    """Shares of the kept entries whose gradient the clip cuts: below, above, and either."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    flags = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    return {name: masked_mean(flag, keep) for name, flag in flags.items()}


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token (PPO, 1707.06347, eq. 7, as a loss).

    Tensors [N, T] as above. clip_low, clip_high: >= 0, equal in PPO and GRPO, 0.2 / 0.28 in DAPO (2503.14476).
    dual_clip: None, or c > 1 to bound the loss of a token with A < 0 by -c A (1912.09729). Metrics:
    clip_ratio/low_mean, clip_ratio/high_mean and clip_ratio/region_mean (shares of kept tokens whose gradient clip_low
    or clip_high cuts), approx_kl. Raises ValueError for shapes that differ and for dual_clip <= 1.
    """
    _check_shapes(logprobs, old_logprobs, mask, advantages)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"clipped_policy_loss: dual_clip is {dual_clip}, expected > 1; use None to switch it off.")
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = advantages.expand_as(logprobs).masked_fill(mask == 0, 0.0)
    ratio = log_ratio.masked_fill(advantages == 0, 0.0).exp()  # an overflow times an advantage of 0 would be NaN
    losses = _clipped_losses(ratio, advantages, clip_low, clip_high)  # [N, T]
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    metrics = _clip_metrics(ratio, advantages, mask != 0, clip_low, clip_high)
    return aggregate(losses, mask, denominator), metrics | {"approx_kl": _approx_kl(log_ratio, mask)}


def sequence_clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Metrics]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), one per row, with s = exp(mean over kept tokens of log ratio)
    (GSPO, 2507.18071).

    Tensors [N, T] as above; A is the mean advantage of the row's kept tokens, a row with none adds 0, float weights in
    mask weigh both means, and denominator counts rows. clip_low, clip_high: >= 0; the paper uses 3e-4 and 4e-4, since s
    is a geometric mean and
    0.2 hardly ever clips. Metrics: as in clipped_policy_loss, with clip_ratio/* over rows. Raises ValueError for shapes
    that differ.
    """
    _check_shapes(logprobs, old_logprobs, mask, advantages)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    ratio = masked_mean(log_ratio, mask, dim=-1).exp()  # [N]
    advantages = masked_mean(advantages.expand_as(logprobs), mask, dim=-1)  # [N]
    keep = (mask != 0).any(-1)  # [N]
    losses = _clipped_losses(ratio, advantages, clip_low, clip_high)
    metrics = _clip_metrics(ratio, advantages, keep, clip_low, clip_high)
    return aggregate(losses, keep, denominator), metrics | {"approx_kl": _approx_kl(log_ratio, mask)}


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """-stop_gradient(min(ratio, 1 + clip_high)) A logprobs per token: a capped weight, so no token loses its gradient.

    Tensors [N, T] as above. clip_high: >= 0, on top of 1; no lower bound, as the paper tunes only the upper one.
    Metrics: cispo_clip_ratio (share of kept tokens whose weight is capped, whatever the sign of A), approx_kl. Raises
    ValueError for
    shapes that differ. Source: MiniMax-M1 (2506.13585, eqs. 4-5).
    """
    _check_shapes(logprobs, old_logprobs, mask, advantages)
    dropped = mask == 0
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    ratio = log_ratio.detach().exp()
    advantages = advantages.expand_as(logprobs).masked_fill(dropped, 0.0)
    losses = -ratio.clamp(max=1 + clip_high) * advantages * logprobs  # [N, T]
    metrics = {
        "cispo_clip_ratio": masked_mean(ratio > 1 + clip_high, ~dropped),
        "approx_kl": _approx_kl(log_ratio, mask),
    }
    return aggregate(losses, mask, denominator), metrics


def ratio_moments(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far the ratio is from 1 over kept tokens: ratio/mean, ratio/square (mean of (ratio - 1)^2), ratio/deviation
    (of |ratio - 1|).

    logprobs, old_logprobs, mask: [N, T], see the module. Each metric is [], detached; without kept tokens they are 1,
    0, 0. Weighted by kept tokens they average over micro-batches; then ratio/square - (ratio/mean - 1)^2 is the
    variance of the ratio over all of them. Raises ValueError for shapes that differ.
    """
    _check_shapes(logprobs, old_logprobs, mask, logprobs)
    keep = mask != 0
    excess = torch.expm1(_log_ratio(logprobs.detach(), old_logprobs.detach(), mask))
    means = {
        "mean": 1 + masked_mean(excess, keep),
        "square": masked_mean(excess.square(), keep),
        "deviation": masked_mean(excess.abs(), keep),
    }
    return {f"ratio/{name}": value for name, value in means.items()}


def mirror_descent_loss(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, rewards: Tensor, group: Tensor, tau: float
) -> tuple[Tensor, Metrics]:
    """Mean over rows of -(r - mean of the group's r) l + tau/2 (l - l_old)^2, with l the whole row's summed log-prob.

    logprobs, old_logprobs, mask: [N, T], see the module; old_logprobs are those of the previous iterate, which is also
    the reference.
    rewards: [N]; NaN (unscorable) leaves the row its squared term only. group: int [N]; the rows of a group are given
    together.
    tau: >= 0; the square grows like length squared, so keep it small. There is no denominator: all N rows count.
    Metrics: approx_kl. Raises ValueError for shapes that differ. Source: Kimi k1.5 (2501.12599, section 2.3.2, eq. 3),
    r-bar standing for tau log Z.
    """
    _check_shapes(logprobs, old_logprobs, mask, logprobs)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    advantages = group_center(rewards, group)  # [N]
    losses = -advantages * sequence_logprobs(logprobs, mask) + 0.5 * tau * sequence_logprobs(log_ratio, mask).square()
    return losses.mean(), {"approx_kl": _approx_kl(log_ratio, mask)}
