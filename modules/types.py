"""What the packages hand to each other: batches (dicts of tensors) and records of rollouts. Imports torch only.

Letters: N sequences, P unique prompts, T tokens (Tp of a prompt, Tc of a completion), G completions per prompt, V
vocabulary. Every mask is a keep-mask (True = counts). A per-token tensor is aligned to its own token: ``logprobs[i,
t]`` is the log-probability of the token at ``[i, t]``. Floats are fp32.
"""

import copy
import inspect
import re
import reprlib
import threading
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, NotRequired, Protocol, SupportsFloat, TypedDict, cast, runtime_checkable

from torch import Tensor

# The prompt of a single instruction without a chat template: Stanford Alpaca's, which ends without a line break.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


# A prompt that ends inside a thought: the completion goes on with it.
OPENED_THOUGHT = re.compile(r"<think>\s*\Z")

LARGEST = 3.4e38  # largest size of a score, which becomes a float32
SLOW = 30.0  # seconds after which a warning names a reward that is still scoring

# Names under which a reward function may ask for the gold answers.
ANSWERS = ("answers", "answer", "ground_truth", "solution")

# Kinds of answers to a prompt that should, or should not, be refused: XSTest (arXiv 2308.01263).
FULL_COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL = REFUSAL_LABELS = (
    "1_full_compliance",
    "2_full_refusal",
    "3_partial_refusal",
)

