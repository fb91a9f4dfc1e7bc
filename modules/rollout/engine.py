"""What every rollout engine promises: the sampling settings and the contract."""

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
        """Causal language model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; engines use it only to turn tokens into text."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion (end of sequence, end of turn)."""

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for; None = no limit."""


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn: logits / temperature, then the top_k largest, then the top_p nucleus, renormalised.

    Raises:
        ValueError: values out of range, all of them in one message.
    """

    temperature: float = 1.0  # >= 0; 0 = greedy
    top_p: float = 1.0  # (0, 1]; keep the smallest set of likeliest tokens with at least this much probability
    top_k: int = 0  # >= 0; keep this many likeliest tokens, 0 = all
    max_completion_length: int = 64  # >= 1, tokens, the end token included
    stop: tuple[str, ...] = ()  # a completion ends when its text holds one of these

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
    """Samples completions from the policy it was last synced with."""

    @abstractmethod
    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Sample from these weights from now on and stamp completions with ``version`` (optimiser updates so far)."""

    @abstractmethod
    def generate(
        self, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        """Sample ``num_generations`` completions of each prompt.

        Args:
            prompts: token ids of each prompt, none empty.
            num_generations: completions per prompt, >= 1.
            sampling: how tokens are drawn and when a completion ends.
            seeds: one per prompt; completion g of prompt i is a function of the weights, the prompt and ``seeds[i] +
                g`` alone, up to float noise, so keep the seeds of a call at least ``num_generations`` apart.

        Returns:
            per prompt, in order, its completions in the order of g. ``logprobs`` are of the distribution drawn from
            (after temperature, top_k and top_p); for greedy, of the softmax at temperature 1.

        Raises:
            ValueError: a request that cannot be sampled (no tokens, too few seeds, more tokens than positions), no weights
                synced, or non-finite logits.
        """
