"""The base of methods that learn from their own samples: sampling and scoring a phase, the start policy, evaluation."""

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from modules.base import AlignmentModule
from modules.distributed import from_all_ranks, log_equal, mean_and_error, weighted_means
from modules.functional import kl
from modules.networks.companion import companion
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores
from modules.networks.reference import Frozen
from modules.rewards.function import as_reward
from modules.rewards.learned import LearnedReward
from modules.rewards.weighted_sum import every_reward
from modules.rollout.engine import RolloutEngine, Sampling
from modules.rollout.in_process import InProcessEngine
from modules.rollout.metrics import gap_metrics, outcomes, rollout_metrics, share_solved
from modules.rollout.scoring import in_chunks, make_rollouts, sampling_seed, to_batch, with_sums
from modules.seeds import run_seed
from modules.types import Completion, InstructionBatch, PolicyBatch, PromptBatch, Reward, Rollout

NEGATIVE_KL = (
    4.0  # standard errors; a right run is below by chance in 9 of 100000 phases of 64 completions, in 3 of 256
)
ENOUGH = 64  # completions of a phase, below which a standard error is too uncertain


class OnPolicyModule(AlignmentModule):
    """A method whose phases are sampled from the policy itself; a subclass says what a phase teaches (``prepare``) and
    the loss.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio is 1 at the
            start.
        reward: scores completions.
        num_generations: completions per prompt.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        reference: keep the frozen start policy, for a loss or for the KL to it; a folder or hub id keeps that model
            instead.
        accuracy: decides right (score > 0.5) or wrong in validation; default ``reward``.
        val_generations: sampled completions per validation prompt, for pass@1 and pass@k.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    least_generations = 2  # completions of a prompt that the method needs

    def __init__(
        self,
        policy: str,
        reward: Reward,
        *,
        num_generations: int,
        sampling: Sampling,
        engine: RolloutEngine | None,
        reference: bool | str,
        accuracy: Reward | None,
        val_generations: int,
        lora: Lora | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int | None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False, lora=lora)
        if num_generations < self.least_generations:
            compared = (
                ": a group needs at least 2 completions to compare"
                if self.least_generations > 1
                else ", expected at least 1"
            )
            raise ValueError(f"num_generations is {num_generations}{compared}")
        if sampling.temperature <= 0:
            raise ValueError(
                f"sampling.temperature is {sampling.temperature}: greedy completions of a prompt are all the same"
            )
        if val_generations < 1:
            raise ValueError(f"val_generations must be at least 1, got {val_generations}")
        self.reward, self.accuracy = as_reward(reward), as_reward(accuracy or reward)
        if lora is not None:
            self.share_backbone()
        self.num_generations, self.val_generations, self.sampling, self.seed = (
            num_generations,
            val_generations,
            sampling,
            run_seed(seed),
        )
        self.engine = engine or InProcessEngine()
        other = companion(self.policy, reference, "reference") if isinstance(reference, str) else None
        self.own_reference = other is None  # the policy as it starts
        self.reference = Frozen(other or self.policy, own=other is not None) if reference else None
        self._training_start = time.perf_counter()
        self._kl_warned = False
        self.record.held_out = []

    def share_backbone(self) -> None:
        """Reward models that are adapters of the policy's backbone are computed on it."""
        learned = [
            part
            for part in (*every_reward(self.reward), *every_reward(self.accuracy))
            if isinstance(part, LearnedReward)
        ]
        shared = {path for part in learned for path in part.share_backbone(self.policy)}
        for path in dict.fromkeys(path for part in learned for path in part.paths):
            own = (
                "on the policy's backbone"
                if path in shared
                else "on a model of its own: it has no adapters of the policy's backbone"
            )
            rank_zero_info(f"reward {path}: computed {own}")

    @abstractmethod
    def prepare(self, batch: PolicyBatch) -> None:
        """Put what the loss needs into a phase's batch: advantages or ranks, ``row_count`` and ``active``; numbers
        of the phase go to ``log_phase``.
        """

    def on_fit_start(self) -> None:
        """The frozen start policy goes where the trained one is."""
        if self.reference is not None:
            self.reference.to(self.device)

    def collect(self, prompts: PromptBatch) -> PolicyBatch:
        """One phase of this rank: sample, score, and the log-probs that its updates start from."""
        start = time.perf_counter()
        completions = self.sample(prompts, self.num_generations, self.sampling, str(self.current_epoch))
        sampled = time.perf_counter()
        rollouts = make_rollouts(prompts, completions, self.reward)
        self.check_scored(rollouts)
        batch = to_batch(rollouts, self.device)
        mask = batch["completion_mask"]
        if "update" in prompts:
            batch["update"] = torch.tensor(prompts["update"], device=self.device)[batch["prompt_index"]]
        batch["old_logprobs"], entropies, *values = in_chunks(self.collected_scores, batch)
        if values:
            (batch["values"],) = values
        log_ratio = k3 = None
        if self.reference is not None:
            (batch["ref_logprobs"],) = in_chunks(self.reference_scores, batch)
            log_ratio = kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
            self.check_start(log_ratio)
            k3 = kl.k3(batch["old_logprobs"], batch["ref_logprobs"])
        self.record.rollouts, self.record.metrics = with_sums(rollouts, entropies, log_ratio, mask), {}
        self.log_phase(gap_metrics(mask, batch["old_logprobs"], batch["sampler_logprobs"], k3))
        self.check_kl()
        self.prepare(batch)
        self.log_phase({"time/sampling": sampled - start, "time/scoring": time.perf_counter() - sampled})
        self._training_start = time.perf_counter()
        return batch

    def log_phase(self, metrics: Mapping[str, float]) -> None:
        """Log numbers of this rank as ``train/<name>`` at the end of the phase, as means over the ranks."""
        self.record.metrics |= metrics

    def on_train_epoch_end(self) -> None:
        """Log the phase."""
        metrics = self.phase_metrics()
        log_equal(self, {f"train/{name}": value for name, value in metrics.items()})
        short = {
            "reward": metrics["reward"],
            "length": metrics["completions/mean_length"],
            "kl": metrics.get("kl", 0.0),
        }
        log_equal(self, short, prog_bar=True, logger=False)

    def phase_metrics(self) -> dict[str, float]:
        """Rewards, lengths, entropy, KL, where the time went, and what ``log_phase`` collected, over all ranks
        (collective).
        """
        found = from_all_ranks(outcomes(self.record.rollouts))
        mine = {**self.record.metrics, "time/training": time.perf_counter() - self._training_start}
        logged = weighted_means({name: (value, 1.0) for name, value in mine.items()})
        seconds = sum(value for name, value in logged.items() if name.startswith("time/"))
        return rollout_metrics(found) | logged | {"completions_per_second": len(found) / seconds}

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sampled and greedy completions of held-out prompts; the same seeds every time, so that two evaluations
        compare.
        """
        self.evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sample and score held-out prompts under ``test/``."""
        self.evaluate(prompts, "test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Leave ``num_generations`` scored completions per prompt in ``record.rollouts``, for callbacks to write."""
        self.record.rollouts = make_rollouts(
            prompts, self.sample(prompts, self.num_generations, self.sampling, "predict"), self.reward
        )

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Keep what the policy does with a batch of held-out prompts."""
        rollouts = make_rollouts(prompts, self.sample(prompts, self.val_generations, self.sampling, stage), self.reward)
        batch = to_batch(rollouts, self.device)
        mask = batch["completion_mask"]
        logprobs, entropies = in_chunks(self.policy_scores, batch)
        log_ratio = None
        if self.reference is not None:
            self.reference.to(self.device)
            log_ratio = logprobs - in_chunks(self.reference_scores, batch)[0]
        self.record.held_out = rollouts = with_sums(rollouts, entropies, log_ratio, mask)
        greedy = make_rollouts(
            prompts, self.sample(prompts, 1, replace(self.sampling, temperature=0.0), stage), self.reward
        )
        self.record.sampled += outcomes(rollouts, self.accuracy)
        self.record.greedy += outcomes(greedy, self.accuracy)

    def evaluation_metrics(self) -> dict[str, float]:
        """Join what was logged, and add pass@1, pass@k, greedy accuracy and the numbers of the samples."""
        sampled, greedy = from_all_ranks(self.record.sampled), from_all_ranks(self.record.greedy)
        solved = {f"pass@{k}": share_solved(sampled, k) for k in {1, self.val_generations}}
        solved |= {"greedy_accuracy": share_solved(greedy, 1), **rollout_metrics(sampled)}
        return super().evaluation_metrics() | solved

    def sample(
        self, prompts: PromptBatch, num_generations: int, sampling: Sampling, phase: str
    ) -> list[list[Completion]]:
        """``num_generations`` completions for each prompt from the current weights."""
        self.engine.sync_weights(self.policy, self.global_step)
        seeds = [sampling_seed(self.seed, phase, uid) for uid in prompts["uid"]]
        return self.engine.generate(prompts["prompt_ids"], num_generations, sampling, seeds)

    def policy_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Log-probs and entropies [N, Tc] under the current policy."""
        scores = self.policy.completion_scores(batch, self.sampling.temperature, details=True)
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies

    def collected_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Log-probs and entropies that a phase starts from, and values [N, Tc] where the method has a critic."""
        return self.policy_scores(batch)

    def reference_scores(self, batch: PolicyBatch) -> tuple[Tensor]:
        """Log-probs [N, Tc] under the frozen start policy."""
        assert self.reference is not None
        return (self.reference.completion_logprobs(batch, self.sampling.temperature),)

    def scores(self, batch: InstructionBatch) -> TokenScores:
        """Scores [N, T] of the supervised tokens of texts that the policy must not forget."""
        return self.policy.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids"))

    def check_scored(self, rollouts: list[Rollout]) -> None:
        """Refuse, with a ValueError, a first phase without answers and scores: nothing would ever be learned."""
        judged = [rollout.answer is not None or rollout.reward is not None for rollout in rollouts]
        if self.global_step == 0 and not any(from_all_ranks([any(judged)])):
            raise ValueError(
                f"{self.reward.name} scored none of the first {len(rollouts)} completions, whose rows have no answer "
                "to compare with: name its column with data.columns, or use a reward that needs none"
            )

    def check_start(self, log_ratio: Tensor) -> None:
        """Refuse, with a ValueError, a reference that differs at step 0 from the policy that it is a copy of."""
        gap = float(log_ratio.abs().max())
        if self.global_step == 0 and self.own_reference and not gap <= 1e-3:
            raise ValueError(
                f"policy and reference differ before the first update (log-probs by up to {gap:.3g}): the KL would be "
                "meaningless"
            )

    def check_kl(self) -> None:
        """Warn once where the KL of a phase is further below 0 than chance and rounding explain."""
        sums = [rollout.kl for rollout in self.record.rollouts if rollout.kl is not None]
        mean, error = mean_and_error(sums)
        enough = sum(from_all_ranks([len(sums)])) >= ENOUGH
        if enough and mean < -NEGATIVE_KL * error - 1e-5 and not self._kl_warned:
            self._kl_warned = True
            rank_zero_warn(
                f"the KL to the start is {mean:.3g} +- {error:.2g} nats a completion, and a KL is never below 0: the "
                "completions do not come from "
                "the distribution that is scored. Causes: top_p below 1, top_k, an engine with another temperature or "
                "with stop tokens suppressed, dropout, weights that were not synced"
            )
