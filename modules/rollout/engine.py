"""What samples completions: the contract of every engine, and the default one, which works in this process.

The default engine samples with the policy's own parameters, or with a copy of them: in the layout of the CPU's library,
or in 16 bits. A sync makes the copy anew. The engine computes each prompt once, and a waiting request starts whenever
there is room (continuous batching).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from modules.rollout.decoding.continuous import run_continuous
from modules.rollout.decoding.decode import supports
from modules.rollout.decoding.decode_products import DecodeProducts
from modules.rollout.decoding.shadow import count_bytes, make_shadow, measure_gain, refresh_shadow
from modules.rollout.decoding.static import run_static
from modules.rollout.sampling import Ledger, Reply, SampledPolicy, Sampling
from modules.rollout.thinking import ThoughtWatch, check_thinking, opens_thought
from modules.trainer.modes import evaluating
from modules.types import Completion

PARITY = 1e-3  # nats; the log-probs of our decode step and of the Hugging Face forward may differ by less than this
PARITY_BF16 = 0.1  # nats, the same on average, where the decode step computes in 16 bits
GAIN = 1.2  # precision auto takes 16 bits if their matrix products are at least so many times as fast
PARITY_PROMPTS = ((1, 2, 3), (4, 5, 6, 7, 8))
# In 16 bits the log-probs of arbitrary tokens differ much more than those of text (SmolLM2-135M: by 1.3 and 0.02 nats).
PARITY_TEXTS = ("The capital of France is Paris, and", "Two and two are four. Three and three are")


class RolloutEngine(ABC):
    """Samples completions from the policy that it was last synced with.

    For environments, ``generate`` also needs the argument ``replies``; to continue the completions of an earlier call,
    it needs ``started``. ``InProcessEngine.generate`` has both.

    Attributes:
        limits_thoughts: whether ``generate`` keeps to ``sampling.thinking``; a budget is refused where it does not.
        limits_segments: whether a call of ``generate`` samples at most ``sampling.partial.tokens_per_phase`` tokens of each
            completion, behind what it has already.
        copies_weights: whether it samples from a copy of the weights. Then it may sample while the policy trains, and
            its log-probs may differ from the trainer's.
        max_staleness: >= 0, phases that a sample may be older than the weights it trains; needs a copy of the weights.
            Above 0, another thread may call the engine, one call after the other.
        last_stats: numbers of the last ``generate`` by name, logged as ``train/engine/<name>``; ``add_engine_stats`` says
            how those of several calls are joined.
    """

    limits_thoughts = False
    limits_segments = False
    copies_weights = False
    max_staleness = 0
    last_stats: dict[str, float]

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

    def release(self) -> None:  # noqa: B027 (an engine may have nothing to do)
        """Give back, until the next ``sync_weights``, the memory that only sampling needs; called after each phase's."""

    def close(self) -> None:  # noqa: B027
        """End what the engine started, for good."""


