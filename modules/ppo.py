"""Proximal Policy Optimization with a learned critic (arXiv 1707.06347), for language (1909.08593, 2203.02155)."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from modules.base import count_tokens
from modules.functional.advantages import gae
from modules.functional.kl import apply_estimator, k1
from modules.functional.masked import aggregate
from modules.generation import Validation
from modules.losses import GAE, KL, Clip, Clipped, ImportanceWeights, Incentives
from modules.losses.policy import leave_out_unscored, measure_ratio
from modules.losses.shaping import make_token_rewards
from modules.losses.value import ClippedValue
from modules.networks.critic import Critic, Value
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.sampling import Sampling
from modules.trainer.kept import say_kept
from modules.trainer.pieces import Batch, train_by_pieces
from modules.trainer.ranks import explained_variance, from_all_ranks, mean_and_error, whiten_over_ranks
from modules.trainer.steps import epoch_is_whole
from modules.types import InstructionBatch, PolicyBatch, Reward


class PPOModule(OnPolicyModule):
    """Samples completions, scores them, and moves towards tokens that turned out better than a learned critic expected.

    In each phase ``collect`` samples and scores. ``prepare`` puts the score on the last token and -kl.coef log(pi /
    reference) on every token, and makes advantages by GAE. ``training_step`` is only the loss

        -min(ratio A, clip(ratio) A) + value.coef 1/2 max((V - R)^2, (clip(V) - R)^2) [+ kl.coef KL]
        [- incentives.entropy H] [- incentives.ptx log pi(text)],

    Each term is a mean over the tokens of the whole optimiser step, on all ranks. InstructGPT sets kl.coef 0.02, one
    inner epoch in eight updates, the reward model as ``value.model``, ptx, and ``AveragedWeights`` among the callbacks.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Dropout is off, so that the ratio starts at 1.
        reward: scores completions. With ``lora``, reward models that are adapters of the policy's backbone are computed
            on that backbone.
        num_generations: completions per prompt.
        sampling: how to sample in training.
        engine: samples completions; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours; None = no tools.
        importance: weights that correct for the different probabilities that engine and trainer compute. false = none,
            true = the default ones, None = true if the engine samples from a copy of the weights, else false.
        gae: discount, lambda, and whether to whiten token rewards.
        clip: how far the ratio and a value may move in an update.
        kl: the KL to the reference: its weight, a target for it, whether it is part of the reward or of the loss, and
            the reference model.
        value: the critic: its start, its learning rate and warm-up, and the weight of its loss.
        incentives: what is asked of the policy beside the reward: to end, to stay various, not to forget.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters of policy and critic instead of all weights; then policy, reference and critic
            share one frozen backbone.
        optimizer: parameters -> optimizer; default AdamW, learning rate 3e-6.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.

    Raises:
        ValueError: a value is out of range; in ``setup``, ``incentives.ptx`` without ``data.ptx``.
    """

    least_generations = 1

    def __init__(
        self,
        policy: str,
        reward: Reward,
        num_generations: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen, as are the six below)
        engine: RolloutEngine | None = None,
        environment: Environment | None = None,
        importance: ImportanceWeights | bool | None = None,
        gae: GAE = GAE(),  # noqa: B008
        clip: Clip = Clip(),  # noqa: B008
        kl: KL = KL(),  # noqa: B008
        value: Value = Value(),  # noqa: B008
        incentives: Incentives = Incentives(),  # noqa: B008
        validation: Validation = Validation(),  # noqa: B008
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-6),
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
            reference=True if kl.reference in (None, policy) else str(kl.reference),
            validation=validation,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        self.gae, self.kl, self.value, self.incentives = gae, kl, value, incentives
        self.policy_objective = Clipped(clip.ratio, clip.ratio, clip.dual)
        self.value_objective = ClippedValue(clip.value)
        self.kl_coef = kl.coef  # moved by ``kl.adaptive``
        self.critic = Critic(self.policy, value.model, lora)

    def setup(self, stage: str) -> None:
        """Refuse a weight for texts without texts, and a warm-up as long as the run."""
        super().setup(stage)
        if stage == "fit" and 0 < (self.trainer.max_epochs or 0) <= self.value.warmup_phases:
            raise ValueError(
                f"value.warmup_phases is {self.value.warmup_phases} of {self.trainer.max_epochs} phases, so the policy "
                "would never learn"
            )
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        texts = stage == "fit" and getattr(data, "ptx", None) is not None
        if texts and self.incentives.ptx == 0:
            rank_zero_info("the texts of data.ptx are measured but teach nothing, since incentives.ptx is 0")
        if stage == "fit" and self.incentives.ptx > 0 and not texts:
            raise ValueError(
                f"incentives.ptx is {self.incentives.ptx} and there are no texts to keep likely: name them with "
                "data.ptx or set it to 0"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the policy, and what the value loss alone trains."""
        critic = list(self.critic.learned(self.policy).values())
        theirs = set(map(id, critic))
        policy = [
            parameter
            for parameter in self.policy.parameters()
            if parameter.requires_grad and id(parameter) not in theirs
        ]
        return [{"params": policy}, {"params": critic} | ({} if self.value.lr is None else {"lr": self.value.lr})]

    def collected_scores(self, batch: PolicyBatch) -> tuple[Tensor, ...]:
        """Compute log-probs, entropies and values [N, Tc]."""
        states = self.policy.token_states(batch)
        scores = self.policy.scores_of(states, batch, self.sampling.temperature, entropy=True)
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies, self.critic(self.policy, batch, states)

    def prepare(self, batch: PolicyBatch) -> None:
        """Make token rewards, advantages and returns of the completions that have a score."""
        mask = leave_out_unscored(batch)["completion_mask"]
        scores, log_ratio = batch["rewards"], k1(batch["old_logprobs"], batch["ref_logprobs"])
        if self.incentives.missing_eos is not None:
            scores = self.incentives.missing_eos(scores, batch["stopped"])
        penalties = self.kl_coef * log_ratio
        rewards = make_token_rewards(scores, penalties if self.kl.loss is None else 0 * penalties, mask)
        whole = torch.zeros_like(batch["prompt_index"])
        if self.gae.whiten_rewards:
            rewards = whiten_over_ranks(rewards, mask, whole, 1, shift_mean=False)
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, self.gae.gamma, self.gae.lam)
        update = batch.get("update", whole)
        batch["advantages"] = self.weigh(batch, whiten_over_ranks(advantages, mask, update, int(update.max()) + 1))
        batch["row_count"], batch["active"] = mask.sum(1).float(), mask.any(1)
        objective = (scores - (penalties * mask).sum(1))[~scores.isnan()]
        self.log_phase(
            {
                "kl_coef": self.kl_coef,
                "rlhf_reward": mean_and_error(objective.tolist())[0],
                "explained_variance": explained_variance(batch["values"], batch["returns"], mask),
            }
        )

    def cut(self, batch: Batch) -> list[Batch]:
        """Cut a micro-batch, without texts that teach nothing."""
        taught = self.incentives.ptx > 0
        return super().cut({name: value for name, value in batch.items() if taught or name != "ptx"})

    @train_by_pieces
    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the step's objective. A piece may hold texts alone."""
        if "completion_ids" not in batch:
            return self.step_loss(self.incentives.ptx * self.ptx_loss(batch["ptx"]) * self.policy_learns)
        states, learns = self.policy.token_states(batch), self.policy_learns
        scores = self.policy.scores_of(states, batch, self.sampling.temperature, entropy=self.incentives.entropy != 0)
        values = self.critic(self.policy, batch, states if learns else states.detach())
        scored, logprobs = leave_out_unscored(batch), scores.logprobs
        mask, denominator = scored["completion_mask"], scored["denominator"]
        policy_loss, metrics = self.policy_objective(logprobs, scored)
        value_loss, value_metrics = self.value_objective(values, scored)
        tokens = count_tokens(batch, mask.any(1))
        self.log_step(metrics | value_metrics | measure_ratio(logprobs, scored), weight=mask.sum())
        self.log_step({"policy_loss": policy_loss, "value_loss": value_loss, "tokens": tokens})
        loss = policy_loss
        if self.kl.loss is not None:
            distance = apply_estimator(self.kl.loss, logprobs, batch["ref_logprobs"], batch["old_logprobs"])
            loss = loss + self.kl_coef * aggregate(distance, mask, denominator)
        if scores.entropies is not None:
            loss = loss - self.incentives.entropy * aggregate(scores.entropies, mask, denominator)
        if self.incentives.ptx > 0 and "ptx" in batch:
            loss = loss + self.incentives.ptx * self.ptx_loss(batch["ptx"])
        return self.step_loss(loss * learns + self.value.coef * value_loss)

    def ptx_loss(self, texts: InstructionBatch) -> Tensor:
        """Compute the micro-batch's share [] of the texts' mean -log p per token."""
        loss = aggregate(-self.scores(texts).logprobs, texts["loss_mask"], texts["denominator"])
        self.log_step({"ptx_loss": loss, "tokens": texts["attention_mask"].sum()})
        return loss

    @property
    def policy_learns(self) -> bool:
        """Whether the critic's warm-up is over."""
        return self.current_epoch >= self.value.warmup_phases

    def step_metrics(self) -> dict[str, float]:
        """Join the base's metrics; add the gradient norms of policy and critic and the variance of the ratio.

        A step without a scored completion has no variance.
        """
        metrics = super().step_metrics()
        for name, group in zip(("policy", "value"), self.trainer.optimizers[0].param_groups, strict=True):
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            metrics[f"grad_norm/{name}"] = float(torch.nn.utils.get_total_norm(gradients))
        if "ratio/square" in metrics:
            metrics["ratio/var"] = metrics.pop("ratio/square") - (metrics["ratio/mean"] - 1) ** 2
        return metrics

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step, and keep the policy exactly as it is during the critic's warm-up."""
        super().on_before_optimizer_step(optimizer)
        if not self.policy_learns:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = None

    def on_train_epoch_end(self) -> None:
        """Log the phase and adapt ``kl_coef``, unless ``max_steps`` cut the phase short."""
        super().on_train_epoch_end()
        if self.kl.adaptive is not None and self.policy_learns and epoch_is_whole(self.trainer):
            sums = from_all_ranks([rollout.kl for rollout in self.record.rollouts])
            self.kl_coef = self.kl.adaptive(self.kl_coef, sum(sums) / len(sums), len(sums))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what every method saves, and the current ``kl_coef``."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coef"], checkpoint["kl_start"] = self.kl_coef, self.kl.coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what every method loads, and ``kl_coef`` if it adapts; a fixed one is that of this run."""
        super().on_load_checkpoint(checkpoint)
        if self.kl.adaptive is not None:
            self.kl_coef = checkpoint["kl_coef"]
            if self.trainer.state.fn == "fit" and (was := checkpoint.get("kl_start", self.kl.coef)) != self.kl.coef:
                say_kept("kl.coef", f"what was adapted from {was}", self.kl.coef)

    def identity(self) -> dict[str, str | int]:
        """Return the base's identity and the size of the critic."""
        return {
            **super().identity(),
            "value_parameters": sum(parameter.numel() for parameter in self.critic.parameters()),
        }