# How well a model knows a fact: SliCK (arXiv 2405.05904, section 3).
Knowledge = Literal["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
KNOWLEDGE_CATEGORIES: tuple[Knowledge, ...] = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class EngineError(RuntimeError):
    """Tells in one sentence why an engine cannot go on: its weights, its processes or its server."""


class InstructionBatch(TypedDict):
    """Rows of tokens, with the supervised tokens marked. Padding is on the right."""

    input_ids: Tensor  # int [N, T]
    attention_mask: Tensor  # bool [N, T]
    loss_mask: Tensor  # bool [N, T], True = supervised
    denominator: Tensor  # [], number of supervised tokens of the whole optimiser step on all ranks
    position_ids: NotRequired[Tensor]  # int [N, T], only in packed rows; each document starts at 0


class PreferenceBatch(TypedDict):
    """Prompts with ranked completions, or with one labelled completion each.

    Two completions of a prompt make a pair if their ranks differ.
    """

    prompt_ids: Tensor  # int [P, Tp]
    prompt_mask: Tensor  # bool [P, Tp]
    completion_ids: Tensor  # int [N, Tc]
    completion_mask: Tensor  # bool [N, Tc], the end token included
    prompt_index: Tensor  # int [N], row of each completion's prompt
    # int [N], 0 = best; of a labelled completion: 0 = desirable, 1 = undesirable; -1 = filler, computed but not counted
    rank: Tensor
    row: Tensor  # int [N], number of the completion in its data set; its reference log-probs are kept by this number
    denominator: Tensor  # [], number of examples of the whole optimiser step on all ranks
    margin: NotRequired[Tensor]  # [P], how much better the better completion should score
    ref_logprobs: NotRequired[Tensor]  # [N], sequence sums under the frozen reference
    # For losses that ask for them: the step's completions on this rank, each after the prompt of another example, in as
    # many batches as the step has micro-batches. In the step's first micro-batch; empty in the others.
    mismatched: NotRequired[list["PreferenceBatch"]]


class PromptBatch(TypedDict):
    """Prompts to sample from: lists of equal length, one entry per prompt."""

    uid: list[str]  # name of the prompt instance, the same in every phase and for any number of ranks
    prompt: list[str]  # the rendered text, for people
    prompt_ids: list[list[int]]  # the tokens, for the model
    answer: list[str | None]  # the gold answer; None = the row has none
    source: list[str]  # name of the data set, for metrics per source
    info: list[dict[str, Any]]  # the row's other columns
    # Whether a thought is asked for, by a flag or a setting of the chat template; None = nothing is said, so it is.
    thinks: NotRequired[list[bool | None]]
    # In training: the optimiser update of each pass that learns from the prompt's completions, counted from 0.
    update: NotRequired[list[int]]
    updates: NotRequired[int]  # In training: how many optimiser updates the phase makes, over all its passes.
    # In training: draws this rank's next stretch of prompts, for methods that sample more in a phase; every rank must
    # draw equally often.
    further: NotRequired[Callable[[], "PromptBatch"]]
    # In training: draws this rank's prompts of the phase that comes so many phases later, as that phase will.
    ahead: NotRequired[Callable[[int], "PromptBatch"]]
    # For distillation: the tokens of the row's own completion, its end token included, and those of the prompt that a
    # conditioned teacher reads in place of ``prompt_ids``.
    completion_ids: NotRequired[list[list[int]]]
    teacher_prompt_ids: NotRequired[list[list[int]]]


class PolicyBatch(TypedDict):
    """Sampled completions with what a policy loss needs. Prompts and completions are padded on the right."""

    prompt_ids: Tensor  # int [P, Tp]
    prompt_mask: Tensor  # bool [P, Tp]
    completion_ids: Tensor  # int [N, Tc]
    completion_mask: Tensor  # bool [N, Tc], what the policy sampled, up to and including the end token
    prompt_index: Tensor  # int [N], row of each completion's prompt
    # [N, Tc], at collection, computed by the trainer; in a phase of one update they may be left to its own forward pass
    old_logprobs: NotRequired[Tensor]
    advantages: Tensor  # [N, Tc]
    rewards: Tensor  # [N], NaN = unscorable
    group: Tensor  # int [N], completions of one prompt instance share a number
    denominator: Tensor  # [], what the objective divides by, over the whole optimiser step and all ranks
    row_count: NotRequired[Tensor]  # [N], what each row adds to the denominator; only in the batch of a whole phase
    # bool [N], False = its gradient is zero, so it need not be computed; only in the batch of a whole phase
    active: NotRequired[Tensor]
    # int [N], for methods that compare completions: 0 = best, 1 = worst of its prompt, -1 = not compared
    rank: NotRequired[Tensor]
    ref_logprobs: NotRequired[Tensor]  # [N, Tc], of the frozen reference
    sampler_logprobs: NotRequired[Tensor]  # [N, Tc], computed by the engine
    # bool [N, Tc], every token of a completion, those that were given too; default: the policy sampled them all
    attended: NotRequired[Tensor]
    values: NotRequired[Tensor]  # [N, Tc], at collection; value of the state before each token
    returns: NotRequired[Tensor]  # [N, Tc], the targets of the values
    stopped: NotRequired[Tensor]  # bool [N], True = ended by itself, False = cut off
    # Only where ``old_logprobs`` are left to the update: the number of each completion in the rollouts of the phase,
    # below 0 = it is of the phase before, int [N]; and the tokens that earlier weights sampled, bool [N, Tc], by default
    # none, whose old log-probs are the sampler's.
    row: NotRequired[Tensor]
    stale: NotRequired[Tensor]
    update: NotRequired[Tensor]  # int [N], see ``PromptBatch``; only in the batch of a whole phase
    # bool [N], False = teaches nothing, because it has no score or was cut off; default: those that have a score
    teaches: NotRequired[Tensor]
    # Only in the batch of a whole phase: what a KL inside the reward takes from each token [N, Tc]; the scores of the
    # reward's parts [N, C], NaN = unscorable, and their weights [C].
    penalties: NotRequired[Tensor]
    parts: NotRequired[Tensor]
    part_weights: NotRequired[Tensor]
    # bool [P], False = another piece of the micro-batch counts the prompt's tokens; only in a piece, see ``cut_to_pieces``
    prompt_counts: NotRequired[Tensor]
    ptx: NotRequired[InstructionBatch]  # texts that the policy must not forget, with their own denominator
    # For distillation: the prompts that a conditioned teacher reads [P, Tq], and the row of each completion in the
    # table of what the teacher says, int [N].
    teacher_prompt_ids: NotRequired[Tensor]
    teacher_prompt_mask: NotRequired[Tensor]
    lesson: NotRequired[Tensor]


def find_attended(batch: PreferenceBatch | PolicyBatch) -> Tensor:
    """Return the keep-mask [N, Tc] of every token of the completions, whoever wrote it."""
    attended: Tensor = cast(PolicyBatch, batch).get("attended", batch["completion_mask"])
    return attended


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]  # includes the end token if it was sampled
    # Log-prob of each token under the distribution it was drawn from, 0 of a token that was given; as long as token_ids
    logprobs: list[float]
    # The decoded tokens, without end and pad tokens, and without a stop string unless it was to be kept. Of a
    # completion with calls of tools: its last turn.
    text: str
    finish: Literal["stop", "length", "abort"]  # end token or stop string; token budget used up; given up
    policy_version: int = 0  # number of optimiser updates before the weights that sampled it, or its last token
    # False = given and not sampled: a tool's result, or the text that stops a thought; None = every token was sampled
    sampled: list[bool] | None = None
    transcript: str | None = None  # all turns with their calls and results; None = there is no other turn than ``text``
    earned: float | None = None  # what the environment's ``get_reward()`` gave; None = nothing
    # The version of each token, as long as token_ids; None = ``policy_version`` sampled them all.
    versions: list[int] | None = None

    @property
    def token_versions(self) -> list[int]:
        """The ``policy_version`` that sampled each token."""
        return self.versions or [self.policy_version] * len(self.token_ids)

    @property
    def sampled_ids(self) -> list[int]:
        """The tokens that the policy sampled, the end tokens included."""
        if self.sampled is None:
            return self.token_ids
        return [token for token, sampled in zip(self.token_ids, self.sampled, strict=True) if sampled]

    @property
    def length(self) -> int:
        """How many tokens the policy sampled."""
        return len(self.sampled_ids)


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
    reward: float | None  # the reward to train on; None = left out of its group
    info: dict[str, Any] | None = None  # the row's other columns
    entropy: float | None = None  # of the whole next-token distribution, mean over the completion, nats per token
    kl: float | None = None  # sum over the completion of log pi - log pi_start, nats
    source: str = ""  # name of the data set
    thinks: bool | None = None  # see ``PromptBatch``
    # The seed with which the next phase continues the completion, see ``PartialRollouts``; None = it is complete.
    seed: int | None = None
    # What the trainer computes for the completion at collection: the log-prob of each token at the sampling temperature,
    # as long as its token_ids, and the optimiser updates before the weights that did. None = nothing was computed.
    trainer_logprobs: list[float] | None = None
    trainer_version: int = 0
    # At collection: sum of the estimate k3 of the KL to the start policy, over the tokens that the weights of that time
    # sampled or that others sampled ahead of time. None = no reference.
    k3: float | None = None

    @property
    def text(self) -> str:
        """The completion as rewards read it: with the ``<think>`` in front that the prompt ends with, if it does."""
        return find_opened_thought(self.prompt) + self.completion.text

    @property
    def final_text(self) -> str:
        """The part of ``text`` that may hold the answer, see ``cut_final_text``."""
        return cut_final_text(self.text)


