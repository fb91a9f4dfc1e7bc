"""The default engine: samples with the policy's own parameters in this process, so that syncing costs nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from modules.modes import evaluating
from modules.rollout.continuous import ContinuousBatch, supports
from modules.rollout.engine import RolloutEngine, SampledPolicy, Sampling
from modules.rollout.ledger import Ledger
from modules.rollout.static import run_static
from modules.types import Completion

PARITY = 1e-3  # nats: the largest difference of log-probs between our decode step and the Hugging Face forward
PARITY_PROMPTS = ((1, 2, 3), (4, 5, 6, 7, 8))


class InProcessEngine(RolloutEngine):
    """Continuous batching with a decode loop of our own for the Llama family, static batches for every other
    architecture.

    At the first sync of a policy the two ways are compared; where they differ by more than 1e-3 nats the static one is
    used, with a warning.

    Args:
        max_batch_tokens: memory bound, >= 1: cache columns summed over the rows of a batch. A column takes
            2 x layers x kv heads x head dim numbers (SmolLM2-135M in fp32: 46 KB, so 65536 columns are 3 GB).

    Attributes:
        last_stats: of the last ``generate``: ``decode_steps``, ``slots`` (largest batch), ``prefill_tokens`` (prompt
            tokens computed).
    """

    def __init__(self, max_batch_tokens: int = 65536) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"InProcessEngine: max_batch_tokens {max_batch_tokens} must be >= 1")
        self.max_batch_tokens = max_batch_tokens
        self.last_stats: dict[str, int] = {}
        self._policy: SampledPolicy | None = None
        self._version = 0
        self._run = run_static

    def sync_weights(self, policy: SampledPolicy, version: int) -> None:
        """Remember the policy, whose parameters are shared, and the version."""
        if policy is not self._policy:
            layers = DynamicCache(config=policy.model.config).layers
            if not all(isinstance(layer, DynamicLayer) for layer in layers):
                raise ValueError(
                    f"InProcessEngine cannot sample from {type(policy.model).__name__}: some of its layers keep no "
                    "keys and values"
                )
            self._run = run_static
            if supports(policy.model):
                gap = parity_gap(policy)
                if gap < PARITY:
                    self._run = run_continuous
                else:
                    warnings.warn(
                        f"InProcessEngine: log-probs of the fast decode step differ by {gap:.2g} from the Hugging Face "
                        f"forward of {type(policy.model).__name__}; sampling through the latter, which is slower",
                        stacklevel=2,
                    )
        self._policy, self._version = policy, version

    def generate(
        self, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        """Sample; see ``RolloutEngine.generate``. Leaves the model's modes and the global random state as they were."""
        if self._policy is None:
            raise ValueError("InProcessEngine: call sync_weights(policy, version) before generate")
        check_request(self._policy, prompts, num_generations, sampling, seeds)
        if not prompts:
            self.last_stats = {"decode_steps": 0, "slots": 0, "prefill_tokens": 0}
            return []
        with sampling_mode(self._policy.model):
            ledger = Ledger([seed + g for seed in seeds for g in range(num_generations)], sampling, self._policy)
            self.last_stats = self._run(self._policy.model, prompts, num_generations, ledger, self.max_batch_tokens)
            completions = ledger.completions(self._version)
        return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]


def check_request(
    policy: SampledPolicy, prompts: list[list[int]], num_generations: int, sampling: Sampling, seeds: list[int]
) -> None:
    """Refuse a request that cannot be sampled, with all problems in one ValueError."""
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


@torch.inference_mode()
def run_continuous(
    model: PreTrainedModel, prompts: list[list[int]], num_generations: int, ledger: Ledger, max_batch_tokens: int
) -> dict[str, int]:
    """Finish every request with ``ContinuousBatch``. In inference mode, since the supported models keep nothing between
    forwards.
    """
    return ContinuousBatch(model, prompts, num_generations, ledger, max_batch_tokens).run()


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast.

    Not inference mode: an architecture that keeps tensors between forwards (a growing rotary table) could not train
    with them.
    """
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        yield


def parity_gap(policy: SampledPolicy) -> float:
    """Compare the log-probs of a few sampled tokens with those of a plain forward: the largest difference in nats.

    Both layouts of the decode step are asked.
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
