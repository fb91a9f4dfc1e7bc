"""What does the policy write?"""

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.phase import find_tensorboards, record_of, require_period, require_samples
from modules.types import Rollout, make_printable


class Samples(Callback):
    """Shows a few rollouts as text in TensorBoard: prompt, completion, expected answer and every reward.

    A completion that called tools shows all its turns.

    ``train/samples`` shows rollouts of a phase, ``val/samples`` those of the first held-out batch. They are taken at
    even distances from rank zero's rollouts, so that they show different prompts.

    Args:
        num_samples: rollouts to show, at least 1.
        every_n_phases: phases between texts of training, at least 1. One more text is written at the end of the fit.

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(self, num_samples: int = 4, every_n_phases: int = 10) -> None:
        require_period("every_n_phases", every_n_phases)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.num_samples = num_samples
        self.every_n_phases = every_n_phases
        self.unwritten = ""  # text of the last phase, kept because the rollouts are gone at the end of the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a fit that samples nothing."""
        if stage == "fit":
            require_samples(pl_module, "Samples", or_held_out=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Render the phase's samples; write them every n phases."""
        rollouts = record_of(pl_module).rollouts
        if not rollouts or not find_tensorboards(trainer):
            return
        self.unwritten = write_sections(pick_spread(rollouts, self.num_samples))
        if (trainer.current_epoch + 1) % self.every_n_phases == 0:
            self._write(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples of the first held-out batch."""
        rollouts = record_of(pl_module).held_out
        if batch_idx == 0 and rollouts:
            for logger in find_tensorboards(trainer):
                logger.experiment.add_text(
                    "val/samples",
                    write_sections(pick_spread(rollouts, self.num_samples)),
                    global_step=trainer.global_step,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last phase's samples, unless they are written already."""
        if self.unwritten:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        for logger in find_tensorboards(trainer):
            logger.experiment.add_text("train/samples", self.unwritten, global_step=trainer.global_step)
        self.unwritten = ""


def pick_spread(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """Take ``count`` rollouts at even distances, in order; all of them where there are no more."""
    count = min(count, len(rollouts))
    return [rollouts[i * len(rollouts) // count] for i in range(count)]


def write_sections(rollouts: Sequence[Rollout]) -> str:
    """Return one section per rollout.

    The model's text stands in indented code blocks. It shows as written, and no text can close such a block.
    """
    return "\n\n---\n\n".join(_section(rollout) for rollout in rollouts)


def _section(rollout: Rollout) -> str:
    completion = rollout.completion
    rows = ["| reward | score |", "|---|---|", f"| **trained on** | {_score(rollout.reward)} |"]
    rows += [f"| {escape_cell(name)} | {_score(score)} |" for name, score in rollout.rewards.items()]
    return "\n\n".join(
        [
            f"**{escape_cell(rollout.uid)}**: {completion.length} tokens, finish {completion.finish}",
            "Prompt",
            indent_block(rollout.prompt),
            "Completion",
            indent_block(completion.transcript or completion.text),
            "Expected answer",
            indent_block("(none)" if rollout.answer is None else rollout.answer),
            "\n".join(rows),
        ]
    )


def _score(value: float | None) -> str:
    return "unscorable" if value is None else f"{value:.3f}"


def indent_block(text: str) -> str:
    """Return ``text`` as an indented code block, with control characters as escapes.

    Every kind of line break starts a new indented line.
    """
    return "\n".join(f"    {make_printable(line)}" for line in text.splitlines()) or "    (empty)"


def escape_cell(text: str) -> str:
    """Return ``text`` on one line, with control characters as escapes, and with the special characters of Markdown,
    tables and HTML as character references.
    """
    line = escape(make_printable(" ".join(text.split())))
    return "".join(f"&#{ord(character)};" if character in "|`*_[]\\" else character for character in line)
