"""Proximal Policy Optimization with a learned critic (arXiv 1707.06347), as language models are aligned with it
(1909.08593, 2203.02155).
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from modules.distributed import explained_variance, from_all_ranks, mean_and_error, whiten_over_ranks
from modules.functional import kl
from modules.functional.advantages import gae
from modules.functional.masked import aggregate
from modules.losses import AdaptiveKL
from modules.losses.policy_loss import clipped_policy_loss, ratio_moments
from modules.losses.reward_shaping import penalize_missing_eos, token_rewards
from modules.losses.value import clipped_value_loss
from modules.networks.critic import Critic, Value
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import RolloutEngine, Sampling
from modules.types import InstructionBatch, PolicyBatch, Reward


class PPOModule(OnPolicyModule):
    """Sample completions, score them, and move towards tokens that turned out better than a learned critic expected.

    Each phase: ``collect`` samples and scores; ``finish`` puts the score on the last token and -kl_coef log(pi /
    reference) on every token, and makes advantages by GAE; ``training_step`` is only the loss

        -min(ratio A, clip(ratio) A) + vf_coef 1/2 max((V - R)^2, (clip(V) - R)^2) [+ kl_coef KL] [- entropy_coef H] [-
        ptx_coef log pi(text)],

    each a mean over the tokens of the whole optimiser step, on all ranks. InstructGPT's setting is
    kl_coef 0.02, one inner epoch in eight updates, ``value.model`` the reward model, ptx, and ``AveragedWeights`` among
    the callbacks.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio is 1 at the
            start.
        reward: scores completions. With ``lora``, reward models that are adapters of the policy's backbone are computed
            on it.
        num_generations: completions per prompt.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        gamma: [0, 1], discount per token.
        lam: [0, 1], GAE's lambda; 1 is advised for long chains of thought (DeepSeek-R1, 2501.12948, supplement A.3).
        cliprange: >= 0, of the probability ratio.
        dual_clip: > 1 bounds the loss of a token with A < 0 by -dual_clip A (1912.09729); None = unbounded.
        cliprange_value: > 0, how far a value may move from the one at collection before it stops paying; None = as far
            as it likes.
        vf_coef: >= 0, weight of the value loss.
        value: where the critic comes from, its learning rate and warm-up.
        kl_coef: >= 0, weight of the KL to the reference, per nat; the first one where ``adaptive_kl`` moves it.
        adaptive_kl: holds the KL at a target.
        kl_loss: None = the KL is part of the reward, as k1 without gradient; ``modules.functional.kl.weighted_k3`` or
            ``.k2`` = of the loss instead.
        reference: None = the policy as it starts; a folder or hub id = another model.
        whiten_rewards: divide a phase's token rewards by their standard deviation; their mean stays. Values are then in
            those units.
        missing_eos_penalty: >= 0, taken from the score of completions that did not end by themselves; None = nothing.
        replace_missing_eos: their score is -missing_eos_penalty, whatever it was, as in 1909.08593 (which spares bad
            ones that were cut off).
        entropy_coef: weight of the entropy bonus, per nat.
        ptx_coef: >= 0, weight of the log-likelihood of ``data.ptx`` per token (PPO-ptx; InstructGPT's 27.8 is for a sum
            that it does not define).
        accuracy: decides right (score > 0.5) or wrong in validation; default ``reward``.
        val_generations: sampled completions per validation prompt, for pass@1 and pass@k.
        lora: train low-rank adapters of policy and critic instead of all weights; then policy, reference and critic
            share one frozen backbone.
        optimizer: parameters -> optimizer; default AdamW, learning rate 3e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.

    Raises:
        ValueError: values out of range; in ``setup``, ``ptx_coef`` without ``data.ptx``.
    """

    least_generations = 1

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        cliprange: float = 0.2,
        dual_clip: float | None = None,
        cliprange_value: float | None = 0.2,
        vf_coef: float = 0.1,
        value: Value = Value(),  # noqa: B008 (frozen)
        kl_coef: float = 0.05,
        adaptive_kl: AdaptiveKL | None = None,
        kl_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        reference: str | None = None,
        whiten_rewards: bool = False,
        missing_eos_penalty: float | None = None,
        replace_missing_eos: bool = False,
        entropy_coef: float = 0.0,
        ptx_coef: float = 0.0,
        accuracy: Reward | None = None,
        val_generations: int = 1,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-6),
        scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        weights = {
            "vf_coef": vf_coef,
            "kl_coef": kl_coef,
            "ptx_coef": ptx_coef,
            "missing_eos_penalty": missing_eos_penalty,
            "cliprange": cliprange,
        }
        check_numbers(
            {"gamma": gamma, "lam": lam},
            weights,
            {"cliprange_value": (cliprange_value, 0), "dual_clip": (dual_clip, 1)},
        )
        if adaptive_kl is not None and kl_coef == 0:
            raise ValueError("adaptive_kl multiplies kl_coef, and 0 stays 0: start above it")
        if kl_loss is kl.k1:
            raise ValueError("kl_loss k1 has no gradient on average: take modules.functional.kl.weighted_k3 or k2")
        if replace_missing_eos and missing_eos_penalty is None:
            raise ValueError(
                "replace_missing_eos puts -missing_eos_penalty in place of a score: set missing_eos_penalty"
            )
        start = True if reference in (None, policy) else str(reference)
        super().__init__(
            policy,
            reward,
            num_generations,
            sampling,
            engine,
            start,
            accuracy,
            val_generations,
            lora,
            optimizer,
            scheduler,
            seed,
        )
        self.gamma, self.lam, self.cliprange, self.dual_clip, self.cliprange_value = (
            gamma,
            lam,
            cliprange,
            dual_clip,
            cliprange_value,
        )
        self.vf_coef, self.kl_coef, self.adaptive_kl, self.kl_loss = vf_coef, kl_coef, adaptive_kl, kl_loss
        self.whiten_rewards, self.missing_eos_penalty, self.replace_missing_eos = (
            whiten_rewards,
            missing_eos_penalty,
            replace_missing_eos,
        )
        self.entropy_coef, self.ptx_coef, self.warmup_phases, self.value_lr = (
            entropy_coef,
            ptx_coef,
            value.warmup_phases,
            value.lr,
        )
        self.critic = Critic(self.policy, value.model, lora)

    def setup(self, stage: str) -> None:
        """Refuse a weight for texts that are not there, and a warm-up as long as the run."""
        super().setup(stage)
        if stage == "fit" and 0 < (self.trainer.max_epochs or 0) <= self.warmup_phases:
            raise ValueError(
                f"value.warmup_phases is {self.warmup_phases} of {self.trainer.max_epochs} phases, so the policy would "
                "never learn"
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        texts = stage == "fit" and getattr(data, "ptx", None) is not None
        if texts and self.ptx_coef == 0:
            rank_zero_info("the texts of data.ptx are measured and teach nothing, since ptx_coef is 0")
        if stage == "fit" and self.ptx_coef > 0 and not texts:
            raise ValueError(
                f"ptx_coef is {self.ptx_coef} and there are no texts to keep likely: name them with data.ptx or set it "
                "to 0"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy, and what the value loss alone trains."""
        critic = list(self.critic.learned(self.policy).values())
        theirs = set(map(id, critic))
        policy = [
            parameter
            for parameter in self.policy.parameters()
            if parameter.requires_grad and id(parameter) not in theirs
        ]
        return [{"params": policy}, {"params": critic} | ({} if self.value_lr is None else {"lr": self.value_lr})]

    def collected_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Log-probs, entropies and values [N, Tc]."""
        states = self.policy.token_states(batch)
        scores = self.policy.scores_of(states, batch, self.sampling.temperature, entropy=True)
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies, self.critic(self.policy, batch, states)

    def finish(self, batch: PolicyBatch) -> None:
        """Token rewards, advantages and returns of the phase. Completions without a score have no part in it."""
        mask = counted(batch)
        scores, log_ratio = batch["rewards"], kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
        if self.missing_eos_penalty is not None:
            scores = penalize_missing_eos(scores, batch["stopped"], self.missing_eos_penalty, self.replace_missing_eos)
        penalties = self.kl_coef * log_ratio
        rewards = token_rewards(scores, penalties if self.kl_loss is None else 0 * penalties, mask)
        whole = torch.zeros_like(batch["prompt_index"])
        if self.whiten_rewards:
            rewards = whiten_over_ranks(rewards, mask, whole, 1, shift_mean=False)
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, self.gamma, self.lam)
        update = batch.get("update", whole)
        batch["advantages"] = whiten_over_ranks(advantages, mask, update, int(update.max()) + 1)
        batch["row_count"], batch["active"] = mask.sum(1).float(), mask.any(1)
        objective = (scores - (penalties * mask).sum(1))[~scores.isnan()]
        self.phase_metrics |= {
            "kl_coef": self.kl_coef,
            "rlhf_reward": mean_and_error(objective.tolist())[0],
            "explained_variance": explained_variance(batch["values"], batch["returns"], mask),
        }

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """The loss [] of a micro-batch: its share of the step's objective."""
        mask, denominator, learns = counted(batch), batch["denominator"], self.policy_learns
        states = self.policy.token_states(batch)
        scores = self.policy.scores_of(states, batch, self.sampling.temperature, entropy=self.entropy_coef != 0)
        values = self.critic(self.policy, batch, states if learns else states.detach())
        logprobs, old = scores.logprobs, batch["old_logprobs"]
        policy_loss, metrics = clipped_policy_loss(
            logprobs, old, batch["advantages"], mask, denominator, self.cliprange, self.cliprange, self.dual_clip
        )
        value_loss, value_metrics = clipped_value_loss(
            values, batch["values"], batch["returns"], mask, denominator, self.cliprange_value
        )
        tokens = float(batch["completion_mask"].sum() + batch["prompt_mask"].sum())
        self.log_step(metrics | value_metrics | ratio_moments(logprobs, old, mask), weight=float(mask.sum()))
        self.log_step({"policy_loss": policy_loss, "value_loss": value_loss, "tokens": tokens})
        loss = policy_loss
        if self.kl_loss is not None:
            loss = loss + self.kl_coef * aggregate(self.kl_loss(logprobs, batch["ref_logprobs"]), mask, denominator)
        if scores.entropies is not None:
            loss = loss - self.entropy_coef * aggregate(scores.entropies, mask, denominator)
        if self.ptx_coef > 0:
            loss = loss + self.ptx_coef * self.ptx_loss(batch["ptx"])
        return self.step_loss(loss * learns + self.vf_coef * value_loss)

    def ptx_loss(self, texts: InstructionBatch) -> Tensor:
        """The micro-batch's share [] of the texts' mean -log p per token."""
        loss = aggregate(-self.scores(texts).logprobs, texts["loss_mask"], texts["denominator"])
        self.log_step({"ptx_loss": loss, "tokens": float(texts["attention_mask"].sum())})
        return loss

    @property
    def policy_learns(self) -> bool:
        """Whether the critic's warm-up is over."""
        return self.current_epoch >= self.warmup_phases

    def step_metrics(self) -> dict[str, float]:
        """As for every module, with the variance of the ratio over the whole step, unless it has no completion with a
        score.
        """
        metrics = super().step_metrics()
        if "ratio/square" in metrics:
            metrics["ratio/var"] = metrics.pop("ratio/square") - (metrics["ratio/mean"] - 1) ** 2
        return metrics

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step, with the gradient norms of policy and critic; in the warm-up the policy stays exactly as it is."""
        super().on_before_optimizer_step(optimizer)
        for name, group in zip(("policy", "value"), optimizer.param_groups, strict=True):
            norm = torch.nn.utils.get_total_norm(
                [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            )
            self.log(f"train/grad_norm/{name}", norm, on_step=True, on_epoch=False, batch_size=1)
        if not self.policy_learns:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None

    def on_train_epoch_end(self) -> None:
        """Log the phase; move ``kl_coef``."""
        super().on_train_epoch_end()
        if self.adaptive_kl is not None and self.policy_learns:
            sums = from_all_ranks([rollout.kl for rollout in self.rollouts])
            self.kl_coef = self.adaptive_kl(self.kl_coef, sum(sums) / len(sums), len(sums))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every method, and ``kl_coef`` as it is now."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"] = self.kl_coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every method; a ``kl_coef`` that is not adapted is that of this run."""
        super().on_load_checkpoint(checkpoint)
        if self.adaptive_kl is not None:
            self.kl_coef = checkpoint["kl_coef"]

    def identity(self) -> dict[str, str | int]:
        """As for every module, and the size of the critic."""
        return {
            **super().identity(),
            "value_parameters": sum(parameter.numel() for parameter in self.critic.parameters()),
        }


def counted(batch: PolicyBatch) -> Tensor:
    """bool [N, Tc]: the tokens of completions that have a score."""
    return batch["completion_mask"] & ~batch["rewards"].isnan()[:, None]


def check_numbers(
    shares: dict[str, float], weights: dict[str, float | None], bounded: dict[str, tuple[float | None, float]]
) -> None:
    """ValueError for shares outside [0, 1], weights below 0 and numbers that are not above their bound; None is fine,
    NaN is not.
    """
    wrong = [f"{name} {share} (from 0 to 1)" for name, share in shares.items() if not 0 <= share <= 1]
    wrong += [
        f"{name} {weight} (at least 0)" for name, weight in weights.items() if weight is not None and not weight >= 0
    ]
    wrong += [
        f"{name} {number} (above {low})"
        for name, (number, low) in bounded.items()
        if number is not None and not number > low
    ]
    if wrong:
        raise ValueError(f"out of range: {', '.join(wrong)}")
