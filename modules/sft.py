"""Supervised fine-tuning: maximum likelihood of the supervised tokens (arXiv 2203.02155; 2307.09288 section 3.1)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from modules.base import AlignmentModule
from modules.networks.lora import Lora
from modules.networks.policy import TokenScores
from modules.rewards.verifier import count_failures
from modules.rollout.engine import InProcessEngine, RolloutEngine
from modules.rollout.last_answers import find_last_answers
from modules.rollout.metrics import make_outcomes, measure_rollouts, measure_unscored
from modules.rollout.phases.reuse import refuse_reuse
from modules.rollout.sampling import Sampling
from modules.rollout.scoring import make_rollouts
from modules.trainer.pieces import train_by_pieces
from modules.trainer.ranks import from_all_ranks
from modules.trainer.seeds import derive_seed
from modules.types import InstructionBatch, Reward, as_reward


class SFTModule(AlignmentModule):
    """Minimises the mean of -log pi(token) over the supervised tokens of the whole optimiser step.

    Every supervised token counts the same, whatever micro-batches and ranks the step is split into.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        label_smoothing: share e of each target that is spread over the vocabulary: - (1 - e) log pi(token) - e mean
            over v of log pi(v).
        neftune_noise_alpha: noise on the embeddings in training, uniform in +- alpha / sqrt(tokens x width) (NEFTune,
            arXiv 2310.05914).
        reward: scores sampled answers to the held-out rows, for ``val/reward``, by which InstructGPT chose its
            checkpoint (arXiv 2203.02155 section 3.5). The row's own answer is the ``answer`` that it compares with.
        sampling: how to sample held-out answers. Default: greedy, up to 256 tokens, with a reward; none without one.
        engine: what samples them; default the policy itself, in this process.
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
        engine: RolloutEngine | None = None,
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
        refuse_reuse(sampling, "SFTModule")
        self.label_smoothing, self.neftune_noise_alpha, self.reward = (
            label_smoothing,
            neftune_noise_alpha,
            as_reward(reward),
        )
        self.sampling = sampling or (
            Sampling(temperature=0.0, max_completion_length=256) if reward is not None else None
        )
        if engine is not None and self.sampling is None:
            raise ValueError(
                "engine samples answers to held-out rows, and there are none: set sampling or reward, or leave engine out"
            )
        self.engine = engine or InProcessEngine()
        if self.engine.max_staleness > 0:
            raise ValueError(
                f"{type(self.engine).__name__}: max_staleness is {self.engine.max_staleness}, and SFT samples nothing that it "
                "trains on: set it to 0"
            )
        self.record.held_out = None if self.sampling is None else []

    def scores(self, batch: InstructionBatch, means: bool = False) -> TokenScores:
        """Compute log-probs, entropies and hits [N, T] of the supervised tokens."""
        return self.policy.token_scores(
            batch["input_ids"], batch["loss_mask"], batch.get("position_ids"), details=True, means=means
        )

    @train_by_pieces
    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the step's token mean."""
        with self.noise(batch, batch_idx):
            scores = self.scores(batch, means=self.label_smoothing > 0)
        trained = (batch["attention_mask"] & batch["loss_mask"].any(1, keepdim=True)).sum()
        self.log_step(average_tokens(scores, batch["denominator"]) | {"tokens": trained})
        self.log_step({"supervised_fraction": batch["loss_mask"].sum() / trained.clamp(min=1)}, weight=trained)
        losses = -scores.logprobs
        if scores.means is not None:
            losses = (1 - self.label_smoothing) * losses - self.label_smoothing * scores.means
        return self.step_loss(losses.sum() / batch["denominator"])

    @contextmanager
    def noise(self, batch: InstructionBatch, batch_idx: int) -> Iterator[None]:
        """Add NEFTune's noise inside the ``with`` block, if asked.

        It depends on seed, step, micro-batch, piece and rank alone, so that a resumed run draws the same noise.
        """
        if not self.neftune_noise_alpha:
            yield
            return
        if "position_ids" in batch:
            self.policy.check_packing()  # its own rows must get no noise
        place = f"{self.global_rank}/{self.global_step}/{batch_idx}" + (f"/{self.piece}" if self.piece else "")
        generator = torch.Generator(self.device).manual_seed(derive_seed(torch.initial_seed(), place, "neftune"))
        with noisy_embeddings(self.policy.model, batch, self.neftune_noise_alpha, generator):
            yield

    def validation_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Log token means over the held-out rows, and the numbers of the policy's own answers."""
        self.evaluate(batch, "val")

    def test_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        """Log the same under ``test/``."""
        self.evaluate(batch, "test")

    def evaluate(self, batch: InstructionBatch, stage: str) -> None:
        """Log token means of a held-out batch, and keep the policy's own answers to it."""
        tokens = batch["loss_mask"].sum()
        self.log_evaluation(average_tokens(self.scores(batch), tokens.clamp(min=1)), weight=float(tokens))
        if self.sampling is not None:
            prompts = find_last_answers(batch, self.policy)
            self.engine.sync_weights(self.policy, self.global_step)
            seeds = [derive_seed(0, stage, uid) for uid in prompts["uid"]]
            answers = self.engine.generate(prompts["prompt_ids"], 1, self.sampling, seeds)
            before = count_failures(self.reward)
            self.record.held_out = make_rollouts(prompts, answers, self.reward)
            self.log_evaluation(measure_unscored(count_failures(self.reward, before)))
            self.record.sampled += make_outcomes(self.record.held_out)

    def on_validation_end(self) -> None:
        """Let the engine give its memory back."""
        self.engine.release()

    on_test_end = on_validation_end

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        self.engine.close()

    def evaluation_metrics(self) -> dict[str, float]:
        """Join the base's metrics; add rewards and lengths of the answers."""
        metrics, answered = super().evaluation_metrics(), from_all_ranks(self.record.sampled)
        if not answered:
            return metrics
        of_answers = measure_rollouts(answered)
        if self.reward is None:
            of_answers = {name: value for name, value in of_answers.items() if name.startswith("completions/")}
        return metrics | of_answers


