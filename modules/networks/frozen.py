"""A model that scores and never learns."""

import copy

import torch

from modules.networks.policy import Policy
from modules.types import PolicyBatch, PreferenceBatch


class Frozen:
    """A no-grad copy of a policy, held outside ``nn.Module`` so that it enters neither checkpoints nor gradient reduction."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False).eval()

    def to(self, device: torch.device) -> "Frozen":
        """Move the copy; modules call it in ``on_fit_start``, since Lightning does not know of it."""
        self.policy.to(device)
        return self

    @torch.no_grad()
    def completion_logprobs(self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs [N, Tc] of each completion token, zero where ``completion_mask`` is False."""
        return self.policy.completion_scores(batch, temperature).logprobs
