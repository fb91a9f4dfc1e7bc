"""Does the score prefer what people prefer, or only what is longer?"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.measures.scored_pairs import audit_report
from callbacks.phase import find_tensorboards, new_figure, record_of
from callbacks.writers.output_files import write_json
from modules.trainer.modes import evaluating
from modules.trainer.ranks import from_all_ranks, log_equal
from modules.types import HasRowsInOrder, PreferenceBatch, Record, ScoredPair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Split = Literal["train", "val"]
MAX_CORRELATION = 0.5  # a correlation of score and length within prompts above this is suspect
NUM_BINS = 10  # bins of the reliability diagram, over [0, 1]


@runtime_checkable
class ScoresPairs(Protocol):
    """A reward model, or a policy with its implicit reward. Its record holds the pairs of the last held-out batch."""

    record: Record

    def score_pairs(self, batch: PreferenceBatch) -> list[ScoredPair]:
        """Score the pairs of a batch that is on the module's device. Filler completions form no pair."""


class PreferenceAudit(Callback):
    """Judges a reward model or a DPO policy by its scores of ranked completions, over all ranks.

    At the end of every validation it logs ``val/audit/<key>`` for the keys of ``audit_report``.

    At the end of a fit it judges the final weights on the held-out pairs, or on training pairs where there are none. It
    writes a JSON file with ``split``, ``step`` and ``report``, logs ``audit`` to TensorBoard as a figure and a table,
    and prints one line. A ``fast_dev_run`` writes nothing.

    It warns that the score may be little more than length in two cases: score and length correlate within prompts above
    ``MAX_CORRELATION``, or the score agrees with the data less often than the rule "the longer one wins". Either must
    exceed its bound by two standard errors.

    Args:
        path: the JSON file. Its parent folders are made and an earlier file is replaced. None = ``audit.json`` in
            TensorBoard's folder, if there is one.
        max_pairs: training pairs to score at the end of a fit without held-out rows, at least 1.

    Raises:
        ValueError: ``max_pairs`` is below 1; in ``setup``, the module or the DataModule has no preference pairs, or
            ``path`` is a folder.
    """

    def __init__(self, path: str | None = None, max_pairs: int = 2000) -> None:
        if max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {max_pairs}.")
        self.path = None if path is None else Path(path)
        self.max_pairs = max_pairs
        self.pairs: list[ScoredPair] = []  # pairs of this rank during a validation, of all ranks after it
        self.validated_step = -1  # global_step of the weights that gave ``pairs``

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, and refuse what cannot be audited before training starts."""
        self.pairs, self.validated_step = [], -1
        if not isinstance(pl_module, ScoresPairs):
            raise ValueError(
                f"PreferenceAudit needs a module that scores preference pairs, not a {type(pl_module).__name__}: "
                "remove the callback."
            )
        if stage == "fit" and not isinstance(trainer.datamodule, HasRowsInOrder):  # type: ignore[attr-defined]
            raise ValueError(
                "PreferenceAudit reads rows of preferences from the DataModule: fit with a PreferenceDataModule or "
                "remove the callback."
            )
        if self.path is not None and self.path.is_dir():
            raise ValueError(
                f"PreferenceAudit: {self.path} is a folder; name a file, such as {self.path / 'audit.json'}"
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the pairs of the last validation."""
        self.pairs, self.validated_step = [], -1

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the pairs of the batch."""
        self.pairs += record_of(pl_module).pairs

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the report on the pairs of all ranks. The sanity check is left out, as it may see only a few rows."""
        if trainer.sanity_checking:
            return
        self.pairs, self.validated_step = from_all_ranks(self.pairs), trainer.global_step
        log_equal(pl_module, {f"val/audit/{key}": value for key, value in audit_report(self.pairs).items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the final weights, from the last validation if it scored them."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Trainer sets it without declaring it
            return
        data: HasRowsInOrder = trainer.datamodule  # type: ignore[attr-defined]
        split: Split = "train" if data.val is None else "val"
        if self.validated_step != trainer.global_step:
            self.pairs = self._score(
                trainer, pl_module, data.in_order(split), None if split == "val" else self.max_pairs
            )
        if trainer.is_global_zero:
            self._publish(trainer, split)

    def _score(
        self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader[PreferenceBatch], limit: int | None
    ) -> list[ScoredPair]:
        """Score the first ``limit`` pairs of all ranks as a validation does (collective). None = all pairs."""
        pairs: list[ScoredPair] = []
        with evaluating(pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch in loader:
                pairs += from_all_ranks(
                    cast(ScoresPairs, pl_module).score_pairs(trainer.strategy.batch_to_device(batch))
                )
                if limit is not None and len(pairs) >= limit:
                    break  # on all ranks together
        return pairs[:limit]

    def _publish(self, trainer: Trainer, split: Split) -> None:
        if not self.pairs:
            rank_zero_warn(explain_no_pairs({name: float(value) for name, value in trainer.callback_metrics.items()}))
            return
        report = audit_report(self.pairs)
        loggers = find_tensorboards(trainer)
        for logger in loggers:
            figure = new_figure()
            draw_audit(figure, self.pairs, report)
            logger.experiment.add_figure("audit", figure, global_step=trainer.global_step)
            logger.experiment.add_text("audit", write_audit_table(report), global_step=trainer.global_step)
        path = self.path or next((Path(logger.log_dir) / "audit.json" for logger in loggers), None)
        if path is not None:
            write_json(path, {"split": split, "step": trainer.global_step, "report": report})
        rank_zero_info(write_audit_line(report, split) + ("" if path is None else f": {path}"))
        if smells_of_length(report):
            rank_zero_warn(
                "audit: the score may be little more than length; see accuracy_chosen_shorter and "
                "score_length_pearson_within_prompt"
            )


def explain_no_pairs(metrics: dict[str, float]) -> str:
    """Return why there is no report on rows without pairs, and what the logged numbers say instead."""
    why = "audit: no prompt has two completions of different ranks, so accuracy, margin and length bias are unknown"
    for stage in ("val", "train"):
        good, bad = f"{stage}/rewards/chosen", f"{stage}/rewards/rejected"
        if good in metrics and bad in metrics:
            return f"{why}; desirable completions have {good} {metrics[good]:.3g}, the others {bad} {metrics[bad]:.3g}"
    return why


def write_audit_line(report: dict[str, float], split: Split) -> str:
    """Return the report in one line, with the number and the origin of its pairs."""
    shorter, longer, correlation = (
        f"{report[key]:.2f}" if key in report else "unknown"
        for key in ("accuracy_chosen_shorter", "accuracy_chosen_longer", "score_length_pearson_within_prompt")
    )
    return (
        f"audit of {report['pairs']:.0f} {'held-out' if split == 'val' else 'training'} pairs: "
        f"accuracy {report['accuracy']:.2f} (chosen shorter {shorter}, longer {longer}), "
        f"longer-wins baseline {report['longer_wins']:.2f}, length correlation within prompts {correlation}"
    )


def smells_of_length(report: dict[str, float]) -> bool:
    """Return whether the score may be little more than length, by more than two standard errors.

    A correlation has a standard error of about 1 / sqrt(pairs), a difference of two shares at most sqrt(1 / (2 pairs)).
    """
    error = report["pairs"] ** -0.5
    return (
        report.get("score_length_pearson_within_prompt", 0.0) > max(MAX_CORRELATION, 2 * error)
        or report["longer_wins"] - report["accuracy"] > 2 * error * 0.5**0.5
    )


def write_audit_table(report: dict[str, float]) -> str:
    """Return the report as Markdown."""
    return "\n".join(
        ["| measure | value |", "|---|---|", *(f"| {key} | {value:.3f} |" for key, value in report.items())]
    )


def measure_reliability(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean confidence, accuracy) of each bin that holds pairs, both [<= NUM_BINS], by rising confidence.

    The confidence of a pair is sigma(abs(delta)): the probability that the completion with the higher score is better.
    It is right where ``delta`` > 0 and half right where ``delta`` is 0. The bins are those of ``ece``.

    Args:
        delta: [N], score of the chosen completion minus that of the rejected one.
    """
    confidence, right = delta.abs().sigmoid(), (delta.sign() + 1) / 2  # [N]
    bins = ((confidence * NUM_BINS).ceil().long() - 1).clamp(min=0)  # [N], closed on the right
    _, index, counts = torch.unique(bins, return_inverse=True, return_counts=True)
    means = [delta.new_zeros(len(counts)).index_add(0, index, values) / counts for values in (confidence, right)]
    return means[0], means[1]


def draw_audit(figure: "Figure", pairs: Sequence[ScoredPair], report: dict[str, float]) -> None:
    """Plot score differences over length differences on the left, and the reliability diagram on the right."""
    left, right = figure.subplots(1, 2)
    delta = torch.tensor([pair.chosen_score - pair.rejected_score for pair in pairs], dtype=torch.float64)  # [N]
    left.scatter([pair.chosen_length - pair.rejected_length for pair in pairs], delta.tolist(), s=6, alpha=0.5)
    left.axhline(0.0, color="gray", linewidth=0.8)
    left.axvline(0.0, color="gray", linewidth=0.8)
    left.set(xlabel="tokens, chosen - rejected", ylabel="score, chosen - rejected")
    cases = ("shorter", "longer")
    left.set_title(
        "accuracy: "
        + ", ".join(
            f"chosen {case} {report[key]:.2f}" for case in cases if (key := f"accuracy_chosen_{case}") in report
        )
    )
    confidence, accuracy = measure_reliability(delta)
    right.plot([0.5, 1.0], [0.5, 1.0], linestyle="--", color="gray", label="calibrated")
    right.plot(confidence.tolist(), accuracy.tolist(), marker="o", label="score")
    right.set(
        xlabel="confidence, sigma(|score difference|)",
        ylabel="share right",
        ylim=(-0.02, 1.02),
        title=f"ECE {report['ece']:.2f}",
    )
    right.legend()
