"""What every method that learns from its own samples shares: sampling, scoring a phase, the frozen start policy,
evaluation by sampling.
"""

import time
from abc import abstractmethod
from dataclasses import replace

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from modules.base import AlignmentModule
from modules.distributed import from_all_ranks, log_equal, mean_and_error, mean_of_ranks
from modules.functional import kl
from modules.networks.companion import companion
from modules.networks.frozen import Frozen
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores
from modules.rewards.learned import LearnedReward
from modules.rewards.weighted_sum import every_reward
from modules.rollout.engine import RolloutEngine, Sampling
from modules.rollout.in_process import InProcessEngine
from modules.rollout.metrics import Outcome, gap_metrics, outcomes, rollout_metrics, share_solved
from modules.rollout.scoring import in_chunks, make_rollouts, sampling_seed, to_batch, with_sums
from modules.types import Completion, InstructionBatch, PolicyBatch, PromptBatch, Reward, Rollout

NEGATIVE_KL = (
    4.0  # standard errors; a right run is below by chance in 9 of 100000 phases of 64 completions, in 3 of 256
)
ENOUGH = 64  # completions of a phase, below which a standard error is too uncertain


class OnPolicyModule(AlignmentModule):
    """A method whose phases are sampled from the policy itself; a subclass says what a phase teaches (``finish``) and
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
        seed: of the sampling.
    """

    least_generations = 2  # completions of a prompt that the method needs

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int,
        sampling: Sampling,
        engine: RolloutEngine | None,
        reference: bool | str,
        accuracy: Reward | None,
        val_generations: int,
        lora: Lora | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int,
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
        self.reward, self.accuracy = reward, accuracy or reward
        if lora is not None:
            self.share_backbone()
        self.num_generations, self.val_generations, self.sampling, self.seed = (
            num_generations,
            val_generations,
            sampling,
            seed,
        )
        self.engine = engine or InProcessEngine()
        other = companion(self.policy, reference, "reference") if isinstance(reference, str) else None
        self.own_reference = other is None  # the policy as it starts
        self.reference = Frozen(other or self.policy, own=other is not None) if reference else None
        self._training_start = time.perf_counter()
        self._kl_warned = False
        self.held_out_rollouts: list[Rollout] = []  # sampled, of the current batch of held-out prompts
        self.evaluated: list[
            tuple[list[Outcome], list[Outcome]]
        ] = []  # sampled and greedy, by batch of held-out prompts

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
    def finish(self, batch: PolicyBatch) -> None:
        """Put what the loss needs into a phase's batch: advantages or ranks, ``row_count`` and ``active``; numbers to
        log go to ``phase_metrics``.
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
        self.rollouts = with_sums(rollouts, entropies, log_ratio, mask)
        self.phase_metrics = gap_metrics(mask, batch["old_logprobs"], batch["sampler_logprobs"], k3)
        self.check_kl()
        self.finish(batch)
        self.phase_metrics |= {"time/sampling": sampled - start, "time/scoring": time.perf_counter() - sampled}
        self._training_start = time.perf_counter()
        return batch

    def on_train_epoch_end(self) -> None:
        """Log the phase, over all ranks: rewards, lengths, entropy, KL, and where the time went."""
        times = mean_of_ranks({**self.phase_metrics, "time/training": time.perf_counter() - self._training_start})
        seconds = sum(value for name, value in times.items() if name.startswith("time/"))
        found = from_all_ranks(outcomes(self.rollouts))
        metrics = rollout_metrics(found) | times | {"completions_per_second": len(found) / seconds}
        log_equal(self, {f"train/{name}": value for name, value in metrics.items()})
        self.show(
            {"reward": metrics["reward"], "length": metrics["completions/mean_length"], "kl": metrics.get("kl", 0.0)}
        )

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted evaluation left."""
        self.evaluated = []

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sampled and greedy completions of held-out prompts; the same seeds every time, so that two evaluations
        compare.
        """
        self.evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """The same for ``test``."""
        self.evaluate(prompts, "test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Leaves ``num_generations`` scored completions per prompt in ``rollouts``, for callbacks to write."""
        self.rollouts = make_rollouts(
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
        self.held_out_rollouts = rollouts = with_sums(rollouts, entropies, log_ratio, mask)
        greedy = make_rollouts(
            prompts, self.sample(prompts, 1, replace(self.sampling, temperature=0.0), stage), self.reward
        )
        self.evaluated.append((outcomes(rollouts, self.accuracy), outcomes(greedy, self.accuracy)))

    def log_evaluation(self, stage: str) -> None:
        """Log pass@1, pass@k, greedy accuracy and the sampled completions' numbers, over all batches and ranks."""
        sampled, greedy = (
            from_all_ranks([outcome for batch in kept for outcome in batch])
            for kept in zip(*self.evaluated, strict=True)
        )
        self.evaluated = []
        metrics = {f"pass@{k}": share_solved(sampled, k) for k in {1, self.val_generations}}
        metrics |= {"greedy_accuracy": share_solved(greedy, 1), **rollout_metrics(sampled)}
        log_equal(self, {f"{stage}/{name}": value for name, value in metrics.items()})

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
        """What a phase starts from: the same, and values [N, Tc] where the method has a critic."""
        return self.policy_scores(batch)

    def reference_scores(self, batch: PolicyBatch) -> tuple[Tensor]:
        """Log-probs [N, Tc] under the frozen start policy."""
        assert self.reference is not None
        return (self.reference.completion_logprobs(batch, self.sampling.temperature),)

    def scores(self, batch: InstructionBatch) -> TokenScores:
        """Scores [N, T] of the supervised tokens of texts that the policy must not forget."""
        return self.policy.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids"))

    def check_scored(self, rollouts: list[Rollout]) -> None:
        """ValueError where a run's first phase has neither an answer nor a score: nothing would ever be learned."""
        judged = [rollout.answer is not None or rollout.reward is not None for rollout in rollouts]
        if self.global_step == 0 and not any(from_all_ranks([any(judged)])):
            raise ValueError(
                f"{self.reward.name} scored none of the first {len(rollouts)} completions, whose rows have no answer "
                "to compare with: name its "
                "column with data.columns, or use a reward that needs none"
            )

    def check_start(self, log_ratio: Tensor) -> None:
        """At step 0 policy and reference are the same model; anything else is a wrong reference. ValueError then."""
        gap = float(log_ratio.abs().max())
        if self.global_step == 0 and self.own_reference and not gap <= 1e-3:
            raise ValueError(
                f"policy and reference differ before the first update (log-probs by up to {gap:.3g}): the KL would be "
                "meaningless"
            )

    def check_kl(self) -> None:
        """Warn, once, where the KL of a phase with enough completions is below 0 by more than chance and rounding
        explain.
        """
        sums = [rollout.kl for rollout in self.rollouts if rollout.kl is not None]
        mean, error = mean_and_error(sums)
        enough = sum(from_all_ranks([len(sums)])) >= ENOUGH
        if enough and mean < -NEGATIVE_KL * error - 1e-5 and not self._kl_warned:
            self._kl_warned = True
            rank_zero_warn(
                f"the KL to the start is {mean:.3g} +- {error:.2g} nats a completion, and a KL is never below 0: the "
                "completions do not come from "
                "the distribution that is scored. Causes: top_p below 1, top_k, an engine with another temperature or "
                "with stop tokens suppressed, "
                "dropout, weights that were not synced"
            )
