"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1), and later choices of its parts."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import count_tokens
from modules.functional import kl
from modules.functional.masked import aggregate
from modules.functional.ranges import check_numbers
from modules.losses import Clipped, ImportanceWeights, PolicyObjective
from modules.losses.policy import leave_out_unscored
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule, Validation
from modules.rollout.engine import RolloutEngine
from modules.rollout.sampling import Sampling
from modules.types import PolicyBatch, Reward


class GRPOModule(OnPolicyModule):
    """Samples a group of completions per prompt, compares each reward with its group, and moves towards the better ones.

    In each phase ``collect`` samples, scores, and freezes log-probs and advantages. ``training_step`` is only the loss
    ``-min(ratio A, clip(ratio) A)`` (+ ``beta`` x KL). It differs from the paper in three ways: the loss is a mean over
    the tokens of the whole step instead of per completion, the upper clip is higher (both DAPO, arXiv 2503.14476), and
    there is no KL term unless ``beta`` asks for one. The published form is ``SequenceMean`` with clips 0.2/0.2 and
    ``beta`` 0.04. Dr. GRPO is ``group_center`` with ``ConstantNorm``; RLOO's advantage is ``leave_one_out``.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio starts at 1.
        reward: scores completions; ``WeightedSum`` adds several.
        num_generations: completions per prompt, at least 2.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        importance: weighs tokens whose probability the engine and the trainer compute differently; None = equally.
        advantage: rewards [N], group [N] -> advantages [N]: ``group_zscore``, ``group_center``, ``leave_one_out``, or
            the dotted path of your own function; default the objective's (``group_zscore`` for most).
        objective: the policy loss; default ``Clipped``. Others are ``GSPO``, ``CISPO`` and ``MirrorDescent``.
        beta: weight of the KL to the frozen start policy in the loss, nats; 0 = none.
        kl_loss: estimator of that term: ``weighted_k3``, whose gradient is the reverse KL's in every update, or ``k2``,
            whose gradient is that in the first update of a phase.
        measure_kl: keep the frozen start policy and log the KL to it even with ``beta`` 0.
        validation: what decides right or wrong there, and how many completions of a prompt are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        importance: ImportanceWeights | None = None,
        advantage: Callable[[Tensor, Tensor], Any] | None = None,  # Any: a function need not be annotated
        objective: PolicyObjective | None = None,
        beta: float = 0.0,
        kl_loss: Callable[..., Any] = kl.weighted_k3,
        measure_kl: bool = False,
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
            importance=importance,
            reference=beta > 0 or measure_kl,
            validation=validation,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        check_numbers("GRPOModule", beta=(beta, "[0, inf)"))
        if kl_loss is kl.k1:
            raise ValueError("kl_loss: k1 has no gradient on average; use weighted_k3 or k2")
        self.objective = objective or Clipped()
        self.advantage = advantage or self.objective.make_advantages
        self.beta, self.kl_loss = beta, kl_loss

    def prepare(self, batch: PolicyBatch) -> None:
        """Make the advantages of the phase, and mark the completions that have a gradient."""
        mask = leave_out_unscored(batch)["completion_mask"]
        advantages = self.advantage(batch["rewards"], batch["group"])  # [N]
        batch["advantages"] = self.weigh(batch, advantages[:, None] * mask)
        batch["row_count"] = self.objective.aggregation.row_count(mask)
        batch["active"] = self.has_gradient(batch["advantages"], mask)

    def has_gradient(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Tell which completions have one, bool [N], from ``advantages`` and the keep-mask of scored ones, [N, Tc]."""
        return mask.any(1) & ((advantages != 0).any(1) | (self.beta > 0 or not self.objective.needs_advantage))

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the step's objective."""
        logprobs = self.policy.completion_scores(batch, self.sampling.temperature).logprobs
        scored = leave_out_unscored(batch)
        mask = scored["completion_mask"]
        loss, metrics = self.objective(logprobs, scored)
        self.log_step(metrics, weight=float(mask.sum()))
        effective = float((batch["advantages"] != 0).any(1).sum())
        tokens = count_tokens(batch, self.has_gradient(batch["advantages"], mask))
        self.log_step({"policy_loss": loss, "effective_batch": effective, "tokens": tokens})
        if self.beta > 0:
            distance = kl.apply_estimator(
                self.kl_loss, logprobs, batch["ref_logprobs"], batch["old_logprobs"]
            )  # [N, Tc]
            weights = self.objective.aggregation.weights(mask)
            loss = loss + self.beta * aggregate(distance, weights, batch["denominator"])
        return self.step_loss(loss)
