"""What the packages hand each other: batches (dicts of tensors) and rollout records. Imports torch only.

Letters: N sequences, P unique prompts, T tokens (Tp of a prompt, Tc of a completion), G completions per prompt, V
vocabulary. Every mask is a keep-mask (True = counts). A per-token tensor is aligned to its own token: ``logprobs[i,
t]`` is the log-probability of the token at ``[i, t]``. Floats are fp32.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor

# How a lone instruction reads without a chat template: Stanford Alpaca's prompts, which end without a line break.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


# How an answer to a prompt that should, or should not, be refused is judged: XSTest (arXiv 2308.01263).
FULL_COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL = REFUSAL_LABELS = (
    "1_full_compliance",
    "2_full_refusal",
    "3_partial_refusal",
)

# How well a model knows a fact: SliCK (arXiv 2405.05904, section 3).
Knowledge = Literal["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
KNOWLEDGE_CATEGORIES: tuple[Knowledge, ...] = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")


class InstructionBatch(TypedDict):
    """Rows of tokens with the supervised ones marked. Padding is on the right."""

    input_ids: Tensor  # int [N, T]
    attention_mask: Tensor  # bool [N, T]
    loss_mask: Tensor  # bool [N, T], True = supervised
    denominator: Tensor  # [], supervised tokens of the whole optimiser step on all ranks
    position_ids: NotRequired[Tensor]  # int [N, T], packed rows only


class PreferenceBatch(TypedDict):
    """Examples: each a prompt with completions that are ranked against each other, or with one completion that is
    labelled.

    Two completions of a prompt make a pair where their ranks differ.
    """

    prompt_ids: Tensor  # int [P, Tp]
    prompt_mask: Tensor  # bool [P, Tp]
    completion_ids: Tensor  # int [N, Tc]
    completion_mask: Tensor  # bool [N, Tc], the end token included
    prompt_index: Tensor  # int [N], the prompt of each completion
    # int [N], 0 = best; a labelled completion: 0 = desirable, 1 = undesirable; -1 = filler, computed and not counted
    rank: Tensor
    row: Tensor  # int [N], the completion's number in its data set, by which its reference log-probs are kept
    denominator: Tensor  # [], examples of the whole optimiser step on all ranks
    margin: NotRequired[Tensor]  # [P], how much better the better completion should score
    ref_logprobs: NotRequired[Tensor]  # [N], sequence sums under the frozen reference


class PromptBatch(TypedDict):
    """Prompts to sample from: equal-length lists, one entry per prompt."""

    uid: list[str]  # names the prompt instance, the same in every phase and on every rank count
    prompt: list[str]  # as rendered, for people
    prompt_ids: list[list[int]]  # as the model reads it
    answer: list[str | None]
    source: list[str]  # the data set, for per-source metrics
    info: list[dict[str, Any]]  # the row's other columns
    update: NotRequired[
        list[int]
    ]  # in training: the optimiser update of a pass, from 0, that learns from the prompt's completions


class PolicyBatch(TypedDict):
    """Sampled completions with what a policy loss needs. Prompts and completions are padded on the right."""

    prompt_ids: Tensor  # int [P, Tp]
    prompt_mask: Tensor  # bool [P, Tp]
    completion_ids: Tensor  # int [N, Tc]
    completion_mask: Tensor  # bool [N, Tc], up to and including the end token
    prompt_index: Tensor  # int [N]
    old_logprobs: Tensor  # [N, Tc], at collection, in the trainer's numerics
    advantages: Tensor  # [N, Tc]
    rewards: Tensor  # [N], NaN = unscorable
    group: Tensor  # int [N], rows of one prompt instance share a number
    denominator: Tensor  # [], what the objective divides by, over the whole optimiser step and all ranks
    row_count: NotRequired[Tensor]  # [N], what each row adds to the denominator; of a whole phase only
    active: NotRequired[Tensor]  # bool [N], False = zero gradient, may be left out of compute; of a whole phase only
    rank: NotRequired[
        Tensor
    ]  # int [N], where completions are compared: 0 = best, 1 = worst of its prompt, -1 = not compared
    ref_logprobs: NotRequired[Tensor]  # [N, Tc], frozen reference
    sampler_logprobs: NotRequired[Tensor]  # [N, Tc], the engine's own
    values: NotRequired[Tensor]  # [N, Tc], at collection, of the state that each token was drawn in
    returns: NotRequired[Tensor]  # [N, Tc], what the values learn
    stopped: NotRequired[Tensor]  # bool [N], ended by itself instead of by the budget
    update: NotRequired[Tensor]  # int [N], see ``PromptBatch``; of a whole phase only
    ptx: NotRequired[InstructionBatch]  # texts that the policy must not forget, with a denominator of their own


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]  # the end token included when it was sampled
    logprobs: list[float]  # of each token under the distribution it was drawn from; as long as token_ids
    text: str  # decoded, without special tokens and without a stop string
    finish: Literal["stop", "length", "abort"]  # end token or stop string; token budget used up; given up
    policy_version: int = 0  # optimiser updates behind the weights that sampled it


@dataclass(frozen=True)
class Rollout:
    """One prompt with one sampled completion and its scores."""

    uid: str
    prompt: str
    prompt_ids: list[int]
    answer: str | None
    completion: Completion
    group: int  # rollouts of one prompt instance share a number
    rewards: dict[str, float | None]  # by reward name; None = unscorable
    reward: float | None  # what is trained on; None = left out of its group
    info: dict[str, Any] | None = None  # the row's other columns
    entropy: float | None = None  # nats per token, mean over the completion, of the full next-token distribution
    kl: float | None = None  # sum over the completion of log pi - log pi_start, in nats


@dataclass(frozen=True)
class ScoredPair:
    """Two completions of a prompt, the chosen one better by the data, with the scores that a model gives them."""

    prompt: str  # equal = the same prompt
    prompt_length: int  # tokens
    chosen: str
    rejected: str
    chosen_length: int  # tokens, the end token included
    rejected_length: int
    chosen_score: float  # a reward, or the implicit reward of a policy
    rejected_score: float
    margin: float | None = None  # strength of the preference as the data say it


@dataclass(frozen=True)
class Outcome:
    """What metrics need of a rollout; small, so that it can be gathered from all ranks."""

    uid: str  # outcomes of one prompt instance share it
    reward: float | None  # None = unscorable
    rewards: dict[str, float | None]
    length: int  # tokens of the completion, the end token included
    stopped: bool  # ended by itself
    entropy: float | None  # nats per token
    right: bool | None = None  # None = not asked or unscorable
    kl: float | None = None  # nats, sum over the completion; None = no reference


@dataclass
class Record:
    """What a module leaves for callbacks to read, on this rank: every module holds one, as ``record``.

    A phase is one rollout and the updates made from it, so one epoch. "The evaluation" is a validation or a test.
    """

    # From the first micro-batch of a phase to the end of its epoch; in ``predict`` of the last batch. In checkpoints.
    rollouts: list[Rollout] = field(default_factory=list)
    # Numbers of the phase by name, logged at its end as ``train/<name>``; valid as long as ``rollouts``. In checkpoints.
    metrics: dict[str, float] = field(default_factory=dict)
    # Completions of the evaluation's last batch, in ``on_validation_batch_end`` and ``on_test_batch_end``; None = the
    # module samples no held-out rows.
    held_out: list[Rollout] | None = None
    # Scored pairs of the evaluation's last batch, in the same hooks.
    pairs: list[ScoredPair] = field(default_factory=list)
    # The evaluation's batches so far, sampled and greedy, until ``on_validation_epoch_end`` of the module.
    sampled: list[Outcome] = field(default_factory=list)
    greedy: list[Outcome] = field(default_factory=list)
    # Rows that the last batch of ``predict`` labelled: ``row``, ``uid``, ``label`` (None = invalid), and more by module.
    labels: list[dict[str, Any]] = field(default_factory=list)


@runtime_checkable
class HasRecord(Protocol):
    """A module that leaves a record for callbacks."""

    record: Record


@runtime_checkable
class HasRowsInOrder(Protocol):
    """A DataModule that gives its rows in order, as reward models and audits read them."""

    val: object | None  # None = no held-out rows

    def in_order(self, stage: Any) -> Any:
        """This rank's rows of ``train``, ``val`` or ``calibration`` in batches, each once; as many batches on every rank."""


class Reward(ABC):
    """Scores finished completions. ``name`` labels its metric ``rewards/<name>/mean``."""

    name: str

    @abstractmethod
    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """One score per rollout, in order; None where the rollout cannot be scored."""
