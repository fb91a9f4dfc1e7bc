"""What a state is worth: a value head on the policy's backbone, on adapters of it, or on a backbone of its own."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from modules.functional.ranges import check_numbers
from modules.networks.policy import companion
from modules.networks.lora import (
    ADAPTERS,
    Lora,
    OtherBackbone,
    adapter_parameters,
    add_adapters,
    load_adapters,
    saved_digest,
    using,
)
from modules.networks.policy import Policy
from modules.networks.scalar_head import ScalarHead, load_head
from modules.types import PolicyBatch

VALUE = "value"  # name of the critic's adapters


@dataclass(frozen=True)
class Value:
    """Where PPO's critic comes from and how it learns. TRL: ``value_model``, ``vf_coef``.

    In the warm-up the scheduler goes on; ``gradient_clip_val`` bounds the norm of policy and critic together.

    Raises:
        ValueError: values out of range.
    """

    # None = a head on the policy's own states; a folder or hub id = a model of its own, such as an exported reward model
    model: str | None = None
    lr: float | None = None  # > 0, learning rate of the critic; None = the optimizer's
    warmup_phases: int = 0  # >= 0, first phases in which the critic alone learns
    coef: float = 0.1  # >= 0, weight of the value loss

    def __post_init__(self) -> None:
        check_numbers(
            "value",
            lr=(self.lr, "(0, inf)"),
            warmup_phases=(self.warmup_phases, "[0, inf)"),
            coef=(self.coef, "[0, inf)"),
        )


class Critic(nn.Module):
    """Values V [N, Tc] of the states in which completion tokens are chosen, in the units of the reward, undiscounted.

    Without a model of its own it is a linear head, which starts at 0, on the policy's states. With one, backbone and
    head start from it: from a reward model its score, normalised as the reward is (InstructGPT, arXiv 2203.02155,
    appendix C.4), else from a head at 0. Where the policy has adapters, so has the critic, on the policy's backbone: on
    its own start if ``model`` is ``policy``'s folder or an exported reward model with adapters of that backbone, which
    they continue.

    Args:
        policy: the policy.
        model: see ``Value``.
        lora: the policy's adapters.

    Raises:
        ValueError: a model whose tokens are not the policy's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, policy: Policy, model: str | None = None, lora: Lora | None = None) -> None:
        super().__init__()
        self.backbone: Policy | None = None
        self.adapted = False  # whether it is adapters of the policy's backbone
        if model is not None:
            self._take(policy, model, lora)
        weight, mean, std = (None, 0.0, 1.0) if model is None else load_head(model)
        self.head = ScalarHead(
            policy.model.config.hidden_size if self.backbone is None else self.backbone.model.config.hidden_size
        )
        self.head.weight.data.copy_(torch.zeros_like(self.head.weight) if weight is None else weight)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def _take(self, policy: Policy, model: str, lora: Lora | None) -> None:
        """Adapters on the policy's backbone where the model has the same one, else a backbone of its own."""
        adapters = Path(model) / ADAPTERS
        if policy.has_adapters and saved_digest(adapters) is not None:
            with suppress(OtherBackbone):
                load_adapters(policy.model, adapters, VALUE, trainable=True)
                self.adapted = True
                return
        if lora is not None and Path(model) == Path(policy.path):
            add_adapters(policy.model, lora, VALUE)
            self.adapted = True
            return
        if lora is not None:
            rank_zero_info(
                f"value.model {model}: a model of its own, since it has no adapters of the policy's backbone"
            )
        self.backbone = own = companion(policy, model, "value.model", lora, may_know_more=True)
        output = own.model.get_output_embeddings()
        if output.weight is not own.model.get_input_embeddings().weight:
            output.requires_grad_(False)  # never used

    def forward(self, policy: Policy, batch: PolicyBatch, states: Tensor) -> Tensor:
        """Values [N, Tc], 0 where ``completion_mask`` is False.

        Args:
            policy: the policy that it was made for.
            batch: prompts and completions.
            states: the policy's own ``token_states`` [N, Tc, H] of the batch, read by a critic that is a head on them.
        """
        if self.backbone is not None:
            states = self.backbone.token_states(batch)
        elif self.adapted:
            with using(policy.model, VALUE):
                states = policy.token_states(batch)
        values: Tensor = (self.head(states)[..., 0] - self.mean) / self.std
        return values.masked_fill(~batch["completion_mask"], 0.0)

    def learned(self, policy: Policy) -> dict[str, nn.Parameter]:
        """What the value loss alone trains, by name."""
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        return own | (adapter_parameters(policy.model, VALUE) if self.adapted else {})
