"""The contract of every rollout engine, its sampling settings, and the checks made before anything is sampled."""

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modules.types import Completion


class SampledPolicy(Protocol):
    """The part of a policy that an engine reads."""

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; engines use it only to turn tokens into text."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion (end of sequence, end of turn)."""

    @property
    def max_positions(self) -> int | None:
        """How many tokens the model has positions for; None = no limit."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from logits / temperature, cut to ``top_k``, then to ``top_p``, and renormalised.

    Raises:
        ValueError: a value is out of range; one message names all of them.
    """

    temperature: float = 1.0  # >= 0; 0 = greedy
    top_p: float = 1.0  # (0, 1]; keep the smallest set of most likely tokens with at least this much probability
    top_k: int = 0  # >= 0; keep this many most likely tokens; 0 = all
    max_completion_length: int = 64  # >= 1, in tokens, the end token included
    stop: tuple[str, ...] = ()  # a completion ends when its text contains one of these strings

    def __post_init__(self) -> None:
        checks = {
            f"temperature {self.temperature} must be a finite number >= 0 (0 = greedy)": 0
            <= self.temperature
            < math.inf,
            f"top_p {self.top_p} must lie in (0, 1]": 0 < self.top_p <= 1,
            f"top_k {self.top_k} must be >= 0 (0 = off)": self.top_k >= 0,
            f"max_completion_length {self.max_completion_length} must be >= 1": self.max_completion_length >= 1,
            f"stop {self.stop!r} must be a tuple of non-empty strings": not isinstance(self.stop, str)
            and all(self.stop),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))
        if self.temperature > 0 and (self.top_p < 1 or self.top_k > 0):
            warnings.warn(
                f"sampling: top_p {self.top_p} and top_k {self.top_k} cut the distribution and renormalise it, so the "
                "sampler's log-probs differ from the trainer's; use top_p 1 and top_k 0 for reinforcement learning",
                stacklevel=3,
            )


class RolloutEngine(ABC):
    """Samples completions from the policy that it was last synced with."""

    @abstractmethod
    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Sample from these weights from now on.

        Args:
            policy: the policy with the weights.
            version: optimiser updates so far, which each completion keeps as ``policy_version``.
        """

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        """Sample ``num_generations`` completions of each prompt.

        Args:
            prompts: token ids of each prompt, none empty.
            num_generations: completions per prompt, >= 1.
            sampling: how tokens are drawn and when a completion ends.
            seeds: one per prompt. Up to float noise, completion g of prompt i depends only on the weights, the prompt
                and ``seeds[i] + g``. So keep the seeds of a call at least ``num_generations`` apart.

        Returns:
            for each prompt, in order, its completions in the order of g. Their ``logprobs`` belong to the distribution
            that was drawn from, after temperature, top_k and top_p; greedy ones to the softmax at temperature 1.

        Raises:
            ValueError: the request is impossible (see ``check_request``), no weights were synced, or logits are not
                finite.
        """


def check_request(
    policy: SampledPolicy, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
) -> None:
    """Refuse a request that cannot be sampled, with all its problems in one message.

    Raises:
        ValueError: too few generations, another number of seeds than prompts, an empty prompt, or a prompt too long for
            the model's positions.
    """
    problems = []
    if num_generations < 1:
        problems.append(f"num_generations {num_generations} must be >= 1")
    if len(seeds) != len(prompts):
        problems.append(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        problems.append(f"prompts {empty[:8]} have no tokens; start them with a token such as bos")
    longest, limit = max(map(len, prompts), default=0), policy.max_positions
    if limit is not None and longest + sampling.max_completion_length > limit:
        problems.append(
            f"the longest prompt ({longest} tokens) and max_completion_length ({sampling.max_completion_length}) make "
            f"{longest + sampling.max_completion_length} tokens, the model has {limit} positions; shorten either"
        )
    if problems:
        raise ValueError("generate: " + "; ".join(problems))
