"""A callback that notes when each optimiser step of a fit ends, and what was logged by then."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def read_clocks() -> tuple[float, float]:
    """Return the seconds of the clock and of the processor, of all threads."""
    return time.perf_counter(), time.process_time()


class StepClock(Callback):
    """Writes a JSON file at the end of a fit.

    ``begun`` and ``ready`` are the clocks before and after what precedes the first step, ``ends`` those at the end of
    each optimiser step, ``steps`` the numbers logged by then, and ``phases`` the times and tokens of each phase of a
    method that samples.

    Args:
        file: where to write.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.found: dict[str, Any] = {"ends": [], "steps": [], "phases": []}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["begun"] = read_clocks()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["ready"] = read_clocks()
        model: Any = pl_module.policy.model  # type: ignore[union-attr]
        self.found["parameters"] = sum(each.numel() for each in model.parameters())
        self.found["embeddings"] = model.get_input_embeddings().weight.numel()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.found["ends"]):
            self.found["ends"].append(read_clocks())
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.found["steps"].append({name: value for name, value in numbers.items() if name.startswith("train/")})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record: Any = pl_module.record
        rollouts = getattr(record, "rollouts", None)
        if rollouts:
            prompts = {rollout.uid: len(rollout.prompt_ids) for rollout in rollouts}
            self.found["phases"].append(
                {
                    "times": {name: value for name, value in record.metrics.items() if name.startswith("time/")},
                    "prompt_tokens": sum(prompts.values()),
                    "completion_tokens": sum(rollout.completion.length for rollout in rollouts),
                    "completions": len(rollouts),
                }
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.write_text(json.dumps(self.found), encoding="utf-8")
