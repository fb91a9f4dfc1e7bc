"""What every method shares: the policy, optimizer and scheduler from YAML, exact loss scaling, step metrics, checkpoint identity."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from modules.networks.policy import Policy
from modules.types import Rollout


class AlignmentModule(LightningModule):
    """A method of aligning a causal language model.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning-rate scheduler, stepped once per optimiser update; None = constant.
        dropout: False switches the model's dropout off.

    Attributes:
        rollouts: this rank's rollouts of the current phase, valid from its first micro-batch to the end of the epoch.
        phase_metrics: numbers of the current phase that its end logs.
    """

    def __init__(self, policy: str, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None, dropout: bool = True) -> None:
        super().__init__()
        self.policy = Policy(policy, dropout=dropout)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.rollouts: list[Rollout] = []
        self.phase_metrics: dict[str, float] = {}
        self.num_tokens = 0  # trained on so far, all ranks
        self.means = nn.ModuleDict()  # of validation, by metric name
        self._step_tokens, self._step_start = 0, time.perf_counter()

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, which the DataModule is given."""
        return self.policy.tokenizer

    def setup(self, stage: str) -> None:
        """Refuse precisions under which Lightning would cast the batch's log-probs and denominators to 16 bits."""
        if self.trainer.precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"precision '{self.trainer.precision}' rounds the batch's log-probabilities and denominators to 16 bits; "
                "use '32-true', 'bf16-mixed' or '16-mixed'"
            )

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler stepped per update."""
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def step_loss(self, loss: Tensor) -> Tensor:
        """Undo Lightning's division by the accumulation and by the ranks: ``denominator`` already counts the whole step."""
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def log_step(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Log training metrics of a micro-batch as ``train/<name>``."""
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, on_step=True, on_epoch=False, batch_size=1)

    def show(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Show numbers in the progress bar, under names short enough for it."""
        self.log_dict(dict(metrics), prog_bar=True, logger=False, batch_size=1)

    def on_validation_start(self) -> None:
        """Begin with new means: Lightning resets the old ones in inference mode, after which a later fit could not update them."""
        self.means = nn.ModuleDict()

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def log_mean(self, metrics: Mapping[str, Tensor | float], weight: float) -> None:
        """Log evaluation metrics, averaged exactly over batches and ranks with ``weight``; all ranks must log the same names."""
        for name, value in metrics.items():
            if name not in self.means:
                self.means[name] = MeanMetric().to(self.device)
            self.means[name].update(value, weight)  # type: ignore[operator]
            self.log(name, self.means[name], metric_attribute=f"means.{name}")  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock of the first micro-batch of a step."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_start, self._step_tokens = time.perf_counter(), 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm before clipping, the learning rate, and the throughput of the step on this rank."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        seconds = time.perf_counter() - self._step_start
        metrics = {
            "grad_norm": torch.nn.utils.get_total_norm(gradients),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens_per_second": self._step_tokens / seconds,
        }
        self.log_step(metrics)

    def count_tokens(self, batch_tokens: int) -> None:
        """Count the tokens of a micro-batch (as if every rank had as many) towards ``num_tokens`` and the throughput."""
        self._step_tokens += batch_tokens
        self.num_tokens += batch_tokens * self.trainer.world_size
        self.log_step({"num_tokens": float(self.num_tokens)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the checkpoint is of, so that another model refuses it in one sentence."""
        checkpoint["alignment"] = {**self.identity(), "num_tokens": self.num_tokens}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ValueError for the checkpoint of another method or of a model of another shape."""
        saved = dict(checkpoint.get("alignment", {}))
        self.num_tokens = saved.pop("num_tokens", 0)
        mine = self.identity()
        if saved != mine:
            differ = [f"{key} {saved.get(key, 'unknown')!r} there, {mine[key]!r} here" for key in mine if saved.get(key) != mine[key]]
            raise ValueError(f"the checkpoint is of another model: {'; '.join(differ)}")

    def identity(self) -> dict[str, str | int]:
        """What must agree between a checkpoint and the run that loads it."""
        config = self.policy.model.config
        return {
            "method": type(self).__name__,
            "model_type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in self.policy.parameters()),
            "vocab_size": config.vocab_size,
        }
