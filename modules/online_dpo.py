"""Online DPO: preferences between the policy's own samples, fresh in every phase (arXiv 2402.04792; 2404.19733)."""

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import count_tokens
from modules.functional.ranges import check_numbers
from modules.generation import Validation
from modules.losses.preference import PairObjective, Sigmoid, find_pairs, measure_preferences
from modules.networks.lora import Lora
from modules.on_policy import OnPolicyModule
from modules.rollout.engine import RolloutEngine
from modules.rollout.environment import Environment
from modules.rollout.phases.segments import require_all_segments
from modules.rollout.sampling import Sampling
from modules.trainer.pieces import train_by_pieces
from modules.trainer.steps import epoch_is_whole
from modules.types import PolicyBatch, Reward


class OnlineDPOModule(OnPolicyModule):
    """Samples completions of a prompt and takes a preference loss on the best and the worst by the reward.

    A prompt whose completions all score within ``min_gap`` teaches nothing and is left out of the mean. The recipe
    ``iterative-dpo`` does the same in rounds on files, with ``predict`` and ``DPOModule``.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        reward: scores completions: rules, a learned reward, or a judge.
        beta: strength of the tie to the reference, > 0; default the objective's own.
        objective: the loss on pairs; default ``Sigmoid``.
        num_generations: completions per prompt, at least 2.
        min_gap: >= 0, by how much the best must beat the worst.
        refresh: what becomes of the reference at the end of a phase: ``fixed`` keeps the start policy, ``phase`` takes
            the current policy (iterative DPO), ``soft`` moves 0.6 of the way to it (TR-DPO, arXiv 2404.09656). ``kl``
            is measured to the moved reference.
        refresh_every: phases between refreshes.
        sampling: how to sample in training.
        engine: samples completions; default the policy itself, in this process.
        environment: lets completions call the tools of a class of yours; None = no tools.
        validation: what decides right or wrong on held-out prompts, and how many completions of each are sampled.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 5e-7.
        scheduler: optimizer -> scheduler, stepped per update.
        seed: of the sampling; None = the run's.
    """

    splits_groups = False
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
        environment: Environment | None = None,
        validation: Validation = Validation(),  # noqa: B008
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
            environment=environment,
            importance=False,
            reference=True,
            validation=validation,
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
        require_all_segments(sampling, "OnlineDPOModule")
        if refresh == "soft" and lora is not None:
            raise ValueError(
                "refresh: soft averages weights, and averaged adapters are not the adapters of the averaged model: use "
                "phase"
            )
        self.move_reference(refresh != "fixed")
        self.min_gap, self.refresh, self.refresh_every = min_gap, refresh, refresh_every

    def prepares_from_scores(self) -> bool:
        """Return False: ranks come from the rewards alone."""
        return False

    def prepare(self, batch: PolicyBatch) -> None:
        """Rank the completions: 0 for the best of a prompt, 1 for the worst, -1 for those that are not compared."""
        batch["rank"] = rank_best_and_worst(batch["rewards"], batch["group"], self.min_gap)
        batch["active"] = batch["rank"] >= 0
        batch["row_count"] = batch["active"] / 2  # a pair counts one

    @train_by_pieces
    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the mean over the step's pairs."""
        scores = self.train_scores(batch)
        batch, logprobs = self.start_from(batch, scores), scores.logprobs
        referenced, pairs = self.objective.uses_reference, find_pairs(batch)
        sequences = self.objective.sum_tokens(logprobs, batch.get("ref_logprobs") if referenced else None, batch)
        total = self.objective.total(sequences, batch, pairs, self.beta)
        loss = (
            total / batch["denominator"].clamp(min=1) + 0 * logprobs.sum()
        )  # a phase without a pair has a gradient too, of zero
        compared = batch["rank"] >= 0
        tokens = count_tokens(batch, compared)
        self.log_step({"loss": loss, "effective_batch": compared.sum(), "tokens": tokens})
        rewards = self.objective.implicit_rewards(sequences, self.beta)
        found = measure_preferences(rewards, sequences.plain, batch["rank"], pairs, referenced)
        for name, (value, weight) in found.items():
            self.log_step({name: value}, weight)
        return self.step_loss(loss)

    def on_train_epoch_end(self) -> None:
        """Log the phase and move the reference, unless ``max_steps`` cut the phase short."""
        super().on_train_epoch_end()
        assert self.reference is not None
        if (
            self.refresh != "fixed"
            and epoch_is_whole(self.trainer)
            and (self.current_epoch + 1) % self.refresh_every == 0
        ):
            self.reference.mix(self.policy, 1.0 if self.refresh == "phase" else self.SOFT_SHARE)


def rank_best_and_worst(rewards: Tensor, group: Tensor, min_gap: float = 0.0) -> Tensor:
    """Rank the best row of each group 0, the worst 1 and all others -1; the first one counts where several are equal.

    rewards: [N], NaN = unscorable. group: int [N]. Returns int [N]. A group whose best is at most ``min_gap`` above its
    worst has no ranks.
    """
    rank = torch.full_like(group, -1)
    for label in group.unique():
        rows = ((group == label) & ~rewards.isnan()).nonzero()[:, 0]
        if len(rows) and float(rewards[rows].max() - rewards[rows].min()) > min_gap:
            rank[rows[rewards[rows].argmax()]], rank[rows[rewards[rows].argmin()]] = 0, 1
    return rank