def find_opened_thought(prompt: str) -> str:
    """Return the ``<think>`` that a prompt ends with, which belongs to the text of its completion; "" without one."""
    opened = OPENED_THOUGHT.search(prompt)
    return opened[0] if opened else ""


def cut_final_text(text: str) -> str:
    """Return the part of a text that may hold the answer: what follows the last ``</think>``, or all of it.

    A text that opens ``<think>`` and never closes it gives "". An answer inside the reasoning must not count, because
    the reader never sees it.

    >>> cut_final_text("<think>2 or 3</think>4"), cut_final_text("<think>so maybe 5")
    ('4', '')
    """
    final = text.rpartition("</think>")[2]
    return "" if "<think>" in final else final


@dataclass(frozen=True)
class ScoredPair:
    """Two completions of a prompt with a model's scores; the chosen one is better by the data."""

    prompt: str  # equal = the same prompt
    prompt_length: int  # tokens
    chosen: str
    rejected: str
    chosen_length: int  # tokens, the end token included
    rejected_length: int
    chosen_score: float  # a reward, or the implicit reward of a policy
    rejected_score: float
    margin: float | None = None  # strength of the preference, if the data have one


@dataclass(frozen=True)
class Outcome:
    """What metrics need of a rollout. It is small, so that it can be gathered from all ranks."""

    uid: str  # the same in all outcomes of one prompt instance
    reward: float | None  # None = unscorable
    rewards: dict[str, float | None]
    length: int  # tokens that the policy sampled, the end token included
    stopped: bool  # True = ended by itself
    entropy: float | None  # nats per token
    right: bool | None = None  # whether the answer is right; None = not asked or unscorable
    kl: float | None = None  # nats, sum over the completion; None = no reference
    thinks: bool | None = None  # see ``PromptBatch``
    thought: bool = False  # whether the completion holds a thought that is not empty


@dataclass(frozen=True)
class Credit:
    """What a completion weighs in the policy gradient of the phase that trains on it."""

    group: int  # completions of one prompt instance share a number on their rank
    length: int  # tokens, the end token included
    reward: float | None  # None = unscorable
    advantage: float | None  # mean over its tokens; None = it teaches nothing: unscorable, or left out as cut off
    # Sum over its tokens of |advantage| x what multiplies grad log p at ratio 1: the aggregation's weight of the token
    # / the denominator of its update. A KL or an entropy beside the objective is not in it.
    weight: float