def check_request(
    policy: SampledPolicy,
    prompts: list[list[int]],
    num_generations: int,
    sampling: Sampling,
    seeds: list[int],
    started: Sequence[Completion] | None = None,
) -> None:
    """Refuse a request that cannot be sampled, with all its problems in one message.

    Raises:
        ValueError: too few generations, another number of seeds than prompts, an empty prompt, a prompt too long for the
            model's positions, a beginning that leaves no token to sample, or a thinking budget that leaves no room for
            an answer.
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
    if started is not None and len(started) != len(prompts) * num_generations:
        problems.append(f"{len(prompts)} x {num_generations} completions, but {len(started)} beginnings")
    full = [i for i, each in enumerate(started or ()) if len(each.token_ids) >= sampling.max_completion_length]
    if full:
        problems.append(f"beginnings {full[:8]} have max_completion_length tokens already")
    if started is not None and sampling.thinking is not None and sampling.thinking.budgets:
        problems.append("a thinking budget cannot be kept in a completion that goes on from a beginning")
    if problems:
        raise ValueError("generate: " + "; ".join(problems))
    if sampling.thinking is not None:
        opened = all(opens_thought(policy.tokenizer, prompt) for prompt in prompts)
        length, stop = sampling.max_completion_length, sampling.stop
        check_thinking(sampling.thinking, policy.tokenizer, sampling.thinking.budgets, length, stop, opened)


class InProcessEngine(RolloutEngine):
    """Samples with continuous batching and its own decode loop for the Llama family, else with static batches.

    On a CPU with oneDNN the decode loop multiplies by a copy of the weights that is laid out for it: as many bytes as the
    weights have, at most 4 GB, between a sync and ``release``. Adapters are merged into it.

    When a policy is first synced, the engine compares the two ways. If their log-probs differ by 1e-3 nats or more, it
    warns and uses static batches.

    Args:
        max_cache_gb: > 0, bounds the memory of keys and values, in 10^9 bytes. A column (one token of one row) holds 2 x
            layers x kv heads x head dim numbers (SmolLM2-135M in fp32: 46 KB, so 3 GB are 65000 columns). Rows take
            columns as they grow; the youngest ones wait and are computed again when memory runs out, which changes no
            completion. One row is always sampled; a warning says so if it takes more.
        precision: ``same`` samples with the policy's own weights; ``bf16`` with a copy of them whose linear layers, keys
            and values are in bf16 and whose head is in fp32 (SmolLM2-135M: 0.3 GB), made anew at each sync; ``auto``
            times matrix products of the policy's shapes once, takes ``bf16`` if they are 1.2 times as fast in it, and says so.
        check_every: >= 1, decode steps between two looks at which completions have ended; None = 1 on CPU, else 16. It
            changes no completion. With replies or thinking budgets it is always 1.
        compile: whether ``torch.compile`` makes the decode step, once for each shape (on GPUs as a CUDA graph, which has not
            been run yet); on CPU it needs a C++ compiler.

    Attributes:
        copies_weights: True if it samples in bf16; with ``auto``, until the first sync, if it may.
        last_stats: of the last ``generate``: ``decode_steps``, ``slots`` (rows of the largest batch),
            ``prefill_tokens`` (computed, those of preempted completions again), ``tokens`` (that completions got),
            ``occupancy`` (share of the computed rows that were busy, over all decode steps), ``cache_gb`` (most bytes of
            keys and values / 10^9), ``preempted`` (times that a completion had to make room), ``copy_gb`` (of copies of
            the weights).

    Raises:
        ValueError: a value is out of range.
    """

    limits_thoughts = limits_segments = True

    def __init__(
        self,
        max_cache_gb: float = 3.0,
        precision: Literal["same", "bf16", "auto"] = "same",
        check_every: int | None = None,
        compile: bool = False,
    ) -> None:
        if not (max_cache_gb or 0) > 0:
            raise ValueError(f"InProcessEngine: max_cache_gb {max_cache_gb} must be > 0")
        if precision not in ("same", "bf16", "auto"):
            raise ValueError(f"InProcessEngine: precision {precision!r} must be same, bf16 or auto")
        if check_every is not None and check_every < 1:
            raise ValueError(f"InProcessEngine: check_every {check_every} must be >= 1")
        self.max_cache_gb, self.precision, self.check_every, self.compile = (
            max_cache_gb,
            precision,
            check_every,
            compile,
        )
        if precision != "same":
            self.copies_weights = True
        self.last_stats = {}
        self._policy: SampledPolicy | None = None
        self._version = 0
        self._run: Any = run_static
        self._halves = False  # whether it samples from a copy in 16 bits
        self._shadow: PreTrainedModel | None = None
        self._products: DecodeProducts | None = None  # of the weights of the last sync
        self._exceeded = False  # whether it was said that the cache was

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Remember the policy, whose parameters are shared or copied in 16 bits, and the version.

        Raises:
            ValueError: some layers of the model keep no keys and values, or the settings need the fast decode step,
                which it does not have.
        """
        if policy is not self._policy:
            self._shadow = None
            self._choose(policy)
        if self._halves and self._shadow is None:
            self._shadow = make_shadow(policy.model)
        elif self._shadow is not None:
            refresh_shadow(self._shadow, policy.model)
        self._policy, self._version, self._products = policy, version, None

    def release(self) -> None:
        """Forget the copies of the weights until the next sync."""
        self._shadow = self._products = None

    def _choose(self, policy: SampledPolicy) -> None:
        """Find out how to sample from a new policy: through which loop, and in which precision."""
        kind = type(policy.model).__name__
        if not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=policy.model.config).layers):
            raise ValueError(
                f"InProcessEngine cannot sample from {kind}: some of its layers keep no keys and values; use a model with "
                "attention in every layer"
            )
        self._run = run_static
        if supports(policy.model):
            prompts = [[token % policy.model.config.vocab_size for token in prompt] for prompt in PARITY_PROMPTS]
            gap = float(measure_parity(policy, policy.model, prompts, self.compile).max())
            if gap < PARITY:
                self._run = run_continuous
            else:
                warnings.warn(
                    f"InProcessEngine: log-probs of the fast decode step differ by {gap:.2g} nats from the Hugging "
                    f"Face forward of {kind}; it samples through that forward, which is slower",
                    stacklevel=3,
                )
        unused = {"precision bf16": self.precision == "bf16", "compile": self.compile, "check_every": self.check_every}
        unused = {name: value for name, value in unused.items() if value}
        if unused and self._run is run_static:
            names = " and ".join(unused)
            raise ValueError(
                f"InProcessEngine: {kind} cannot use the fast decode step, which alone has {names}; leave {names} out"
            )
        self._halves = self.precision != "same" and self._run is run_continuous
        if self._halves and self.precision == "auto":
            gain = measure_gain(policy.model)
            self._halves = gain >= GAIN
            rank_zero_info(
                f"InProcessEngine: samples in {'bf16' if self._halves else 'fp32'}; matrix products of this model "
                f"in bf16 are {gain:.2f} times as fast as in fp32 here"
            )
        if self.precision != "same":
            self.copies_weights = self._halves
        if self._halves:
            self._shadow = make_shadow(policy.model)
            prompts = [list(policy.tokenizer(text).input_ids) for text in PARITY_TEXTS]
            gap = float(measure_parity(policy, self._shadow, prompts, self.compile).mean())
            if not gap < PARITY_BF16:
                raise ValueError(
                    f"InProcessEngine: log-probs of {kind} in bf16 differ by {gap:.2g} nats on average from those in "
                    f"{str(policy.model.dtype).removeprefix('torch.')}, more than {PARITY_BF16}; use precision same"
                )

    def generate(
        self,
        prompts: list[list[int]],
        num_generations: int,
        sampling: Sampling,
        seeds: list[int],
        replies: Sequence[Reply] | None = None,
        started: Sequence[Completion] | None = None,
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``.

        The model's train or eval mode and the global random state stay as they were.

        Args:
            prompts: token ids of each prompt.
            num_generations: completions per prompt.
            sampling: how tokens are drawn; ``max_completion_length`` counts the tokens of replies too.
            seeds: one per prompt.
            replies: one per completion, prompt by prompt. A turn that ended by itself is read by the completion's reply,
                and sampling goes on behind the tokens that it returns; what was sampled is never tokenised again. A
                reply that leaves no token to sample ends the completion with ``length``. None = no completion goes on.
            started: one per completion, prompt by prompt: its beginning, which may be empty. It counts as part of the
                completion, and the tokens behind it are those that an unbroken completion of the same weights would have
                got. None = all begin with their first token.
        """
        if self._policy is None:
            raise ValueError("InProcessEngine: call sync_weights(policy, version) before generate")
        if self._halves and self._shadow is None:
            raise ValueError("InProcessEngine: call sync_weights(policy, version) again between release and generate")
        check_request(self._policy, prompts, num_generations, sampling, seeds, started)
        if started is not None and replies is not None:
            raise ValueError("generate: a completion that goes on from a beginning cannot have replies")
        if not prompts:
            self.last_stats = {}
            return []
        with sampling_mode(self._policy.model):
            requests = [seed + g for seed in seeds for g in range(num_generations)]
            device = torch.device("cpu") if self._policy.model.device.type == "mps" else self._policy.model.device
            thoughts = watch_thoughts(self._policy, prompts, num_generations, sampling, seeds, device)
            ledger = Ledger(requests, sampling, self._policy, replies, thoughts, started)
            rows, shared = prompts, num_generations
            if started is not None:  # rows of a prompt go on from different places, so that each is computed by itself
                rows = [prompts[i // num_generations] + each.token_ids for i, each in enumerate(started)]
                shared = 1
            model = self._shadow or self._policy.model
            settings: tuple[Any, ...] = ()
            if self._run is run_continuous:
                if self._products is None or (self._shadow is None and not self._products.are_of(model)):
                    self._products = DecodeProducts(model, packed=not self.compile)
                settings = (self._products, self.check_every, self.compile)
            stats = self._run(model, rows, shared, ledger, self.max_cache_gb * 1e9, *settings)
            copied = (count_bytes(self._shadow) if self._shadow is not None else 0) / 1e9
            copied += self._products.num_bytes / 1e9 if self._products is not None else 0.0
            self.last_stats = {**{name: float(value) for name, value in stats.items()}, "copy_gb": copied}
            self._tell_excess(stats["cache_gb"])
            completions = ledger.completions(self._version)
        return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]

    def _tell_excess(self, used: float) -> None:
        """Warn, once, if a single completion took more than the bound."""
        if self.last_stats["slots"] <= 1 and used > self.max_cache_gb and not self._exceeded:
            self._exceeded = True
            warnings.warn(
                f"InProcessEngine: max_cache_gb {self.max_cache_gb:g} is less than one completion takes, and it took "
                f"{used:.3g}; completions are sampled one after another: raise it",
                stacklevel=3,
            )


def watch_thoughts(
    policy: SampledPolicy,
    prompts: list[list[int]],
    num_generations: int,
    sampling: Sampling,
    seeds: list[int],
    device: torch.device,
) -> ThoughtWatch | None:
    """Draw the budget of each prompt, and return what ends the thoughts of its completions; None = nothing to end."""
    thinking = sampling.thinking
    if thinking is None or not thinking.budgets:
        return None
    rows = [prompt for prompt in prompts for _ in range(num_generations)]
    budgets = [thinking.draw(seed) for seed in seeds for _ in range(num_generations)]
    return ThoughtWatch(thinking, policy.tokenizer, rows, budgets, policy.model.config.vocab_size, device)


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode, no gradients and no autocast inside the ``with`` block.

    It is not inference mode: a model that keeps tensors between forwards, such as a growing rotary table, could not
    train with them afterwards.
    """
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


def measure_parity(policy: SampledPolicy, model: PreTrainedModel, prompts: list[list[int]], compiled: bool) -> Tensor:
    """Return by how many nats the fast decode step and the policy's plain forward differ. It compares the log-probs of
    a few tokens, sampled with few and with more rows.

    Args:
        policy: gives the forward.
        model: that the tokens are sampled from: the policy's, or its copy in 16 bits.
        prompts: two prompts.
        compiled: whether the decode step is compiled.

    Raises:
        ValueError: the decode step cannot be compiled.
    """
    gaps = []
    with sampling_mode(policy.model):
        products = DecodeProducts(model, packed=not compiled)
        for num_generations in (1, 8):  # 2 rows, 16 rows
            ledger = Ledger(list(range(2 * num_generations)), Sampling(max_completion_length=3), policy)
            try:
                run_continuous(model, prompts, num_generations, ledger, 1e9, products, compiled=compiled)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"InProcessEngine: torch.compile cannot compile the decode step here ({reason}); leave compile out"
                ) from error
            for index, completion in enumerate(ledger.completions(0)):
                prompt = prompts[index // num_generations]
                ids = torch.tensor([prompt + completion.token_ids], device=policy.model.device)
                logprobs = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
                gaps.append((torch.tensor(completion.logprobs) - expected.cpu()).abs())
    return torch.cat(gaps)
