"""Supervised fine-tuning: maximum likelihood of the supervised tokens (arXiv 2203.02155; 2307.09288 section 3.1)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import AlignmentModule
from modules.distributed import from_all_ranks
from modules.functional.masked import aggregate
from modules.networks.lora import Lora
from modules.networks.noise import embedding_noise
from modules.networks.policy import TokenScores
from modules.rewards.function import as_reward
from modules.rollout.engine import Sampling
from modules.rollout.held_out import last_answers
from modules.rollout.in_process import InProcessEngine
from modules.rollout.metrics import outcomes, rollout_metrics
from modules.rollout.scoring import make_rollouts, sampling_seed
from modules.types import InstructionBatch, Reward


class SFTModule(AlignmentModule):
    """loss = - sum of log pi(token) over the supervised tokens / their number in the whole optimiser step.

    Every supervised token counts the same, however the step is cut into micro-batches and ranks.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        label_smoothing: share e of each target that goes to the whole vocabulary: - (1 - e) log pi(token) - e mean over
            v of log pi(v).
        neftune_noise_alpha: noise on the embeddings in training, uniform in +- alpha / sqrt(tokens x width) (NEFTune,
            arXiv 2310.05914).
        reward: scores sampled answers to the held-out rows, whose last answer is the ``answer`` that it may look at:
            ``val/reward``, by which InstructGPT chose its checkpoint (arXiv 2203.02155 section 3.5).
        sampling: how held-out answers are sampled; default with a reward: greedy, up to 256 tokens; without: none are.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 2e-5.
        scheduler: optimizer -> scheduler, stepped per update.
    """

    def __init__(
        self,
        policy: str,
        label_smoothing: float = 0.0,
        neftune_noise_alpha: float | None = None,
        reward: Reward | None = None,
        sampling: Sampling | None = None,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-5),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, lora=lora)
        if not 0 <= label_smoothing < 1 or (neftune_noise_alpha is not None and neftune_noise_alpha < 0):
            raise ValueError(
                f"label_smoothing must be in [0, 1) and neftune_noise_alpha >= 0, got {label_smoothing} and "
                f"{neftune_noise_alpha}"
            )
        self.label_smoothing, self.neftune_noise_alpha, self.reward = (
            label_smoothing,
            neftune_noise_alpha,
            as_reward(reward),
        )
        self.sampling = sampling or (
            Sampling(temperature=0.0, max_completion_length=256) if reward is not None else None
        )
        self.engine = InProcessEngine()
        self.record.held_out = None if self.sampling is None else []

    def scores(self, batch: InstructionBatch, means: bool = False) -> TokenScores:
        """Log-probs, entropies and hits [N, T] of the supervised tokens."""
        return self.policy.token_scores(
            batch["input_ids"], batch["loss_mask"], batch.get("position_ids"), details=True, means=means
        )

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """The loss [] of a micro-batch: its share of the step's token mean."""
        with self.noise(batch, batch_idx):
            scores = self.scores(batch, means=self.label_smoothing > 0)
        trained = batch["attention_mask"][batch["loss_mask"].any(1)]
        self.log_step(token_means(scores, batch["denominator"]) | {"tokens": float(trained.sum())})
        self.log_step(
            {"supervised_fraction": batch["loss_mask"].sum() / trained.sum().clamp(min=1)}, weight=float(trained.sum())
        )
        losses = -scores.logprobs
        if scores.means is not None:
            losses = (1 - self.label_smoothing) * losses - self.label_smoothing * scores.means
        return self.step_loss(aggregate(losses, batch["loss_mask"], batch["denominator"]))

    @contextmanager
    def noise(self, batch: InstructionBatch, batch_idx: int) -> Iterator[None]:
        """NEFTune inside, if asked; a function of seed, step, micro-batch and rank, so that a resumed run draws the
        same.
        """
        if not self.neftune_noise_alpha:
            yield
            return
        if "position_ids" in batch:
            self.policy.check_packing()  # on rows of its own, which are to get no noise
        place = f"{self.global_rank}/{self.global_step}/{batch_idx}"
        generator = torch.Generator().manual_seed(sampling_seed(torch.initial_seed(), place, "neftune"))
        with embedding_noise(self.policy.model, batch, self.neftune_noise_alpha, generator):
            yield

    def validation_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Token means over the whole validation set, and what the policy answers."""
        self.evaluate(batch, "val")

    def test_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Token means over the held-out set, under ``test/``."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: InstructionBatch, stage: str) -> None:
        """Log what the policy makes of held-out rows, and keep its own answers to them."""
        tokens = batch["loss_mask"].sum()
        self.log_evaluation(token_means(self.scores(batch), tokens.clamp(min=1)), weight=float(tokens))
        if self.sampling is not None:
            prompts = last_answers(batch, self.tokenizer)
            self.engine.sync_weights(self.policy, self.global_step)
            seeds = [sampling_seed(0, stage, uid) for uid in prompts["uid"]]
            answers = self.engine.generate(prompts["prompt_ids"], 1, self.sampling, seeds)
            self.record.held_out = make_rollouts(prompts, answers, self.reward)
            self.record.sampled += outcomes(self.record.held_out)

    def evaluation_metrics(self) -> dict[str, float]:
        """Join what was logged, and add the rewards and lengths of the answers."""
        metrics, answered = super().evaluation_metrics(), from_all_ranks(self.record.sampled)
        if not answered:
            return metrics
        of_answers = rollout_metrics(answered)
        if self.reward is None:
            of_answers = {name: value for name, value in of_answers.items() if name.startswith("completions/")}
        return metrics | of_answers


def token_means(scores: TokenScores, count: Tensor) -> dict[str, Tensor | float]:
    """Sums over the supervised tokens of a micro-batch, divided by ``count`` []: its own tokens, or those of the whole
    step.
    """
    assert scores.entropies is not None and scores.hits is not None
    return {
        "loss": -scores.logprobs.detach().sum() / count,
        "entropy": scores.entropies.sum() / count,
        "mean_token_accuracy": scores.hits.sum() / count,
    }