@dataclass(frozen=True)
class SampledAhead:
    """The completions of a later phase, which may still be being sampled, see ``RolloutEngine.max_staleness``."""

    weights: int  # the phase that began with the weights which sample them
    completions: Callable[[], list[list[Completion]]]  # waits for those of each prompt


@dataclass
class Record:
    """What a module leaves for callbacks to read, on this rank, as its attribute ``record``.

    A phase is one rollout with the updates made from it, so it is one epoch. "Evaluation" is a validation or a test.
    """

    # Rollouts of the phase, valid from its first micro-batch to the end of its epoch, and kept in checkpoints. What the
    # trainer computes for them (entropy, kl, log-probs) is there after the phase's first update. In ``predict`` those of
    # the last batch.
    rollouts: list[Rollout] = field(default_factory=list)
    # Numbers of the phase by name, logged at its end as ``train/<name>``; valid and kept like ``rollouts``.
    metrics: dict[str, float] = field(default_factory=dict)
    # Groups that are sampled and will be trained on later, see ``DynamicSampling`` and ``PartialRollouts``, which also
    # leaves incomplete ones; kept likewise.
    carried: list[Rollout] = field(default_factory=list)
    # What is sampled of later phases, by their number; kept in checkpoints, which wait for it.
    ahead: dict[int, SampledAhead] = field(default_factory=dict)
    # The completions that the phase trains on, also those carried over; valid and kept like ``rollouts``. None = the
    # method does not say what they weigh.
    credits: list[Credit] | None = None
    # Completions of the evaluation's last batch, valid in ``on_validation_batch_end`` and ``on_test_batch_end``.
    # None = the module samples no held-out rows.
    held_out: list[Rollout] | None = None
    # Scored pairs of the evaluation's last batch, valid in the same hooks.
    pairs: list[ScoredPair] = field(default_factory=list)
    # Outcomes of all batches of the evaluation so far, until the module's ``on_validation_epoch_end``.
    sampled: list[Outcome] = field(default_factory=list)
    greedy: list[Outcome] = field(default_factory=list)
    # The same of completions with a thinking budget, by budget.
    budgets: dict[int, list[Outcome]] = field(default_factory=dict)
    # Rows that the last batch of ``predict`` labelled: ``row``, ``uid``, ``label`` (None = invalid), and what the
    # module adds.
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
        """Return batches of this rank's rows of ``train``, ``val`` or ``calibration``, in order and each row once.

        Every rank gets the same number of batches.
        """


@runtime_checkable
class HasOutcomes(Protocol):
    """A module that judges what it sampled."""

    accuracy: "Reward | None"  # tells right from wrong; None = nothing does

    def find_outcomes(self) -> list[Outcome]:
        """Return the outcomes of ``record.rollouts``, in order; ``right`` is None where nothing can tell."""


def require_accuracy(module: Any, who: str) -> HasOutcomes:
    """Return a module that tells right from wrong. Raises ValueError, which begins with ``who``, for another one."""
    if not isinstance(module, HasOutcomes):
        raise ValueError(f"{who} needs a method that samples and scores answers, and {type(module).__name__} does not")
    if module.accuracy is None:
        raise ValueError(
            f"{who} needs to know which answers are right, and the reward does not say so; name a reward that does, "
            "with model.validation.accuracy"
        )
    return module


