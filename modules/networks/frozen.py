"""A model that scores and never learns."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.networks.lora import POLICY, adapter_parameters, using
from modules.networks.policy import Policy
from modules.types import PolicyBatch, PreferenceBatch


class Frozen:
    """The policy as it is now, without gradients, held outside ``nn.Module`` so that it enters neither checkpoints nor
    gradient reduction.

    A policy with adapters is not copied: its backbone never changes, so a copy of its own set of adapters is enough,
    put in place to score. (The reference is then the policy with the adapters it started from, not the bare backbone.)
    One that is its ``own`` is used by nobody else and not copied either. Copies of a module share it.
    """

    def __init__(self, policy: Policy, own: bool = False) -> None:
        self.policy = (
            policy if policy.has_adapters else (policy if own else copy.deepcopy(policy)).requires_grad_(False).eval()
        )
        self.weights = (
            {
                f"model.{name}": weight.detach().clone()
                for name, weight in adapter_parameters(policy.model, POLICY).items()
            }
            if policy.has_adapters
            else dict(self.policy.named_parameters())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self

    def to(self, device: torch.device) -> "Frozen":
        """Move the copy; modules call it in ``on_fit_start``, since Lightning does not know of it."""
        if self.policy.has_adapters:
            self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        else:
            self.policy.to(device)
        return self

    @torch.no_grad()
    def completion_logprobs(self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0) -> Tensor:
        """Log-probs [N, Tc] of each completion token, zero where ``completion_mask`` is False."""
        with self._in_place():
            return self.policy.completion_scores(batch, temperature).logprobs

    @torch.no_grad()
    def mix(self, policy: Policy, share: float) -> None:
        """Move towards ``policy``: share x its weights + (1 - share) x mine; 1 = take them over (TR-DPO, arXiv
        2404.09656).
        """
        theirs = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(theirs[name].detach(), share) if share < 1 else weight.copy_(theirs[name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """With adapters: my copy of them in the policy, and the policy's own back afterwards."""
        if not self.policy.has_adapters:
            yield
            return
        now = {name: weight for name, weight in self.policy.named_parameters() if name in self.weights}
        theirs = {name: weight.data for name, weight in now.items()}
        try:
            for name, weight in now.items():
                weight.data = self.weights[name]
            torch.clear_autocast_cache()  # it holds 16-bit copies by parameter, whatever its data are now
            with using(self.policy.model, POLICY):
                yield
        finally:
            for name, weight in now.items():
                weight.data = theirs[name]
            torch.clear_autocast_cache()
