"""What does the policy actually write?"""

from collections.abc import Sequence
from html import escape
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.phase import record_of, require_period, tensorboards
from modules.types import Rollout


class Samples(Callback):
    """A few rollouts as text in TensorBoard: prompt, completion, expected answer and every reward.

    ``train/samples`` are of a phase, ``val/samples`` of the first held-out batch; spread evenly over rank zero's
    rollouts, so that they show different prompts.

    Args:
        num_samples: rollouts to show, at least 1.
        every_n_phases: phases between texts of training; one more is written at the end of the fit.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, num_samples: int = 4, every_n_phases: int = 10) -> None:
        require_period("every_n_phases", every_n_phases)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        self.num_samples = num_samples
        self.every_n_phases = every_n_phases
        self.unwritten = ""  # the last phase's text, kept because rollouts are gone at the end of the fit

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Render the phase's samples and, every n phases, write them."""
        rollouts = record_of(pl_module).rollouts
        if not rollouts or not tensorboards(trainer):
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
            for logger in tensorboards(trainer):
                logger.experiment.add_text(
                    "val/samples",
                    write_sections(pick_spread(rollouts, self.num_samples)),
                    global_step=trainer.global_step,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last phase's samples."""
        if self.unwritten:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        for logger in tensorboards(trainer):
            logger.experiment.add_text("train/samples", self.unwritten, global_step=trainer.global_step)
        self.unwritten = ""


def pick_spread(rollouts: Sequence[Rollout], count: int) -> list[Rollout]:
    """``count`` rollouts at even distances, in order; all of them where there are no more."""
    count = min(count, len(rollouts))
    return [rollouts[i * len(rollouts) // count] for i in range(count)]


def write_sections(rollouts: Sequence[Rollout]) -> str:
    """One section per rollout. What the model wrote stands in indented code blocks, which no text can close, and shows
    as written.
    """
    return "\n\n---\n\n".join(_section(rollout) for rollout in rollouts)


def _section(rollout: Rollout) -> str:
    completion = rollout.completion
    rows = ["| reward | score |", "|---|---|", f"| **trained on** | {_score(rollout.reward)} |"]
    rows += [f"| {cell(name)} | {_score(score)} |" for name, score in rollout.rewards.items()]
    return "\n\n".join(
        [
            f"**{cell(rollout.uid)}**: {len(completion.token_ids)} tokens, finish {completion.finish}",
            "Prompt",
            block(rollout.prompt),
            "Completion",
            block(completion.text),
            "Expected answer",
            block("(none)" if rollout.answer is None else rollout.answer),
            "\n".join(rows),
        ]
    )


def _score(value: float | None) -> str:
    return "unscorable" if value is None else f"{value:.3f}"


def block(text: str) -> str:
    """``text`` as an indented code block: every kind of line break starts a new indented line."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (empty)"


def cell(text: str) -> str:
    """``text`` on one line, with what means something to Markdown, tables or HTML as character references."""
    line = escape(" ".join(text.split()))
    return "".join(f"&#{ord(character)};" if character in "|`*_[]\\" else character for character in line)
