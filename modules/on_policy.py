"""What every method that learns from its own samples shares: sampling, scoring a phase, the frozen start policy, evaluation by sampling."""

import time
from abc import abstractmethod
from dataclasses import replace

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import AlignmentModule
from modules.functional import kl
from modules.functional.ranks import from_all_ranks
from modules.networks.frozen import Frozen
from modules.networks.lora import Lora
from modules.rollout.engine import RolloutEngine, Sampling
from modules.rollout.in_process import InProcessEngine
from modules.rollout.metrics import Outcome, gap_metrics, outcomes, rollout_metrics, share_solved
from modules.rollout.scoring import in_chunks, make_rollouts, sampling_seed, to_batch, with_sums
from modules.types import Completion, PolicyBatch, PromptBatch, Reward, Rollout


class OnPolicyModule(AlignmentModule):
    """A method whose phases are sampled from the policy itself; a subclass says what a phase teaches (``finish``) and the loss.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio is 1 at the start.
        reward: scores completions.
        num_generations: completions per prompt, at least 2.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        reference: keep the frozen start policy, for a loss or for the KL to it.
        accuracy: decides right (score > 0.5) or wrong in validation; default ``reward``.
        val_generations: sampled completions per validation prompt, for pass@1 and pass@k.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling.
    """

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int,
        sampling: Sampling,
        engine: RolloutEngine | None,
        reference: bool,
        accuracy: Reward | None,
        val_generations: int,
        lora: Lora | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        seed: int,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False, lora=lora)
        if num_generations < 2:
            raise ValueError(f"num_generations is {num_generations}: a group needs at least 2 completions to compare")
        if sampling.temperature <= 0:
            raise ValueError(f"sampling.temperature is {sampling.temperature}: greedy completions of a prompt are all the same")
        if val_generations < 1:
            raise ValueError(f"val_generations must be at least 1, got {val_generations}")
        self.reward, self.accuracy = reward, accuracy or reward
        self.num_generations, self.val_generations, self.sampling, self.seed = num_generations, val_generations, sampling, seed
        self.engine = engine or InProcessEngine()
        self.reference = Frozen(self.policy) if reference else None
        self._training_start = time.perf_counter()
        self.held_out_rollouts: list[Rollout] = []  # sampled, of the current batch of held-out prompts
        self.evaluated: list[tuple[list[Outcome], list[Outcome]]] = []  # sampled and greedy, by batch of held-out prompts

    @abstractmethod
    def finish(self, batch: PolicyBatch) -> None:
        """Put what the loss needs into a phase's batch: advantages or ranks, and ``row_count`` and ``active``."""

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
        batch = to_batch(rollouts, self.device)
        mask = batch["completion_mask"]
        batch["old_logprobs"], entropies = in_chunks(self.policy_scores, batch)
        log_ratio = k3 = None
        if self.reference is not None:
            (batch["ref_logprobs"],) = in_chunks(self.reference_scores, batch)
            log_ratio = batch["old_logprobs"] - batch["ref_logprobs"]
            self.check_start(log_ratio)
            k3 = kl.k3(batch["old_logprobs"], batch["ref_logprobs"])
        self.finish(batch)
        self.rollouts = with_sums(rollouts, entropies, log_ratio, mask)
        self.phase_metrics = gap_metrics(mask, batch["old_logprobs"], batch["sampler_logprobs"], k3)
        self.phase_metrics |= {"time/sampling": sampled - start, "time/scoring": time.perf_counter() - sampled}
        self._training_start = time.perf_counter()
        return batch

    def on_train_epoch_end(self) -> None:
        """Log the phase, over all ranks: rewards, lengths, entropy, KL, and where the time went."""
        times = {**self.phase_metrics, "time/training": time.perf_counter() - self._training_start}
        seconds = sum(value for name, value in times.items() if name.startswith("time/"))
        metrics = rollout_metrics(from_all_ranks(outcomes(self.rollouts))) | times
        metrics["completions_per_second"] = len(self.rollouts) * self.trainer.world_size / seconds
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, sync_dist=True, batch_size=1)
        self.show({"reward": metrics["reward"], "length": metrics["completions/mean_length"], "kl": metrics.get("kl", 0.0)})

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted evaluation left."""
        self.evaluated = []

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sampled and greedy completions of held-out prompts; the same seeds every time, so that two evaluations compare."""
        self.evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """The same for ``test``."""
        self.evaluate(prompts, "test")

    def on_validation_epoch_end(self) -> None:
        """Log pass@1, pass@k, greedy accuracy and the numbers of the sampled completions, over all batches and ranks."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """The same under ``test/``."""
        self.log_evaluation("test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Leaves ``num_generations`` scored completions per prompt in ``rollouts``, for callbacks to write."""
        self.rollouts = make_rollouts(prompts, self.sample(prompts, self.num_generations, self.sampling, "predict"), self.reward)

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Keep what the policy does with a batch of held-out prompts."""
        rollouts = make_rollouts(prompts, self.sample(prompts, self.val_generations, self.sampling, stage), self.reward)
        batch = to_batch(rollouts, self.device)
        _, entropies = in_chunks(self.policy_scores, batch)
        self.held_out_rollouts = rollouts = with_sums(rollouts, entropies, None, batch["completion_mask"])
        greedy = make_rollouts(prompts, self.sample(prompts, 1, replace(self.sampling, temperature=0.0), stage), self.reward)
        self.evaluated.append((outcomes(rollouts, self.accuracy), outcomes(greedy, self.accuracy)))

    def log_evaluation(self, stage: str) -> None:
        """Log what was kept, of all ranks, and forget it."""
        sampled, greedy = (from_all_ranks([outcome for batch in kept for outcome in batch]) for kept in zip(*self.evaluated, strict=True))
        self.evaluated = []
        metrics = {f"pass@{k}": share_solved(sampled, k) for k in {1, self.val_generations}}
        metrics |= {"greedy_accuracy": share_solved(greedy, 1), **rollout_metrics(sampled)}
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, sync_dist=True, batch_size=1)

    def sample(self, prompts: PromptBatch, num_generations: int, sampling: Sampling, phase: str) -> list[list[Completion]]:
        """``num_generations`` completions for each prompt from the current weights."""
        self.engine.sync_weights(self.policy, self.global_step)
        seeds = [sampling_seed(self.seed, phase, uid) for uid in prompts["uid"]]
        return self.engine.generate(prompts["prompt_ids"], num_generations, sampling, seeds)

    def policy_scores(self, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N, Tc] under the current policy."""
        scores = self.policy.completion_scores(batch, self.sampling.temperature, details=True)
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies

    def reference_scores(self, batch: PolicyBatch) -> tuple[Tensor]:
        """Log-probs [N, Tc] under the frozen start policy."""
        assert self.reference is not None
        return (self.reference.completion_logprobs(batch, self.sampling.temperature),)

    def check_start(self, log_ratio: Tensor) -> None:
        """At step 0 policy and reference are the same model; anything else is a wrong reference. RuntimeError then."""
        gap = float(log_ratio.abs().max())
        if self.global_step == 0 and not gap <= 1e-3:
            raise RuntimeError(f"policy and reference differ before the first update (log-probs by up to {gap:.3g}): the KL would be meaningless")
