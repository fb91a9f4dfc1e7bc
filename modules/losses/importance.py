"""Weights for completions that an engine sampled from other probabilities than the trainer computes."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modules.functional.ranges import check_numbers
from modules.types import PolicyBatch


@dataclass(frozen=True)
class ImportanceWeights:
    """Weighs sampled tokens by w = p_trainer / p_sampler, both at collection, so that the gradient is the trainer's.

    An engine with the same weights in another precision or with other kernels samples from slightly other
    probabilities. Advantages are multiplied by w, so the policy loss is; a KL and a value loss are not. Truncation
    gives a little bias for a bounded variance (IMPALA, arXiv 1802.01561, section 4.1). TRL:
    ``vllm_importance_sampling_mode`` and ``_clip_max``. Where both compute alike, w is 1. So a cap below 1 would only
    scale the loss, or with ``mask`` leave out every token.

    Raises:
        ValueError: a value is out of range.
    """

    level: Literal["token", "sequence"] = "token"  # sequence: w is the product over the tokens of a completion
    cap: float = 2.0  # >= 1, largest weight
    beyond: Literal["truncate", "mask"] = "truncate"  # what a larger weight becomes: the cap, or 0

    def __post_init__(self) -> None:
        check_numbers("importance", cap=(self.cap, "[1, inf)"))
        if self.level not in ("token", "sequence") or self.beyond not in ("truncate", "mask"):
            raise ValueError(
                f"importance: level is token or sequence and beyond truncate or mask, got {self.level}, {self.beyond}"
            )

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Compute w [N, Tc] from the ``old_logprobs`` and ``sampler_logprobs`` of a phase; 0 at dropped columns."""
        mask = batch["completion_mask"]
        log_weights = (batch["old_logprobs"] - batch["sampler_logprobs"]).masked_fill(~mask, 0.0)
        if self.level == "sequence":
            log_weights = log_weights.sum(1, keepdim=True).expand_as(mask)
        weights = log_weights.exp()
        bounded = weights.clamp(max=self.cap)
        return (bounded if self.beyond == "truncate" else weights * (weights <= self.cap)).masked_fill(~mask, 0.0)


def choose_importance(importance: ImportanceWeights | bool | None, copies_weights: bool) -> ImportanceWeights | None:
    """Return the weights to use; None = all tokens weigh the same.

    Args:
        importance: weights, or whether to use the default ones; None = only if ``copies_weights``.
        copies_weights: whether the engine samples from a copy of the policy's weights.
    """
    if isinstance(importance, ImportanceWeights):
        return importance
    return ImportanceWeights() if (copies_weights if importance is None else importance) else None