def average_tokens(scores: TokenScores, count: Tensor) -> dict[str, Tensor | float]:
    """Sum loss, entropy and hits over a micro-batch, divided by ``count`` []: its own tokens, or those of the step."""
    assert scores.entropies is not None and scores.hits is not None
    return {
        "loss": -scores.logprobs.detach().sum() / count,
        "entropy": scores.entropies.sum() / count,
        "mean_token_accuracy": scores.hits.sum() / count,
    }


@contextmanager
def noisy_embeddings(
    model: PreTrainedModel, batch: InstructionBatch, alpha: float, generator: torch.Generator
) -> Iterator[None]:
    """Add noise to the embeddings of the batch's tokens inside the ``with`` block.

    The noise is uniform in +- alpha / sqrt(L x width), where L is the number of tokens of the token's document.

    Args:
        model: the language model.
        batch: the rows that the model computes inside the block.
        alpha: size of the noise, >= 0.
        generator: random numbers, on the model's device.
    """
    scale = (
        alpha * (batch["attention_mask"] * count_document_tokens(batch).clamp(min=1).rsqrt())[..., None]
    )  # [N, T, 1]

    def add(module: Any, inputs: Any, embeddings: Tensor) -> Tensor:
        noise = torch.rand(embeddings.shape, generator=generator, device=generator.device).to(embeddings) * 2 - 1
        size = (scale * embeddings.shape[-1] ** -0.5).to(embeddings)
        return embeddings + noise * size.reshape(*embeddings.shape[:-1], 1)  # the rows may come as one long row

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def count_document_tokens(batch: InstructionBatch) -> Tensor:
    """Return, for each token, the number of tokens of its document: float [N, T], 0 on padding."""
    mask = batch["attention_mask"]
    if "position_ids" not in batch:
        return mask * mask.sum(1, keepdim=True).float()
    document = (batch["position_ids"] == 0).cumsum(1) - 1  # [N, T], number of the document in its row
    counts = torch.zeros(mask.shape, device=mask.device).scatter_add(1, document, mask.float())
    return mask * counts.gather(1, document)
