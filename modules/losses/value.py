"""The loss of a critic."""

import torch
from torch import Tensor

from modules.functional.masked import aggregate, masked_mean
from modules.functional.ranges import check_numbers
from modules.types import PolicyBatch


class ClippedValue:
    """1/2 max((V - return)^2, (V clipped to V_old +- clip - return)^2) per token, V_old the value at collection.

    Only a value that has moved towards its return by more than clip loses its gradient. Values in dropped columns never
    reach the loss, the metric or a gradient. Metric: ``value_clip_ratio``, the share of tokens without gradient, where
    the clipped term is larger. Source: Ziegler et al., arXiv 1909.08593, the released code.

    Args:
        clip: > 0, in units of the reward; None = the plain squared error.
    """

    def __init__(self, clip: float | None = 0.2) -> None:
        check_numbers("ClippedValue", clip=(clip, "(0, inf)"))
        self.clip = clip

    def __call__(self, values: Tensor, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the micro-batch's share [] of the mean over the step's tokens, and the metric.

        values: [N, Tc], V with gradient. Raises ValueError for shapes that differ.
        """
        mask, tensors = batch["completion_mask"], (values, batch["values"], batch["returns"])
        shapes = [tuple(x.shape) for x in (*tensors, mask)]
        if len(set(shapes)) > 1:
            raise ValueError(f"values, old values, returns and mask have shapes {shapes}, expected [N, Tc] each")
        now, old, returns = (x.masked_fill(~mask, 0.0) for x in tensors)
        plain = (now - returns).square()
        clipped = plain if self.clip is None else (now.clamp(old - self.clip, old + self.clip) - returns).square()
        loss = aggregate(0.5 * torch.maximum(plain, clipped), mask, batch["denominator"])
        return loss, {"value_clip_ratio": masked_mean(clipped > plain, mask)}
