"""The loss of a value head: a sum over kept tokens, divided once by the caller's denominator."""

import torch
from torch import Tensor

from modules.functional.masked import aggregate, masked_mean

Metrics = dict[str, Tensor]


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    denominator: Tensor | float,
    clip: float | None = 0.2,
) -> tuple[Tensor, Metrics]:
    """1/2 max((V - return)^2, (V clipped to V_old +- clip - return)^2) per token.

    values [N, T]: V, with gradient. old_values, returns: [N, T], V_old of the rollout and the target of V, in units of
    the reward,
    without gradient. mask [N, T]: bool keep-mask, or float weights >= 0 (see ``aggregate``). denominator []: kept
    tokens of the whole
    optimiser step on all ranks. clip: > 0, in units of the reward, or None for the plain squared error. Returns (loss
    [], metrics): value_clip_ratio, the share of kept tokens where the clipped term is the larger one, which have no
    gradient. Whatever stands in dropped columns reaches neither loss, nor metric, nor gradient. Raises ValueError for
    shapes that differ and for clip <= 0. Only a V that has moved towards its return by more than clip loses its
    gradient. Source: Ziegler et al. 2019 (1909.08593), its code.
    """
    shapes = [tuple(x.shape) for x in (values, old_values, returns, mask)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"clipped_value_loss: values, old_values, returns and mask have shapes {shapes}, expected the same [N, T] "
            "each."
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"clipped_value_loss: clip is {clip}, expected > 0; use None to switch it off.")
    dropped = mask == 0
    values, old_values, returns = (x.masked_fill(dropped, 0.0) for x in (values, old_values, returns))
    plain = (values - returns).square()
    clipped = plain if clip is None else (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = aggregate(0.5 * torch.maximum(plain, clipped), mask, denominator)
    return loss, {"value_clip_ratio": masked_mean(clipped > plain, ~dropped)}
