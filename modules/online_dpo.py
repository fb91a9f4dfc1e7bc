"""Online DPO: preferences between the policy's own samples (arXiv 2402.04792; 2404.19733), on fresh pairs in every
phase.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.checks import check_numbers
from modules.losses.pairs import measure_preferences
from modules.losses.preference import PairObjective, Sigmoid, find_pairs
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import RolloutEngine, Sampling
from modules.types import PolicyBatch, Reward


class OnlineDPOModule(OnPolicyModule):
    """Sample completions of a prompt, let the reward pick the best and the worst, and take a preference loss on that
    pair.

    A prompt whose completions all score within ``min_gap`` teaches nothing and is left out of the mean. Rounds on
    files, with ``predict`` and ``DPOModule``, are the recipe ``iterative-dpo``.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        reward: scores completions: rules, a learned reward, or a judge.
        beta: strength of the tie to the reference, > 0; default the objective's own.
        objective: the loss on pairs; default ``Sigmoid``.
        num_generations: completions per prompt, at least 2.
        min_gap: >= 0, by how much the best must beat the worst.
        refresh: what the reference does at the end of a phase: ``fixed`` stays the start policy, ``phase`` becomes the
            policy (iterative DPO), ``soft`` moves 0.6 of the way to it (TR-DPO, arXiv 2404.09656). ``kl`` is then
            measured to the moved reference.
        refresh_every: phases between refreshes.
        sampling: how to sample in training.
        engine: what samples; default the policy itself, in this process.
        accuracy: decides right (score > 0.5) or wrong in validation; default ``reward``.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 5e-7.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    SOFT_SHARE = 0.6

    def __init__(
        self,
        policy: str,
        reward: Reward,
        beta: float | None = None,
        objective: PairObjective | None = None,
        num_generations: int = 2,
        min_gap: float = 0.0,
        refresh: Literal["fixed", "phase", "soft"] = "fixed",
        refresh_every: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        accuracy: Reward | None = None,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-7),
        scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            policy,
            reward,
            num_generations=num_generations,
            sampling=sampling,
            engine=engine,
            reference=True,
            accuracy=accuracy,
            val_generations=1,
            lora=lora,
            optimizer=optimizer,
            scheduler=scheduler,
            seed=seed,
        )
        self.objective = objective or Sigmoid()
        self.beta = self.objective.beta if beta is None else beta
        check_numbers(
            "OnlineDPOModule",
            beta=(self.beta, "(0, inf)"),
            min_gap=(min_gap, "[0, inf)"),
            refresh_every=(refresh_every, "[1, inf)"),
        )
        if refresh == "soft" and lora is not None:
            raise ValueError(
                "refresh: soft averages weights, and the average of adapters is not the adapter of the average: use "
                "phase"
            )
        self.min_gap, self.refresh, self.refresh_every = min_gap, refresh, refresh_every

    def prepare(self, batch: PolicyBatch) -> None:
        """Rank the completions: 0 for the best of a prompt, 1 for the worst, -1 for the others and where the scores do
        not tell.
        """
        batch["rank"] = rank_best_and_worst(batch["rewards"], batch["group"], self.min_gap)
        batch["active"] = batch["rank"] >= 0
        batch["row_count"] = batch["active"] / 2  # a pair counts one

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """The loss [] of a micro-batch: its share of the mean over the step's pairs."""
        logprobs = self.policy.completion_scores(batch, self.sampling.temperature).logprobs
        referenced, pairs = self.objective.uses_reference, find_pairs(batch)
        sequences = self.objective.sum_tokens(logprobs, batch.get("ref_logprobs") if referenced else None, batch)
        total = self.objective.total(sequences, batch, pairs, self.beta)
        loss = (
            total / batch["denominator"].clamp(min=1) + 0 * logprobs.sum()
        )  # a phase without a pair has a gradient too, of zero
        tokens = float(batch["completion_mask"].sum() + batch["prompt_mask"].sum())
        self.log_step({"loss": loss, "effective_batch": float((batch["rank"] >= 0).sum()), "tokens": tokens})
        rewards = self.objective.implicit_rewards(sequences, self.beta)
        found = measure_preferences(rewards, sequences.plain, batch["rank"], pairs, referenced)
        for name, (value, weight) in found.items():
            self.log_step({name: value}, weight)
        return self.step_loss(loss)

    def on_train_epoch_end(self) -> None:
        """Log the phase; move the reference."""
        super().on_train_epoch_end()
        assert self.reference is not None
        if self.refresh != "fixed" and (self.current_epoch + 1) % self.refresh_every == 0:
            self.reference.mix(self.policy, 1.0 if self.refresh == "phase" else self.SOFT_SHARE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every method, and a reference that moves."""
        super().on_save_checkpoint(checkpoint)
        if self.refresh != "fixed" and self.reference is not None:
            checkpoint["reference"] = {name: weight.detach().cpu() for name, weight in self.reference.weights.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every method, and a reference that moved."""
        super().on_load_checkpoint(checkpoint)
        if self.reference is not None:
            for name, weight in checkpoint.get("reference", {}).items():
                self.reference.weights[name].data.copy_(weight)


def rank_best_and_worst(rewards: Tensor, group: Tensor, min_gap: float = 0.0) -> Tensor:
    """Rank int [N] from rewards [N] (NaN = unscorable) and group int [N]: 0 for the first best row of a group, 1 for
    its first worst, else -1.

    Groups whose best is not more than ``min_gap`` above their worst have no ranks.
    """
    rank = torch.full_like(group, -1)
    for label in group.unique():
        rows = ((group == label) & ~rewards.isnan()).nonzero()[:, 0]
        if len(rows) and float(rewards[rows].max() - rewards[rows].min()) > min_gap:
            rank[rows[rewards[rows].argmax()]], rank[rows[rewards[rows].argmin()]] = 0, 1
    return rank
