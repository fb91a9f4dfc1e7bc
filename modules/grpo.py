"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1), with the choices that came after it."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import AlignmentModule
from modules.functional import kl
from modules.functional.masked import aggregate
from modules.networks.frozen import Frozen
from modules.objectives import Advantage, Clipped, GroupZScore, PolicyObjective
from modules.rollout.engine import RolloutEngine, Sampling
from modules.rollout.in_process import InProcessEngine
from modules.rollout.metrics import Outcome, from_all_ranks, gap_metrics, outcomes, rollout_metrics, share_solved
from modules.rollout.scoring import in_chunks, make_rollouts, sampling_seed, to_batch, with_sums
from modules.types import Completion, PolicyBatch, PromptBatch, Reward


class GRPOModule(AlignmentModule):
    """Sample a group of completions per prompt, compare each reward with its group, and move towards the better ones.

    Each phase: ``collect`` samples, scores and freezes log-probs and advantages; ``training_step`` is only the loss
    ``-min(ratio A, clip(ratio) A)`` (+ ``beta`` x KL). What differs from the paper: the loss is a mean over the tokens of the whole
    step instead of per completion, the upper clip is higher (both DAPO, arXiv 2503.14476), and there is no KL term unless
    ``beta`` asks for it. The published form is ``SequenceMean`` with clips 0.2/0.2 and ``beta`` 0.04; Dr. GRPO is
    ``GroupCenter`` with ``ConstantNorm``; RLOO's advantage is ``LeaveOneOut``.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio is 1 at the start.
        reward: scores completions; ``WeightedSum`` adds several.
        num_generations: completions per prompt, at least 2.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        advantage: rewards -> advantages; default ``GroupZScore``.
        objective: the policy loss; default ``Clipped``.
        beta: weight of the KL to the frozen start policy in the loss, nats; 0 = none.
        kl_loss: estimator of that term whose gradient is the reverse KL's: ``modules.functional.kl.weighted_k3`` or ``.k2``.
        measure_kl: keep the frozen start policy and log the KL to it even with ``beta`` 0.
        accuracy: decides right (score > 0.5) or wrong in validation; default ``reward``.
        val_generations: sampled completions per validation prompt, for pass@1 and pass@k.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling.
    """

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        advantage: Advantage | None = None,
        objective: PolicyObjective | None = None,
        beta: float = 0.0,
        kl_loss: Callable[[Tensor, Tensor], Tensor] = kl.weighted_k3,
        measure_kl: bool = False,
        accuracy: Reward | None = None,
        val_generations: int = 1,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False)
        if num_generations < 2:
            raise ValueError(f"num_generations is {num_generations}: a group needs at least 2 completions to compare")
        if sampling.temperature <= 0:
            raise ValueError(f"sampling.temperature is {sampling.temperature}: greedy completions of a prompt are all the same")
        if beta < 0 or val_generations < 1:
            raise ValueError(f"beta must be >= 0 and val_generations at least 1, got {beta} and {val_generations}")
        self.reward, self.accuracy = reward, accuracy or reward
        self.num_generations, self.val_generations, self.sampling, self.seed = num_generations, val_generations, sampling, seed
        self.engine = engine or InProcessEngine()
        self.advantage, self.objective = advantage or GroupZScore(), objective or Clipped()
        self.beta, self.kl_loss = beta, kl_loss
        self.reference = Frozen(self.policy) if beta > 0 or measure_kl else None
        self._training_start = time.perf_counter()
        self.evaluated: list[tuple[list[Outcome], list[Outcome]]] = []  # sampled and greedy, by batch of held-out prompts

    def on_fit_start(self) -> None:
        """The frozen start policy goes where the trained one is."""
        if self.reference is not None:
            self.reference.to(self.device)

    def collect(self, prompts: PromptBatch) -> PolicyBatch:
        """One phase of this rank: sample, score, and the log-probs and advantages that its updates start from."""
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
        advantages = self.advantage(batch["rewards"], batch["group"])  # [N]
        batch["advantages"] = advantages[:, None] * mask
        batch["row_count"] = self.objective.aggregation.row_count(mask)
        batch["active"] = (advantages != 0) | (self.beta > 0)
        self.rollouts = with_sums(rollouts, entropies, log_ratio, mask)
        self.phase_metrics = gap_metrics(mask, batch["old_logprobs"], batch["sampler_logprobs"], k3)
        self.phase_metrics |= {"time/sampling": sampled - start, "time/scoring": time.perf_counter() - sampled}
        self._training_start = time.perf_counter()
        return batch

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """The loss [] of a micro-batch: its share of the step's objective."""
        logprobs = self.policy.completion_scores(batch, self.sampling.temperature).logprobs
        loss, metrics = self.objective(logprobs, batch)
        tokens = float(batch["completion_mask"].sum())
        self.log_step(metrics, weight=tokens)
        self.log_step({"policy_loss": loss, "tokens": tokens + float(batch["prompt_mask"].sum())})
        if self.beta > 0:
            weights = self.objective.aggregation.weights(batch["completion_mask"])
            loss = loss + self.beta * aggregate(self.kl_loss(logprobs, batch["ref_logprobs"]), weights, batch["denominator"])
        return self.step_loss(loss)

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
        rollouts = with_sums(rollouts, entropies, None, batch["completion_mask"])
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
