"""Supervised fine-tuning: maximum likelihood of the supervised tokens (arXiv 2203.02155; 2307.09288 section 3.1)."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from modules.base import AlignmentModule
from modules.functional.masked import aggregate
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores
from modules.types import InstructionBatch


class SFTModule(AlignmentModule):
    """loss = - sum of log pi(token) over the supervised tokens / their number in the whole optimiser step.

    Every supervised token counts the same, however the step is cut into micro-batches and ranks.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        lora: train low-rank adapters instead of all weights.
        optimizer: parameters -> optimizer; default AdamW, learning rate 2e-5.
        scheduler: optimizer -> scheduler, stepped per update.
    """

    def __init__(
        self,
        policy: str,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-5),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, lora=lora)

    def scores(self, batch: InstructionBatch) -> TokenScores:
        """Log-probs, entropies and hits [N, T] of the supervised tokens."""
        return self.policy.token_scores(batch["input_ids"], batch["loss_mask"], batch.get("position_ids"), details=True)

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """The loss [] of a micro-batch: its share of the step's token mean."""
        scores = self.scores(batch)
        trained = batch["attention_mask"][batch["loss_mask"].any(1)]
        self.log_step(token_means(scores, batch["denominator"]) | {"tokens": float(trained.sum())})
        return self.step_loss(aggregate(-scores.logprobs, batch["loss_mask"], batch["denominator"]))

    def validation_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Token means over the whole validation set."""
        self.evaluate(batch, "val")

    def test_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """The same under ``test/``."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: InstructionBatch, stage: str) -> None:
        """Log what the policy makes of held-out rows."""
        tokens = batch["loss_mask"].sum()
        means = token_means(self.scores(batch), tokens.clamp(min=1))
        self.log_mean({f"{stage}/{name}": value for name, value in means.items()}, float(tokens))


def token_means(scores: TokenScores, count: Tensor) -> dict[str, Tensor | float]:
    """Sums over the supervised tokens of a micro-batch, divided by ``count`` []: its own tokens, or those of the whole step."""
    assert scores.entropies is not None and scores.hits is not None
    return {
        "loss": -scores.logprobs.detach().sum() / count,
        "entropy": scores.entropies.sum() / count,
        "mean_token_accuracy": scores.hits.sum() / count,
    }
