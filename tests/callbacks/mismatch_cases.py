"""Runs whose engine samples from other probabilities than the trainer computes, and healthy ones."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from doctor_cases import Case, make

from callbacks import EngineMismatch
from modules import OnlineDPOModule, PPOModule
from modules.rollout import InProcessEngine, SampledPolicy, Sampling
from modules.types import Completion


@dataclass
class Copied:
    """A policy with weights of its own."""

    model: Any
    tokenizer: Any
    stop_token_ids: frozenset[int]
    max_positions: int | None


class Copying(InProcessEngine):
    """Samples from a copy of the weights; what a subclass does with them is its fault."""

    copies_weights = True
    dtype = torch.float32

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        if self._policy is None:
            model = copy.deepcopy(policy.model).to(self.dtype)
            self.copied = Copied(model, policy.tokenizer, policy.stop_token_ids, policy.max_positions)
        else:
            self.take(dict(policy.model.state_dict()))
        super().sync_weights(self.copied, version)

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        self.copied.model.load_state_dict(weights)


class Bfloat16(Copying):
    dtype = torch.bfloat16


class NeverSynced(Copying):
    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """The first weights stay."""


class OnePhaseOld(Copying):
    kept: dict[str, torch.Tensor] | None = None

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        if self.kept is not None:
            super().take(self.kept)
        self.kept = {name: weight.clone() for name, weight in weights.items()}


class HeadNotSynced(Copying):
    """The tied output head keeps the first weights, as with vLLM's CPU backend."""

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        super().sync_weights(policy, version)
        if self.copied.model.lm_head.weight is self.copied.model.model.embed_tokens.weight:
            self.copied.model.lm_head.weight = torch.nn.Parameter(self.copied.model.lm_head.weight.detach().clone())

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        head = self.copied.model.lm_head.weight.detach().clone()
        super().take(weights)
        self.copied.model.lm_head.weight.data.copy_(head)


class AddsUp(Copying):
    """Each sync leaves half as much noise again behind as the one before."""

    noise = 1e-3

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        self.noise *= 1.5
        for number, (name, weight) in enumerate(weights.items()):
            draw = torch.Generator().manual_seed(number)
            weights[name] = weight + self.noise * weight.std() * torch.randn(weight.shape, generator=draw)
        super().take(weights)


class OtherTemperature(InProcessEngine):
    def generate(
        self, prompts: Any, number: int, sampling: Sampling, seeds: Any, **rest: Any
    ) -> list[list[Completion]]:
        return super().generate(prompts, number, replace(sampling, temperature=0.8), seeds, **rest)


class RawLogprobs(InProcessEngine):
    """Draws at the temperature that it is asked for, and tells the log-probs before it."""

    def generate(
        self, prompts: Any, number: int, sampling: Sampling, seeds: Any, **rest: Any
    ) -> list[list[Completion]]:
        groups = super().generate(prompts, number, sampling, seeds, **rest)
        return [
            [self.tell(prompt, completion) for completion in group]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def tell(self, prompt: list[int], completion: Completion) -> Completion:
        assert self._policy is not None
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            table = self._policy.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return replace(completion, logprobs=table[range(len(completion.token_ids)), completion.token_ids].tolist())


class ShortPrompt(InProcessEngine):
    """Leaves out the first token of a prompt."""

    def generate(
        self, prompts: Any, number: int, sampling: Sampling, seeds: Any, **rest: Any
    ) -> list[list[Completion]]:
        return super().generate([prompt[1:] for prompt in prompts], number, sampling, seeds, **rest)


def build(seed: int, engine: Any = None, phases: int = 24, **options: Any) -> Case:
    options = {"data": {"prompts_per_phase": 16}, "engine": engine and engine()} | options
    trainer = {"max_epochs": phases, "gradient_clip_val": 1.0} | options.pop("trainer", {})
    return make(seed, trainer=trainer, **options)


HEALTHY: dict[str, Callable[..., Case]] = {
    "GRPO in process": build,
    "PPO in process": partial(build, method=PPOModule, num_generations=4),
    "online DPO in process": partial(build, method=OnlineDPOModule, num_generations=4, lr=1e-4),
    "GRPO, bf16-mixed": partial(build, trainer={"precision": "bf16-mixed"}),
    "GRPO, 16-bit copy": partial(build, engine=Bfloat16),
    "GRPO, 16-bit copy, temperature 0.7": partial(build, engine=Bfloat16, temperature=0.7),
    "GRPO, 16-bit copy, learning rate 0": partial(build, engine=Bfloat16, lr=0.0),
    "GRPO, 16-bit copy, few completions": partial(
        build, engine=Bfloat16, num_generations=2, data={"prompts_per_phase": 4}, phases=60
    ),
}
# name -> words of the cause that is told, and the run
FAULTS: dict[str, tuple[str, Callable[..., Case]]] = {
    "weights never synced": ("weights that are not synced", partial(build, engine=NeverSynced)),
    "weights one phase old": ("weights that are not synced", partial(build, engine=OnePhaseOld)),
    "tied head not synced": ("tied head", partial(build, engine=HeadNotSynced)),
    "another temperature": ("another temperature", partial(build, engine=OtherTemperature)),
    "raw log-probs": ("raw ones", partial(build, engine=RawLogprobs, temperature=0.7)),
    "prompt cut": ("positions, padding or prompts", partial(build, engine=ShortPrompt)),
    "adds up at learning rate 0": ("learning rate is 0", partial(build, engine=AddsUp, lr=0.0)),
}


def watch(case: Case) -> EngineMismatch:
    """Fit a case with the panel, which is returned."""
    module, data, trainer = case
    panel = EngineMismatch()
    trainer.callbacks.append(panel)  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data)
    return panel
