"""Keeps a run from learning from, saving or exporting numbers that are not finite."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from modules.trainer.ranks import from_all_ranks

OnNonfinite = Literal["stop", "skip"]
MASKS = {
    "input_ids": "attention_mask",
    "prompt_ids": "prompt_mask",
    "teacher_prompt_ids": "teacher_prompt_mask",
    "completion_ids": "completion_mask",
}
OF_PROMPTS = ("prompt_ids", "teacher_prompt_ids", "margin")  # one entry per prompt, found by ``prompt_index``


class FiniteGuard(Callback):
    """Takes no optimiser step whose loss or gradient is not finite, on any rank.

    The rows of such a step are written into the run's folder, to ``nonfinite-step-<step>.jsonl``: one line per
    sequence with its tokens, its text and the rest of its batch. A run also stops after a validation whose ``val/loss``
    is not finite. Parameters stay as they were, so earlier checkpoints and exports stay the last ones. A skipped step
    counts as a step for the learning-rate schedule. With a gradient scaler (``16-mixed``) gradients may overflow: the
    scaler leaves out such steps itself.

    Args:
        on_nonfinite: ``stop`` ends the run; ``skip`` leaves the step out.
        max_skips: steps in a row that ``skip`` leaves out; one more ends the run.

    Raises:
        ValueError: a value is out of range.
        FloatingPointError: on all ranks, to end the run.
    """

    def __init__(self, on_nonfinite: OnNonfinite = "stop", max_skips: int = 10) -> None:
        if on_nonfinite not in ("stop", "skip") or max_skips < 0:
            raise ValueError(f"on_nonfinite must be stop or skip and max_skips >= 0, got {on_nonfinite}, {max_skips}")
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.skipped = 0  # steps in a row
        self._batches: list[Any] = []  # micro-batches of the step so far
        self._losses: list[Tensor] = []  # their losses []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the rows."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches, self._losses = [], []
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss. If the micro-batch comes in pieces, the loss of the last piece has the value of all of them."""
        self._losses[len(self._batches) - 1 :] = [loss.detach()]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the step pass, leave it out, or end the run (collective)."""
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        losses = torch.stack([loss.float() for loss in self._losses])
        finite = losses.isfinite().all()
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            finite = finite & torch.nn.utils.get_total_norm(gradients).isfinite().to(losses.device)
        if trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            self.skipped = 0
            return
        step, files = trainer.global_step + 1, [(self.write_rows(trainer, pl_module), bool(losses.isfinite().all()))]
        ranks = from_all_ranks(files)
        rows = " and ".join([file for file, whole in ranks if not whole] or [file for file, _ in ranks])
        what = f"{type(pl_module).__name__}: the loss or gradient of step {step} is not finite; its rows: {rows}"
        self.skipped += 1
        if self.on_nonfinite == "stop" or self.skipped > self.max_skips:
            often = f" It was the {self.skipped}th such step in a row." if self.skipped > 1 else ""
            raise FloatingPointError(
                f"{what}.{often} The step is not taken, and earlier checkpoints and exports are as they were: lower "
                "the learning rate, or look at the rows"
            )
        rank_zero_warn(f"{what}. The step is skipped ({self.skipped} of at most {self.max_skips} in a row)")
        for parameter in pl_module.parameters():
            parameter.grad = None  # optimizers leave such a parameter and its state alone

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run whose weights give no finite loss, before they are saved."""
        loss = float(trainer.callback_metrics.get("val/loss", 0.0))
        if trainer.training and not trainer.sanity_checking and not math.isfinite(loss):
            raise FloatingPointError(
                f"{type(pl_module).__name__}: val/loss is {loss} after step {trainer.global_step}. Nothing more is "
                "saved, and earlier checkpoints and exports are as they were: lower the learning rate"
            )

    def write_rows(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Write the rows of the step on this rank, and return the file, or why there is none."""
        folder, step = Path(trainer.default_root_dir), trainer.global_step + 1
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = folder / f"nonfinite-step-{step}{rank}.jsonl"
        decode = getattr(getattr(pl_module, "tokenizer", None), "decode", str)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8") as out:
                for number, (batch, loss) in enumerate(zip(self._batches, self._losses, strict=True)):
                    place = {"step": step, "micro_batch": number, "loss": float(loss)}
                    out.writelines(json.dumps(place | row) + "\n" for row in unpack_rows(batch, decode))
        except OSError as error:
            return f"not written ({error})"
        return str(file)


def unpack_rows(batch: Any, decode: Any) -> Iterator[dict[str, Any]]:
    """Read the sequences of a batch: their tokens without padding, also as text, and what else the batch says of it."""
    if not isinstance(batch, dict):
        yield {"batch": str(batch)}
        return
    index = batch.get("prompt_index")
    for place in range(len(batch["input_ids"] if index is None else index)):
        row: dict[str, Any] = {}
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.dim() and name not in (*MASKS.values(), "attended"):
                of = int(index[place]) if index is not None and name in OF_PROMPTS else place
                kept = value[of]
                if name in MASKS:
                    attended = (
                        batch.get("attended") if name == "completion_ids" else None
                    )  # tokens of tools are rows too
                    kept = kept[(batch[MASKS[name]] if attended is None else attended)[of]]
                    row[name.removesuffix("_ids") + "_text"] = decode(kept.tolist())
                row[name] = kept.tolist()
        yield row
    if "ptx" in batch:
        yield from unpack_rows(batch["ptx"], decode)


def require_finite(weights: Iterable[Tensor], who: str) -> None:
    """Check weights before they are written.

    Raises:
        FloatingPointError: one of them is not finite; the message begins with ``who``.
    """
    floats = [weight.detach() for weight in weights if weight.is_floating_point()]
    if not bool(torch.nn.utils.get_total_norm(floats, norm_type=math.inf).isfinite()):
        raise FloatingPointError(
            f"{who}: the weights are not finite, so they are not written; earlier checkpoints and exports are as they "
            "were"
        )
