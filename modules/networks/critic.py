"""The critic of PPO: a value head on the policy's backbone, on adapters of that backbone, or on its own backbone."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from modules.functional.ranges import check_numbers
from modules.networks.lora import (
    ADAPTERS,
    Lora,
    OtherBackbone,
    add_adapters,
    find_adapter_parameters,
    load_adapters,
    read_digest,
    using,
)
from modules.networks.policy import Policy, load_companion
from modules.networks.scalar_head import ScalarHead, load_head
from modules.types import PolicyBatch

VALUE = "value"  # name of the critic's adapters


@dataclass(frozen=True)
class Value:
    """Where PPO's critic comes from and how it learns.

    In TRL ``model`` is ``value_model`` and ``coef`` is ``vf_coef``. The learning-rate schedule runs on during the
    critic's warm-up. ``gradient_clip_val`` bounds the common gradient norm of policy and critic.

    Raises:
        ValueError: a value is out of range.
    """

    # None = a head on the policy's hidden states; a folder or hub id = its own model, such as an exported reward model
    model: str | None = None
    lr: float | None = None  # > 0, learning rate of the critic; None = that of the optimizer
    warmup_phases: int = 0  # >= 0, number of first phases in which only the critic learns
    coef: float = 0.1  # >= 0, weight of the value loss

    def __post_init__(self) -> None:
        check_numbers(
            "value",
            lr=(self.lr, "(0, inf)"),
            warmup_phases=(self.warmup_phases, "[0, inf)"),
            coef=(self.coef, "[0, inf)"),
        )


class Critic(nn.Module):
    """Estimates the value V [N, Tc] of the state in which each completion token is chosen, in units of the reward.

    Without ``model`` the critic is a linear head on the policy's hidden states, and the head starts at zero. With
    ``model``, backbone and head start from that model. A reward model gives its score, normalised as the reward is
    (InstructGPT, arXiv 2203.02155, appendix C.4); any other model gets a head at zero.

    A policy with adapters gets a critic with adapters. They lie on the policy's backbone when ``model`` is the policy's
    own folder, or an exported reward model with adapters of that backbone; the critic then goes on training these.

    Args:
        policy: the policy.
        model: see ``Value``.
        lora: the adapters of the policy.

    Raises:
        ValueError: ``model`` reads other tokens than the policy.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, policy: Policy, model: str | None = None, lora: Lora | None = None) -> None:
        super().__init__()
        self.backbone: Policy | None = None
        self.adapted = False  # True = the critic is a set of adapters on the policy's backbone
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
        """Put adapters on the policy's backbone if the model has the same backbone; otherwise load a backbone of its
        own.
        """
        adapters = Path(model) / ADAPTERS
        if policy.has_adapters and read_digest(adapters) is not None:
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
                f"value.model {model}: loaded as a model of its own, since it has no adapters of the policy's backbone"
            )
        self.backbone = own = load_companion(policy, model, "value.model", lora, may_know_more=True)
        output = own.model.get_output_embeddings()
        if output.weight is not own.model.get_input_embeddings().weight:
            output.requires_grad_(False)  # the critic never calls it

    def forward(self, policy: Policy, batch: PolicyBatch, states: Tensor) -> Tensor:
        """Return values [N, Tc], 0 where ``completion_mask`` is False.

        Args:
            policy: the policy that the critic was made for.
            batch: prompts and completions.
            states: the policy's ``token_states`` [N, Tc, H] of the batch. Only a critic that is a head on them reads
                them.
        """
        if self.backbone is not None:
            states = self.backbone.token_states(batch)
        elif self.adapted:
            with using(policy.model, VALUE):
                states = policy.token_states(batch)
        values: Tensor = (self.head(states)[..., 0] - self.mean) / self.std
        return values.masked_fill(~batch["completion_mask"], 0.0)

    def learned(self, policy: Policy) -> dict[str, nn.Parameter]:
        """Return the parameters that only the value loss trains, by name."""
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        return own | (find_adapter_parameters(policy.model, VALUE) if self.adapted else {})