@runtime_checkable
class HasPromptRows(Protocol):
    """A DataModule whose training rows are prompts to sample from."""

    def prompt_rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the uid in ``predict`` and the columns of each training row, in order."""


@runtime_checkable
class HasEveryPrompt(Protocol):
    """A DataModule of prompts that shows all of them at once."""

    def every_prompt(self) -> PromptBatch:
        """Return all prompts for training and the held-out ones as one batch, the same on every rank."""


@dataclass(frozen=True)
class AskedRow:
    """A training row without what answered it, to which a sampled completion is added."""

    uid: str  # uid of its prompt in ``predict``
    prompt: str  # the rendered prompt that the policy reads
    columns: dict[str, Any]  # the columns that ask, unchanged, and ``answer`` where there is a gold answer
    chat: bool  # whether the chat template wrote the prompt
    question: str  # text of the prompt, or the last message of its user


@runtime_checkable
class HasAskedRows(Protocol):
    """A DataModule that gives its training rows back, for new data made from sampled completions."""

    def asked_rows(self) -> list[AskedRow]:
        """Return each training row, in order."""

    def held_out_questions(self) -> list[str]:
        """Return the question of each held-out row, as ``AskedRow`` has it."""


@runtime_checkable
class SkipsPrompts(HasOutcomes, Protocol):
    """A module that samples in ``predict`` and leaves out prompts that a writer has from an earlier run."""

    done: set[str] | None  # uids of these prompts; None = no writer resumes
    reward: "Reward"
    num_generations: int
    record: Record

    def describe_samples(self) -> dict[str, Any]:
        """Return what determines the samples of a prompt and their scores."""


class Reward(ABC):
    """Scores finished completions. Whoever calls a reward calls ``score``, which checks what it returned.

    Attributes:
        name: labels its metric ``rewards/<name>/mean``; default the name of the class.
        checks_answer: True = a score above 0.5 means that the answer is right. False = it says nothing about that.
            None = it means that when the reward stands alone.
        phase: the phase of the training that it scores for, counted from 0; None = it scores for something else.
    """

    name: str
    checks_answer: bool | None = None
    phase: int | None = None

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.name = getattr(cls, "name", cls.__name__)

    @abstractmethod
    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return one score per rollout, in order; None if the rollout cannot be scored."""

    def score_parts(self, rollouts: Sequence[Rollout]) -> list[dict[str, float | None]]:
        """Return the parts of each rollout's score by name: only the score itself, unless the reward adds others."""
        return [{self.name: value} for value in score(self, rollouts)]

    def add_parts(self, parts: dict[str, float | None]) -> float | None:
        """Return the score that one rollout's ``score_parts`` make."""
        (value,) = parts.values()
        return value

    def list_parts(self) -> list["Reward"]:
        """Return the rewards whose own scores ``score_parts`` keeps under their names."""
        return [self]

    def name_parts(self) -> list[str]:
        """Return the names under which ``score_parts`` keeps scores."""
        return [part.name for part in self.list_parts()]


def score(reward: Reward, rollouts: Sequence[Rollout]) -> list[float | None]:
    """Call a reward and check what it returned; without rollouts it is not called.

    A warning names a reward that is still busy after ``SLOW`` seconds, and each time that these have doubled. An
    exception of its own gets its name as a note.

    Returns:
        one finite score per rollout, in order; None = unscorable.

    Raises:
        ValueError: it returned no list, another number of scores than rollouts, or a score that is no finite number.
    """
    if not rollouts:
        return []
    done = threading.Event()
    threading.Thread(target=warn_while_slow, args=(done, reward.name, len(rollouts), SLOW), daemon=True).start()
    try:
        found = reward(rollouts)
    except Exception as error:
        place = find_own_place(error)
        if place is None:
            error.add_note(f"(in reward '{reward.name}')")
            raise
        raise ValueError(f"reward '{reward.name}' failed at {place}: {type(error).__name__}: {error}") from error
    finally:
        done.set()
    return check_scores(reward.name, found, len(rollouts))


def find_own_place(error: Exception) -> str | None:
    """Return the file and line of the user's code in which an error came up; None if it came up in ours."""
    ours, libraries = Path(__file__).parents[1], Path(traceback.__file__).parent
    names = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [
        f"{file.name}:{line}"
        for file, line in names
        if "site-packages" not in file.parts
        and not file.is_relative_to(libraries)
        and not any(file.is_relative_to(ours / room) for room in ("modules", "datamodules", "callbacks"))
    ]
    return own[-1] if own else None


def warn_while_slow(done: threading.Event, name: str, count: int, seconds: float) -> None:
    """Name a reward that is not ``done`` after these seconds, and each time that they have doubled."""
    waited = 0.0
    while not done.wait(seconds - waited):
        warnings.warn(
            f"reward '{name}' has been scoring {count} completions for {seconds:g} s; does it wait for something?",
            stacklevel=1,
        )
        waited, seconds = seconds, 2 * seconds


