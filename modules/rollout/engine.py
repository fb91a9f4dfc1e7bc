"""What samples completions: the contract of every engine, and the default one, which works in this process.

The default engine samples with the policy's own parameters, so syncing costs nothing. It computes each prompt once, and
a waiting request starts whenever a slot is free (continuous batching).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from modules.rollout.decode import DecodeStep, SlotCache, supports
from modules.rollout.sampling import Ledger, Reply, SampledPolicy, Sampling
from modules.rollout.static import run_static
from modules.rollout.thinking import ThoughtWatch, check_thinking, opens_thought
from modules.trainer.modes import evaluating
from modules.types import Completion

PREFILL_TOKENS = 2048  # padded prompt tokens of one forward
DRAW_ROWS = 256  # first tokens are drawn from this many rows of logits at a time
ROW_STEP = 16  # batches shrink in steps of this many rows: on CPU 2 rows cost as much as 12
PARITY = 1e-3  # nats; the log-probs of our decode step and of the Hugging Face forward may differ by less than this
PARITY_PROMPTS = ((1, 2, 3), (4, 5, 6, 7, 8))


class RolloutEngine(ABC):
    """Samples completions from the policy that it was last synced with.

    With environments, ``generate`` also needs the argument ``replies``, and to go on with what an earlier call began the
    argument ``started``, as ``InProcessEngine.generate`` has them.

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

    When a policy is first synced, the engine compares the two ways. If their log-probs differ by 1e-3 nats or more, it
    warns and uses static batches.

    Args:
        max_batch_tokens: >= 1, bounds the memory: cache columns summed over the rows of a batch. A column holds 2 x
            layers x kv heads x head dim numbers (SmolLM2-135M in fp32: 46 KB, so 65536 columns take 3 GB).

    Attributes:
        last_stats: counts of the last ``generate``: ``decode_steps``, ``slots`` (largest batch), ``prefill_tokens``
            (prompt tokens computed).

    Raises:
        ValueError: ``max_batch_tokens`` is below 1.
    """

    limits_thoughts = limits_segments = True

    def __init__(self, max_batch_tokens: int = 65536) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"InProcessEngine: max_batch_tokens {max_batch_tokens} must be >= 1")
        self.max_batch_tokens = max_batch_tokens
        self.last_stats = {}
        self._policy: SampledPolicy | None = None
        self._version = 0
        self._run = run_static

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Remember the policy, whose parameters are shared, and the version.

        Raises:
            ValueError: some layers of the model keep no keys and values.
        """
        if policy is not self._policy:
            layers = DynamicCache(config=policy.model.config).layers
            if not all(isinstance(layer, DynamicLayer) for layer in layers):
                raise ValueError(
                    f"InProcessEngine cannot sample from {type(policy.model).__name__}: some of its layers keep no "
                    "keys and values; use a model with attention in every layer"
                )
            self._run = run_static
            if supports(policy.model):
                gap = parity_gap(policy)
                if gap < PARITY:
                    self._run = run_continuous
                else:
                    warnings.warn(
                        f"InProcessEngine: log-probs of the fast decode step differ by {gap:.2g} nats from the Hugging "
                        f"Face forward of {type(policy.model).__name__}; it samples through that forward, which is "
                        "slower",
                        stacklevel=2,
                    )
        self._policy, self._version = policy, version

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
        check_request(self._policy, prompts, num_generations, sampling, seeds, started)
        if started is not None and replies is not None:
            raise ValueError("generate: a completion that goes on from a beginning cannot have replies")
        if not prompts:
            self.last_stats = {"decode_steps": 0.0, "slots": 0.0, "prefill_tokens": 0.0}
            return []
        with sampling_mode(self._policy.model):
            requests = [seed + g for seed in seeds for g in range(num_generations)]
            thoughts = watch_thoughts(self._policy, prompts, num_generations, sampling, seeds)
            ledger = Ledger(requests, sampling, self._policy, replies, thoughts, started)
            rows, shared = prompts, num_generations
            if started is not None:  # rows of a prompt go on from different places, so that each is computed by itself
                rows = [prompts[i // num_generations] + each.token_ids for i, each in enumerate(started)]
                shared = 1
            stats = self._run(self._policy.model, rows, shared, ledger, self.max_batch_tokens)
            self.last_stats = {name: float(value) for name, value in stats.items()}
            completions = ledger.completions(self._version)
        return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]


def watch_thoughts(
    policy: SampledPolicy, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
) -> ThoughtWatch | None:
    """Draw the budget of each prompt, and return what ends the thoughts of its completions; None = nothing to end."""
    thinking = sampling.thinking
    if thinking is None or not thinking.budgets:
        return None
    device = torch.device("cpu") if policy.model.device.type == "mps" else policy.model.device
    rows = [prompt for prompt in prompts for _ in range(num_generations)]
    budgets = [thinking.draw(seed) for seed in seeds for _ in range(num_generations)]
    return ThoughtWatch(thinking, policy.tokenizer, rows, budgets, policy.model.config.vocab_size, device)


@torch.inference_mode()
def run_continuous(
    model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger, max_batch_tokens: int
) -> dict[str, int]:
    """Finish every request with ``ContinuousBatch``.

    Inference mode is safe here, because the supported models keep nothing between forwards.
    """
    return ContinuousBatch(model, prompts, num_generations, ledger, max_batch_tokens).run()


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode, no gradients and no autocast inside the ``with`` block.

    It is not inference mode: a model that keeps tensors between forwards, such as a growing rotary table, could not
    train with them afterwards.
    """
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


def parity_gap(policy: SampledPolicy) -> float:
    """Return by how many nats the log-probs of a few sampled tokens differ at most from a plain forward, in both
    layouts.
    """
    prompts = [[token % policy.model.config.vocab_size for token in prompt] for prompt in PARITY_PROMPTS]
    gap = 0.0
    with sampling_mode(policy.model):
        for num_generations in (1, 8):  # 2 rows, 16 rows
            ledger = Ledger(list(range(2 * num_generations)), Sampling(max_completion_length=3), policy)
            run_continuous(policy.model, prompts, num_generations, ledger, max_batch_tokens=1024)
            completions = ledger.completions(0)
            rows = [
                prompts[index // num_generations] + completion.token_ids for index, completion in enumerate(completions)
            ]
            ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(policy.model.device)
            logprobs = (
                policy.model(input_ids=ids)
                .logits[:, :-1]
                .float()
                .log_softmax(-1)
                .gather(2, ids[:, 1:, None])[..., 0]
                .tolist()
            )
            for row, completion, expected in zip(rows, completions, logprobs, strict=True):
                start = len(row) - len(completion.token_ids) - 1
                pairs = zip(completion.logprobs, expected[start : len(row) - 1], strict=True)
                gap = max(gap, *(abs(mine - theirs) for mine, theirs in pairs))
    return gap


@dataclass(frozen=True)
class Waiting:
    """K requests whose prompt is computed and whose first token is drawn, and which wait for a slot."""

    cache: SlotCache  # keys and values of the prompts of one forward
    rows: Tensor  # int [K], row of each request's prompt in ``cache``
    requests: Tensor  # int [K], numbers of the requests
    tokens: Tensor  # int [K], first token of each request
    positions: Tensor  # int [K], the cache column that this token goes to

    def split(self, size: int) -> tuple["Waiting", "Waiting"]:
        """Return the first ``size`` requests and the others."""
        fields = (self.rows, self.requests, self.tokens, self.positions)
        return Waiting(self.cache, *(field[:size] for field in fields)), Waiting(
            self.cache, *(field[size:] for field in fields)
        )


class ContinuousBatch:
    """Slots over one cache, filled from a queue of prompts until every request is finished. Long prompts come first.

    Args:
        model: a model that ``decode.supports`` accepts.
        prompts: token ids of each prompt; at least one prompt.
        num_generations: G; request r is generation r % G of prompt r // G.
        ledger: draws and records tokens.
        max_batch_tokens: bound on the cache columns of all slots together; there is always at least one slot. Prompts
            that are computed and wait for a slot take at most ``PREFILL_TOKENS`` columns more, or those of one longer
            prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        num_generations: int,
        ledger: Ledger,
        max_batch_tokens: int,
    ) -> None:
        self.model, self.prompts, self.num_generations, self.ledger = model, prompts, num_generations, ledger
        # Prompts are taken from the end, so the long ones come first.
        self.queue = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        # The last token is never fed back, so it needs no column.
        columns = len(prompts[self.queue[-1]]) + ledger.most_left() - 1
        slots = max(1, min(len(prompts) * num_generations, max_batch_tokens // columns))
        self.prefill_tokens = min(PREFILL_TOKENS, max_batch_tokens)
        self.cache = SlotCache.allocate(model, slots, columns)
        self.step = DecodeStep(model, columns)
        self.waiting: Waiting | None = None
        self.requests = torch.full((slots,), ledger.idle, device=model.device)
        self.tokens, self.positions = torch.zeros_like(self.requests), torch.zeros_like(self.requests)
        self.horizon = 0
        self.stats = {"decode_steps": 0, "slots": slots, "prefill_tokens": 0}

    def run(self) -> dict[str, int]:
        """Finish every request.

        Returns:
            ``decode_steps``, ``slots`` (of the largest batch) and ``prefill_tokens`` (prompt tokens computed).
        """
        busy = self._refill()
        while busy:
            logits = self.step(self.tokens, self.positions, self.cache, self.horizon)
            self.tokens, finished = self.ledger.draw(logits, self.requests)
            self.positions += 1  # a refill sets idle slots back to 0, so they never overtake the busy ones
            self.horizon += 1
            self.stats["decode_steps"] += 1
            if bool(finished.any()):
                self.requests[finished] = self.ledger.idle
                busy = self._refill()
        return self.stats

    def _refill(self) -> bool:
        """Give free slots to waiting requests, compute prompts as needed, and return whether any slot is busy."""
        free = (self.requests == self.ledger.idle).nonzero()[:, 0]
        while len(free) and (self.queue or self.waiting):
            admitted, rest = (self.waiting or self._prefill()).split(len(free))
            slots, free = free.split([len(admitted.rows), len(free) - len(admitted.rows)])
            self.cache.put(slots, admitted.cache, admitted.rows)
            self.requests[slots], self.tokens[slots], self.positions[slots] = (
                admitted.requests,
                admitted.tokens,
                admitted.positions,
            )
            self.waiting = rest if len(rest.rows) else None
        self.positions[free] = 0
        self.horizon = int(self.positions.max()) + 1
        busy = len(self.requests) - len(free)
        if busy and len(free):
            self._compact(free, busy)
        return busy > 0

    def _compact(self, free: Tensor, busy: int) -> None:
        """Move busy slots to the front and drop empty ones behind them, down to a multiple of 16 rows, or to a single
        row.
        """
        size = 1 if busy == 1 else min(len(self.requests), -(-busy // ROW_STEP) * ROW_STEP)
        movers = (self.requests[size:] != self.ledger.idle).nonzero()[:, 0] + size
        holes = free[: len(movers)]  # ascending, and at least as many below ``size`` as there are movers
        self.cache.put(holes, self.cache, movers)
        for field in (self.requests, self.tokens, self.positions):
            field[holes] = field[movers]
        self.requests, self.tokens, self.positions = self.requests[:size], self.tokens[:size], self.positions[:size]
        self.cache.shrink(size)

    def _prefill(self) -> Waiting:
        """Compute the next prompts of the queue and draw first tokens for all their requests; keep those that go on."""
        chosen = [self.queue.pop()]
        limit = self.prefill_tokens // len(self.prompts[chosen[0]])
        while self.queue and len(chosen) < limit:
            chosen.append(self.queue.pop())
        device = self.model.device
        lengths = torch.tensor([len(self.prompts[index]) for index in chosen], device=device)
        self.stats["prefill_tokens"] += int(lengths.sum())
        logits, cache = compute_prompts(self.model, [self.prompts[index] for index in chosen], lengths)
        rows = torch.arange(len(chosen), device=device).repeat_interleave(self.num_generations)
        generations = torch.arange(self.num_generations, device=device).repeat(len(chosen))
        requests = torch.tensor(chosen, device=device)[rows] * self.num_generations + generations
        drawn = [
            self.ledger.draw(logits[r], q)
            for r, q in zip(rows.split(DRAW_ROWS), requests.split(DRAW_ROWS), strict=True)
        ]
        tokens, finished = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        going = ~finished
        return Waiting(cache, rows[going], requests[going], tokens[going], lengths[rows][going])


def compute_prompts(model: PreTrainedModel, prompts: list[list[int]], lengths: Tensor) -> tuple[Tensor, SlotCache]:
    """Return the logits [P, V] after each prompt, and the keys and values of the P prompts.

    Columns of the cache behind a prompt's entry in ``lengths`` [P] hold garbage.
    """
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    # A causal model never looks at padding on the right, so no attention mask is needed.
    output = model.model(input_ids=ids, use_cache=True)
    last = output.last_hidden_state[torch.arange(len(prompts), device=ids.device), lengths - 1]
    layers = output.past_key_values.layers
    return model.lm_head(last), SlotCache([layer.keys for layer in layers], [layer.values for layer in layers])
