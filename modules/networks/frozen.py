"""A frozen copy of a model, which scores and never learns."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.networks.lora import POLICY, find_adapter_parameters, using
from modules.networks.policy import Policy
from modules.types import PolicyBatch, PreferenceBatch


class Frozen:
    """Keeps the policy as it is now, without gradients.

    It is no ``nn.Module``, so that checkpoints and gradient reduction leave it out. A copy of a module shares it.

    A policy with adapters is not copied, because its backbone never changes. Only its adapters are copied, and they are
    put in place while scoring. The reference is then the policy with its first adapters, not the bare backbone.

    Args:
        policy: the model to keep.
        own: True = nobody else uses ``policy``, so it is frozen itself and not copied.
    """

    def __init__(self, policy: Policy, own: bool = False) -> None:
        self.policy = (
            policy if policy.has_adapters else (policy if own else copy.deepcopy(policy)).requires_grad_(False).eval()
        )
        self.weights = (
            {
                f"model.{name}": weight.detach().clone()
                for name, weight in find_adapter_parameters(policy.model, POLICY).items()
            }
            if policy.has_adapters
            else dict(self.policy.named_parameters())
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self

    def to(self, device: torch.device) -> "Frozen":
        """Move the weights to ``device``. Modules call this in ``on_fit_start``, because Lightning does not know the
        weights.
        """
        if self.policy.has_adapters:
            self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        else:
            self.policy.to(device)
        return self

    @torch.no_grad()
    def completion_logprobs(self, batch: PolicyBatch | PreferenceBatch, temperature: float = 1.0) -> Tensor:
        """Return log-probs [N, Tc] of the completion tokens in nats, zero where ``completion_mask`` is False."""
        with self._in_place():
            return self.policy.completion_scores(batch, temperature).logprobs

    @torch.no_grad()
    def mix(self, policy: Policy, share: float) -> None:
        """Move the weights towards those of ``policy``: share x theirs + (1 - share) x mine (TR-DPO, arXiv 2404.09656).

        Args:
            policy: a policy with the same parameter names.
            share: weight of the policy, (0, 1]; 1 = copy its weights.
        """
        theirs = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(theirs[name].detach(), share) if share < 1 else weight.copy_(theirs[name])

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Put the kept adapters into the policy inside the ``with`` block, and the policy's own back afterwards."""
        if not self.policy.has_adapters:
            yield
            return
        now = {name: weight for name, weight in self.policy.named_parameters() if name in self.weights}
        theirs = {name: weight.data for name, weight in now.items()}
        try:
            for name, weight in now.items():
                weight.data = self.weights[name]
            torch.clear_autocast_cache()  # the cache holds 16-bit copies of the data that were just replaced
            with using(self.policy.model, POLICY):
                yield
        finally:
            for name, weight in now.items():
                weight.data = theirs[name]
            torch.clear_autocast_cache()