def check_scores(name: str, scores: Any, count: int) -> list[float | None]:
    """Return the scores of the reward ``name`` as numbers and None, or refuse them (see ``score``)."""
    wanted = f"return a list with a number or None for each of the {count} completions"
    if hasattr(scores, "tolist"):  # a tensor or an array
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        returned = "None (is its return missing?)" if scores is None else type(scores).__name__
        raise ValueError(f"reward '{name}' returned {returned}; {wanted}")
    if len(scores) != count:
        raise ValueError(f"reward '{name}' returned {len(scores)} scores for {count} rollouts; return one per rollout")
    for index, value in enumerate(scores):
        if value is None:
            continue
        try:
            number = float(value) if isinstance(value, SupportsFloat) else None
        except (ValueError, TypeError, OverflowError, RuntimeError):  # an array of several numbers, a number too large
            number = None
        if number is None:
            raise ValueError(f"reward '{name}' returned {reprlib.repr(value)} for rollout {index}; {wanted}")
        if not abs(number) <= LARGEST:
            raise ValueError(f"reward '{name}' returned {number} for rollout {index}; return None for unscorable")
    return [None if value is None else float(value) for value in scores]


Reward.register(FunctionType)  # a configuration may then name a function wherever it may name a reward


class FunctionReward(Reward):
    """Calls a function with lists, one entry per completion, and takes the list of scores that it returns.

    The function gets what the names of its parameters ask for: ``prompts``, ``completions`` (texts; one starts with
    ``<think>`` if its prompt ends with that), ``completion_ids`` (tokens), ``answers`` (also ``answer``,
    ``ground_truth`` or ``solution``), and the other columns of the rows. With ``**columns`` it gets all columns that
    are left. A row that lacks a column has None in its place.

    Args:
        function: for example ``def short(completions, **columns): return [-len(text) for text in completions]``. Its
            name labels the metric.

    Raises:
        ValueError: the function asks for no completions. When called: it asks for a column that no row has, or it does
            not return a list.
    """

    def __init__(self, function: Callable[..., list[float | None]]) -> None:
        self.name = getattr(function, "__name__", "function")
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [parameter for parameter in parameters if parameter.kind not in (2, 4)]  # without *args, **columns
        self._asked = {parameter.name: parameter.default is parameter.empty for parameter in named}  # name -> needed
        if not {"completions", "completion_ids"} & set(self._asked):
            raise ValueError(
                f"reward {self.name}{inspect.signature(function)}: a reward function gets what the names of its "
                "parameters ask for, and must ask for completions: (prompts, completions, answers, **columns)"
            )
        self._call = partial(function)  # a bare function among the attributes would count as another reward

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Call the function and return its scores."""
        if not rollouts:
            return []
        given = self.lists(rollouts)
        missing = [name for name, needed in self._asked.items() if needed and name not in given]
        if missing:
            raise ValueError(
                f"reward {self.name} asks for {', '.join(missing)}, which no row has; it can ask for "
                f"{', '.join(name for name in given if name not in ANSWERS)} and answers"
            )
        wanted = {name: given[name] for name in given if name in self._asked or self._takes_all}
        # The function may change what it gets. The tokens are copied already, and by a faster way.
        wanted = {name: each if name == "completion_ids" else copy.deepcopy(each) for name, each in wanted.items()}
        return check_scores(self.name, self._call(**wanted), len(rollouts))

    @staticmethod
    def lists(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
        """Return every list that a function can ask for, by name.

        If the rows have a column called ``answer``, ``ground_truth`` or ``solution``, that column is taken.
        """
        names = dict.fromkeys(name for rollout in rollouts for name in rollout.info or {})
        answers = [rollout.answer for rollout in rollouts]
        return (
            dict.fromkeys(ANSWERS, answers)
            | {name: [(rollout.info or {}).get(name) for rollout in rollouts] for name in names}
            | {
                "prompts": [rollout.prompt for rollout in rollouts],
                "completions": [rollout.text for rollout in rollouts],
                "completion_ids": [list(rollout.completion.token_ids) for rollout in rollouts],
                "answers": answers,
            }
        )


def as_reward(reward: Any) -> Any:
    """Turn a plain function into a reward, also inside a list or a dict; return anything else as it is.

    Every class that takes a reward calls this, so that a function may stand wherever a reward may.
    """
    if isinstance(reward, FunctionType) or callable(reward) and not isinstance(reward, Reward):
        return FunctionReward(reward)
    if isinstance(reward, list):
        return [as_reward(part) for part in reward]
    if isinstance(reward, dict):
        return {name: as_reward(part) for name, part in reward.items()}
    return reward


def make_printable(text: str) -> str:
    r"""Write control characters as escapes, so that text from data or models cannot steer a terminal.

    Line breaks and tabs stay.

    >>> make_printable("a\x1b[31mb\n")
    'a\\x1b[31mb\n'
    """
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
