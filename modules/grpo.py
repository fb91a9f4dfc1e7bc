"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1), and later choices of its parts."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from modules.base import count_tokens
from modules.functional import kl
from modules.functional.masked import aggregate
from modules.functional.ranges import check_numbers
from modules.generation import Validation
from modules.losses import Advantage, Clipped, ImportanceWeights, PolicyObjective
from modules.losses.advantage import as_advantage
from modules.losses.policy import leave_out_unscored
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule
from modules.rewards.combined import WeightedSum
from modules.rollout.engine import RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.metrics import make_outcomes
from modules.rollout.phases.dynamic_sampling import DynamicSampling, Gathered
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import weigh_credits
from modules.trainer.pieces import train_by_pieces
from modules.trainer.ranks import from_all_ranks
from modules.trainer.steps import epoch_is_whole
from modules.types import PolicyBatch, PromptBatch, Reward


class GRPOModule(OnPolicyModule):
    """Samples a group of completions per prompt, compares each reward with its group, and moves to the better ones.

    In each phase ``collect`` samples, scores, and freezes log-probs and advantages. ``training_step`` is only the loss
    ``-min(ratio A, clip(ratio) A)`` (+ ``beta`` x KL). It differs from the paper in three ways: the loss is a mean over
    the tokens of the whole step instead of per completion, the upper clip is higher (both DAPO, arXiv 2503.14476), and
    there is no KL term unless ``beta`` asks for one. The published form is ``SequenceMean`` with clips 0.2/0.2 and
    ``beta`` 0.04. Dr. GRPO is ``Centered`` with ``ConstantNorm``; the other methods of the family are objectives.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio starts at 1.
        reward: scores completions; ``WeightedSum`` adds several.
        num_generations: completions per prompt; at least 2, or what the advantage needs.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours; None = no tools.
        importance: weights that correct for the different probabilities that engine and trainer compute. false = none,
            true = the default ones, None = true if the engine samples from a copy of the weights, else false.
        advantage: ``ZScore``, ``Centered``, ``LeaveOneOut``, ``Whitened``, ``MaxRL``, ``GDPO``, or your own function of
            rewards [N] and group [N]; default the objective's (``ZScore`` for most).
        objective: the policy loss; default ``Clipped``. Others are ``GSPO``, ``GSPOToken``, ``CISPO``, ``REINFORCE``,
            ``RLOO``, ``REINFORCEPlusPlus``, ``SAPO``, ``DPPO`` and ``MirrorDescent``.
        beta: weight of the KL to the frozen start policy, nats; 0 = none.
        kl_loss: estimator of the KL in the loss: ``weighted_k3``, whose gradient is the reverse KL's in every update,
            or ``k2``, whose gradient is that in the first update of a phase. None = the KL is part of the reward
            instead, as ``k1`` without gradient.
        measure_kl: keep the frozen start policy and log the KL to it even with ``beta`` 0.
        refresh_every: every so many phases the reference becomes the current policy (DeepSeek-R1, arXiv 2501.12948);
            ``kl`` is measured to the moved reference. None = never.
        entropy: weight of the entropy in the objective, per nat; 0 = none.
        mask_truncated: completions that were cut off teach nothing, but count in their group (DAPO's overlong
            filtering; TRL's ``mask_truncated_completions``).
        dynamic_sampling: sample until there are enough groups with right and wrong answers; None = train on all.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    least_generations = 1

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        environment: Environment | None = None,
        importance: ImportanceWeights | bool | None = None,
        advantage: Advantage | None = None,
        objective: PolicyObjective | None = None,
        beta: float = 0.0,
        kl_loss: Callable[..., Any] | None = kl.weighted_k3,  # Any: a function need not be annotated
        measure_kl: bool = False,
        refresh_every: int | None = None,
        entropy: float = 0.0,
        mask_truncated: bool = False,
        dynamic_sampling: DynamicSampling | None = None,
        validation: Validation = Validation(),  # noqa: B008
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
        scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            policy,
            reward,
            num_generations=num_generations,
            sampling=sampling,
            engine=engine,
            environment=environment,
            importance=importance,
            reference=beta > 0 or measure_kl,
            validation=validation,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        check_numbers(
            "GRPOModule",
            beta=(beta, "[0, inf)"),
            refresh_every=(refresh_every, "[1, inf)"),
            entropy=(entropy, "(-inf, inf)"),
        )
        if kl_loss is kl.k1:
            raise ValueError(
                "kl_loss: k1 as a loss has no gradient on average; use weighted_k3 or k2, or null to have k1 in the "
                "reward"
            )
        if refresh_every is not None and self.reference is None:
            raise ValueError("refresh_every moves a reference, and there is none: set beta above 0, or measure_kl")
        self.objective = objective or Clipped()
        self.advantage = as_advantage(advantage or self.objective.default_advantage())
        self.require_generations(self.advantage.least_generations)
        self.advantage.check(self.reward)
        if beta > 0 and kl_loss is None and not self.advantage.takes_kl:
            raise ValueError(
                f"advantage {type(self.advantage).__name__} has no place for a KL in the reward: set kl_loss to "
                "weighted_k3 or k2"
            )
        if advantage is not None and getattr(self.objective, "baseline", False):
            raise ValueError(
                f"objective {type(self.objective).__name__} with a baseline brings its own advantage, and "
                f"{type(self.advantage).__name__} would take its place: leave out one of them"
            )
        if importance and self.objective.corrects_sampler:
            raise ValueError(
                f"objective {type(self.objective).__name__} weighs tokens by p of the trainer / p of the sampler "
                "itself, and importance would do so again: leave one of them out"
            )
        if self.objective.corrects_sampler:
            self.importance = None
        if dynamic_sampling is not None:
            self.require_generations(2)
        if dynamic_sampling is not None and self.overlap is not None:
            raise ValueError(
                "dynamic_sampling draws as many prompts as a phase turns out to need, so that the next phases are not known "
                "ahead: set max_staleness of the engine to 0 or leave dynamic_sampling out"
            )
        if dynamic_sampling is not None and sampling.partial is not None:
            raise ValueError(
                "dynamic_sampling needs whole completions in the phase that draws them, and sampling.partial carries them "
                "over: leave one of them out"
            )
        if dynamic_sampling is not None and self.accuracy is None:
            raise ValueError(
                f"dynamic_sampling asks which answers are right, and {self.reward.name} does not say that: name a "
                "reward that does, with model.validation.accuracy"
            )
        self.record.credits = []
        self.beta, self.kl_loss, self.refresh_every = beta, kl_loss, refresh_every
        self.move_reference(refresh_every is not None)
        self.entropy, self.mask_truncated, self.dynamic_sampling = entropy, mask_truncated, dynamic_sampling

    def gather(self, prompts: PromptBatch) -> Gathered:
        """Sample and score a phase, with further prompts where ``dynamic_sampling`` asks for them."""
        if self.dynamic_sampling is None:
            return super().gather(prompts)
        return self.dynamic_sampling(
            self.record.carried,
            len(prompts["uid"]),
            lambda number: self.sample_rollouts(prompts if number == 0 else prompts["further"]()),
            lambda rollouts: make_outcomes(rollouts, self.accuracy, scored_by=self.reward),
        )

    def prepares_from_scores(self) -> bool:
        """Tell whether ``prepare`` reads log-probs: for a KL in the reward, for ``importance``, and for some
        advantages.
        """
        in_reward = self.beta > 0 and self.kl_loss is None
        return in_reward or self.importance is not None or self.advantage.reads_logprobs

    def prepare(self, batch: PolicyBatch) -> None:
        """Make the advantages of the phase, and mark the completions that have a gradient."""
        if self.beta > 0 and self.kl_loss is None:
            batch["penalties"] = self.beta * kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
        if isinstance(self.reward, WeightedSum):
            batch["part_weights"] = torch.tensor(self.reward.find_weights(self.current_epoch), device=self.device)
        advantages = self.advantage(batch)  # [N] or [N, Tc]
        batch["teaches"] = ~batch["rewards"].isnan()
        if self.mask_truncated:
            batch["teaches"] &= batch["stopped"]
        if self.mask_truncated and not any(from_all_ranks([bool(batch["teaches"].any())])):
            rank_zero_warn(
                f"phase {self.current_epoch}: no completion ended within sampling.max_completion_length, and "
                "mask_truncated leaves out those that were cut off, so nothing is learned: raise the length"
            )
        mask = leave_out_unscored(batch)["completion_mask"]
        batch["advantages"] = self.weigh(batch, (advantages if advantages.dim() == 2 else advantages[:, None]) * mask)
        batch["row_count"] = self.objective.aggregation.row_count(mask)
        batch["active"] = self.has_gradient(batch["advantages"], mask)
        self.record.credits = weigh_credits(batch, self.objective.aggregation.weights(mask), mask)

    def has_gradient(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Tell which completions have a gradient, bool [N], from ``advantages`` and the ``mask`` of tokens that teach,
        [N, Tc].
        """
        all_of_them = self.has_kl_loss or self.entropy != 0 or not self.objective.needs_advantage
        return mask.any(1) & ((advantages != 0).any(1) | all_of_them)

    @property
    def has_kl_loss(self) -> bool:
        """Whether the KL is part of the loss."""
        return self.beta > 0 and self.kl_loss is not None

    def on_train_batch_start(self, batch: PolicyBatch, batch_idx: int) -> None:
        """Do what every method does, and drop the optimizer's moments at the start of a phase where the objective says
        so.
        """
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0 and self.objective.resets_optimizer:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    @train_by_pieces
    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the step's objective."""
        scores = self.train_scores(batch, entropy=self.entropy != 0)
        batch = self.start_from(batch, scores)
        scored, logprobs = leave_out_unscored(batch), scores.logprobs
        mask, denominator = scored["completion_mask"], batch["denominator"]
        weights = self.objective.aggregation.weights(mask)
        loss, metrics = self.objective(logprobs, scored)
        self.log_step(metrics, weight=mask.sum())
        effective = (batch["advantages"] != 0).any(1).sum()
        tokens = count_tokens(batch, self.has_gradient(batch["advantages"], mask))
        self.log_step({"policy_loss": loss, "effective_batch": effective, "tokens": tokens})
        if self.has_kl_loss:
            assert self.kl_loss is not None
            distance = kl.apply_estimator(self.kl_loss, logprobs, batch["ref_logprobs"], batch["old_logprobs"])
            loss = loss + self.beta * aggregate(distance, weights, denominator)
        if self.entropy != 0:
            assert scores.entropies is not None
            loss = loss - self.entropy * aggregate(scores.entropies, weights, denominator)
        return self.step_loss(loss)

    def on_train_epoch_end(self) -> None:
        """Log the phase and refresh the reference, unless ``max_steps`` cut the phase short."""
        super().on_train_epoch_end()
        due = self.refresh_every is not None and (self.current_epoch + 1) % self.refresh_every == 0
        if due and epoch_is_whole(self.trainer) and self.reference is not None:
            self.reference.mix(self.policy, 1.0)
