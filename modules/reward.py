"""Reward model: learns from ranked completions which one is better (InstructGPT, arXiv 2203.02155, section 3.5)."""

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from modules.base import AlignmentModule, count_tokens
from modules.functional.ranges import check_numbers
from modules.losses.preference import BradleyTerry, Pairs, find_pairs, make_scored_pairs
from modules.networks.lora import ADAPTERS, HEAD_FILE, POLICY, Lora, merge_adapters, save_adapters
from modules.networks.scalar_head import HEADS_FILE, ScalarHead, add_scoring_pad, make_sequence_classifier
from modules.trainer.pieces import train_by_pieces
from modules.trainer.ranks import from_all_ranks
from modules.types import HasRowsInOrder, PreferenceBatch, ScoredPair

MAX_CALIBRATION = 4096  # completions to normalise on, if data.calibration names none


@runtime_checkable
class HasCalibration(HasRowsInOrder, Protocol):
    """A DataModule whose scores can be normalised."""

    calibration: object | None  # None = no rows to normalise on


class RewardModule(AlignmentModule):
    """Minimises the mean over examples of -log sigma(r_better - r_worse - margin), averaged over an example's pairs.

    The score r is a linear function of the backbone's state at the last kept token of a completion, the end token. Each
    completion is computed once for all its pairs. Margins are those of the data (Llama 2, arXiv 2307.09288, eq. 2). The
    loss knows only differences, so scores of different prompts cannot be compared as trained; ``centering`` and
    ``normalize`` both help.

    The metrics have the names of TRL's RewardTrainer, ``accuracy``, ``margin`` (the score difference) and
    ``mean_reward``, and of its DPOTrainer, ``rewards/chosen`` and ``rewards/rejected``: means over examples of the mean
    over an example's pairs. ``min_reward`` and ``max_reward`` are those of an optimiser step, or of all held-out
    completions.

    The export is a model that ``AutoModelForSequenceClassification`` loads, in TRL and elsewhere. It gives the raw
    score as one label, at the last token that is not the pad token, here the end token. TRL's rows of text end there
    too. Its rows of messages end with the chat template, in ChatML with a line break, where no score was learned.
    ``LearnedReward`` reads the export with the normalisation. A module that takes the export as its ``policy`` uses the
    backbone only.

    Args:
        policy: the backbone: ``tiny``, a Hugging Face folder, a GGUF file or a hub id. Its output head is not used, and
            dropout is off.
        centering: weight of (r_better + r_worse)^2, which pulls scores to 0; 0 = none, 0.01 is advised (arXiv
            2312.09244).
        use_margins: use the data's margins in the loss; False leaves them to the audit, which gives the accuracy at
            each margin.
        num_heads: heads with different starts, an ensemble whose mean is the score. They share a backbone, so their
            errors are alike, and they disagree less than separately trained models.
        lora: train adapters and the head; None trains all weights.
        normalize: measure mean and standard deviation of the scores at export, and store them. The completions are
            ``data.calibration``, samples of the reference policy (Ziegler et al., arXiv 1909.08593), else the held-out
            ones, else training ones.
        optimizer: parameters -> optimizer; default AdamW, learning rate 1e-5.
        scheduler: optimizer -> scheduler, stepped per update.

    Raises:
        ValueError: a value is out of range; the architecture has no sequence classification; in ``setup``, the data have
            no pairs.
    """

    forms_logits = False

    def __init__(
        self,
        policy: str,
        centering: float = 0.0,
        use_margins: bool = True,
        num_heads: int = 1,
        lora: Lora | None = None,
        normalize: bool = True,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, dropout=False, lora=lora)
        check_numbers("RewardModule", centering=(centering, "[0, inf)"), num_heads=(num_heads, "[1, inf)"))
        if num_heads > 1 and not normalize:
            raise ValueError("several heads have offsets of their own, so their ensemble needs normalize: true")
        config = self.policy.model.config
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(
                f"policy: '{policy}' ({config.model_type}) has no form for sequence classification, so its scores "
                "could not be exported"
            )
        self.head = ScalarHead(config.hidden_size, num_heads)
        output = self.policy.model.get_output_embeddings()
        if output.weight is not self.policy.model.get_input_embeddings().weight:
            output.requires_grad_(False)  # never used, and DDP waits for the gradient of every parameter
        self.objective, self.use_margins, self.normalize = BradleyTerry(centering), use_margins, normalize
        self.moments: Tensor | None = None  # [1 + heads, 2], mean and standard deviation of the score and of each head

    def setup(self, stage: str) -> None:
        """Refuse data without pairs, and without rows to normalise on."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "kind", None) == "labels":
            raise ValueError(
                "a reward model learns from pairs, but these rows hold one labelled completion each: use rows with "
                "chosen and rejected"
            )
        if stage == "fit" and self.normalize and not isinstance(data, HasCalibration):
            raise ValueError(
                "scores are normalised on the DataModule's rows: fit with a PreferenceDataModule or set "
                "model.normalize to false"
            )

    def head_scores(self, batch: PreferenceBatch) -> Tensor:
        """Compute raw scores [N, heads] of the completions."""
        scores: Tensor = self.head(self.policy.completion_states(batch))
        return scores

    @train_by_pieces
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Compute the loss [] of a micro-batch: its share of the step's mean over examples."""
        scores, pairs = self.head_scores(batch), find_pairs(batch)
        sums = self.sums(scores, pairs)
        counted = batch["rank"] >= 0
        tokens = count_tokens(batch, counted)
        self.log_step({name: total / batch["denominator"] for name, total in sums.items()} | {"tokens": tokens})
        if bool(counted.any()):
            mean = scores.detach().mean(1)[counted]
            self.log_step({"min_reward": mean.min()}, join=min)
            self.log_step({"max_reward": mean.max()}, join=max)
        return self.step_loss(sums["loss"] / batch["denominator"])

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log means over the held-out examples, and leave the scored pairs in ``record.pairs``."""
        self.evaluate(batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Log the same under ``test/``."""
        self.evaluate(batch)

    def evaluate(self, batch: PreferenceBatch) -> None:
        """Log loss and metrics of a held-out batch, and leave its pairs in ``record.pairs``."""
        scores, pairs = self.head_scores(batch), find_pairs(batch)
        examples = float(pairs.weight.sum())
        means = {name: total / max(examples, 1.0) for name, total in self.sums(scores, pairs).items()}
        self.log_evaluation(means, weight=examples)
        if bool((batch["rank"] >= 0).any()):
            mean = scores.mean(1)[batch["rank"] >= 0]
            self.log_evaluation({"min_reward": mean.min()}, join=min)
            self.log_evaluation({"max_reward": mean.max()}, join=max)
        self.record.pairs = make_scored_pairs(self.tokenizer, batch, scores.mean(1), pairs)

    def sums(self, scores: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        """Sum loss and metrics of raw scores [N, heads] over the pairs, each weighted, to [].

        Each head has a loss of its own, and the losses of the heads are averaged.
        """
        margin = pairs.margin[:, None] if self.use_margins and pairs.margin is not None else None
        losses = self.objective.losses(scores[pairs.better], scores[pairs.worse], margin).mean(1)  # [M]
        mean = scores.detach().mean(1)
        chosen, rejected = mean[pairs.better], mean[pairs.worse]
        values = {
            "loss": losses,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            # Without ties this is the mean over completions, since each is in equally many pairs.
            "mean_reward": (chosen + rejected) / 2,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
        }
        return {name: (value * pairs.weight).sum() for name, value in values.items()}

    def score_pairs(self, batch: PreferenceBatch) -> list[ScoredPair]:
        """Return every pair of a batch with its scores and texts."""
        return make_scored_pairs(self.tokenizer, batch, self.head_scores(batch).mean(1), find_pairs(batch))

    @torch.no_grad()
    def prepare_export(self) -> None:
        """Measure mean and deviation of the scores with the current weights, if ``normalize`` asks (collective)."""
        if not self.normalize:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stage = "calibration" if data.calibration is not None else "train" if data.val is None else "val"
        scores: list[list[float]] = []
        with self.trainer.precision_plugin.forward_context():
            for batch in data.in_order(stage):
                batch = self.trainer.strategy.batch_to_device(batch)
                scores += from_all_ranks(self.head_scores(batch)[batch["rank"] >= 0].tolist())
                if stage != "calibration" and len(scores) >= MAX_CALIBRATION:
                    break  # on all ranks together
        self.moments = measure_moments(torch.tensor(scores, dtype=torch.float64))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a sequence classifier with one label, and its tokenizer.

        Its config holds ``reward_mean`` and ``reward_std``. With several heads the label is their mean; the heads are
        in ``reward_heads.safetensors``, and their means and deviations in the config. With ``lora`` the folder
        ``adapters`` holds adapters and heads alone, for users who have the backbone.
        """
        folder = Path(folder)
        tokenizer = add_scoring_pad(self.tokenizer, self.policy.stop_token_ids)
        model = merge_adapters(self.policy.model) if self.policy.has_adapters else self.policy.model
        weight = self.head.weight.detach().cpu()
        make_sequence_classifier(model, weight.mean(0), tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if len(weight) > 1:
            save_file({"weight": weight.contiguous()}, folder / HEADS_FILE)
        write_moments(folder / "config.json", self.moments)
        if self.policy.has_adapters:
            save_adapters(self.policy.model, POLICY, folder / ADAPTERS)
            save_file({"weight": weight.contiguous()}, folder / ADAPTERS / HEAD_FILE)

    def identity(self) -> dict[str, str | int]:
        """Return the base's identity and the number of heads."""
        return {**super().identity(), "num_heads": len(self.head.weight)}


def measure_moments(scores: Tensor) -> Tensor:
    """Compute mean and population standard deviation [1 + heads, 2] of ``scores`` [S, heads].

    The first row is of the mean over heads, the others of each head. A deviation of 0 becomes 1, so that one can divide
    by it.
    """
    columns = torch.cat([scores.mean(1, keepdim=True), scores], 1)
    deviation = columns.std(0, correction=0)
    return torch.stack([columns.mean(0), torch.where(deviation > 0, deviation, 1.0)], 1)


def write_moments(file: Path, found: Tensor | None) -> None:
    """Write the moments [1 + heads, 2] into a ``config.json``, in place of those that the backbone came with."""
    config = {
        key: value
        for key, value in json.loads(file.read_text(encoding="utf-8")).items()
        if not key.startswith("reward_")
    }
    if found is not None:
        (config["reward_mean"], config["reward_std"]), *heads = found.tolist()
        if len(heads) > 1:
            config["reward_head_means"], config["reward_head_stds"] = map(list, zip(*heads, strict=True))
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
