"""The base of every method: policy, optimizer, exact loss scaling, metrics, checkpoints, export."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from modules.networks.bases import leave_out_bases, put_back_bases
from modules.networks.loading import lacks_output_head
from modules.networks.lora import Lora
from modules.networks.memory import (
    MB,
    choose_piece_bytes,
    count_activation_bytes,
    estimate_memory,
    estimate_peak,
    find_capacity,
    measure_used,
    write_memory_line,
)
from modules.networks.policy import MAX_LOGITS, Policy
from modules.networks.reference import Frozen
from modules.rollout.engine import InProcessEngine
from modules.rollout.sampling import Sampling
from modules.schedulers import RunSchedule
from modules.trainer.forecast import Forecast
from modules.trainer.guard import FiniteGuard, require_finite
from modules.trainer.kept import Asked, ask_callbacks, ask_trainer, name_kinds, refuse_other_kinds, say_kept_settings
from modules.trainer.pieces import Batch, can_cut, count_longest, count_padded, cut_to_pieces
from modules.trainer.ranks import Join, Tally, log_equal
from modules.trainer.saving import keep_checkpoints_whole, refuse_unwritable_folders
from modules.trainer.seeds import derive_seed, seed_device
from modules.trainer.steps import (
    check_whole_steps,
    count_updates,
    refuse_blind_monitors,
    rewind_to_whole_step,
    validation_is_due,
)
from modules.trainer.stopping import StopTogether
from modules.types import PolicyBatch, PreferenceBatch, Record, find_opened_thought


class AlignmentModule(LightningModule):
    """A method that trains a causal language model.

    Args:
        policy: ``tiny``, a Hugging Face folder, a GGUF file or a hub id.
        optimizer: parameters -> optimizer.
        scheduler: optimizer -> learning-rate scheduler, stepped once per optimiser update; None = constant.
        dropout: False switches the model's dropout off.
        lora: train low-rank adapters instead of all weights.

    Attributes:
        record: what callbacks read.
    """

    forms_logits = True  # whether training computes logits
    gradient_checkpointing = False  # whether a fit computes layers again in the backward pass, to need less memory
    torch_compile = False  # whether a fit compiles layers
    reference_id: str | None = None  # fingerprint of the frozen reference; None = there is none, or it moves

    def __init__(
        self,
        policy: str,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        dropout: bool = True,
        lora: Lora | None = None,
    ) -> None:
        super().__init__()
        self.policy = Policy(policy, dropout=dropout, lora=lora)
        if self.forms_logits and lacks_output_head(self.policy.model):
            raise ValueError(
                f"policy: '{policy}' is a classifier (a reward model?) without an output head: name the language model"
            )
        self.optimizer, self.scheduler = optimizer, scheduler
        self.lora_scale = None if lora is None else lora.alpha / lora.r  # scale of adapters
        self.record = Record()
        self.num_tokens = 0  # tokens trained on so far, on all ranks
        self._step, self._evaluation = Tally(), Tally()  # metrics of the optimiser step and of the evaluation so far
        self._step_names: set[str] = set()  # names of all metrics of earlier steps
        self._step_start = time.perf_counter()
        self.peak: float | None = None  # MB that the fit is expected to take; None before the first step
        self.piece_tokens: int | None = None  # padded tokens of a piece, see ``cut``; None = micro-batches stay whole
        self.piece, self.gradients_dropped = 0, False  # see ``train_by_pieces``
        self._random: int | None = None  # seed of dropout for the whole run
        self._kinds: dict[str, str] = {}  # classes of the checkpoint's optimizer and scheduler
        self._asked: Asked = []  # settings of parts whose state a checkpoint brings

    @property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, which the DataModule takes."""
        return self.policy.tokenizer

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks of every run: ``StopTogether``, ``Forecast`` and, unless the Trainer has one,
        ``FiniteGuard``.
        """
        guarded = any(isinstance(callback, FiniteGuard) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [StopTogether(), Forecast()] if guarded else [StopTogether(), Forecast(), FiniteGuard()]

    def setup(self, stage: str) -> None:
        """Refuse a precision other than 32 bits for log-probs, denominators and losses; keep checkpoints whole, and refuse
        folders for them that cannot be written.

        With ``gradient_checkpointing`` the layers of all models that learn are computed again in the backward pass, and
        with ``torch_compile`` they are compiled. Strategies that shard weights are refused.
        """
        keep_checkpoints_whole(self.trainer)
        if stage == "fit":
            refuse_unwritable_folders(self.trainer)
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"strategy {type(self.trainer.strategy).__name__} shards the weights, and sampling, frozen copies and the "
                "export read whole ones: use ddp, for larger models with configs/overlays/lora.yaml"
            )
        for part in [part for part in self.modules() if isinstance(part, Policy) and stage == "fit"]:
            if self.gradient_checkpointing:
                part.recompute_layers()
            if self.torch_compile:
                part.compile_layers()
        if self.trainer.precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"precision '{self.trainer.precision}' rounds the batch's log-probabilities and denominators to 16 "
                "bits; use '32-true', 'bf16-mixed' or '16-mixed'"
            )
        if self.trainer.precision == "64-true":
            raise ValueError("precision '64-true': log-probabilities and losses are computed in 32 bits; use '32-true'")

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the scheduler, which steps per update, or per epoch if it waits for a plateau."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.device.type == "cpu":
            fuse_adam(optimizer)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if not isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError(
                    "torch's ReduceLROnPlateau does not say which metric it watches: name "
                    "lightning.pytorch.cli.ReduceLROnPlateau with init_args {monitor: val/loss}"
                )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse the checkpoint of another optimizer or scheduler, and remember what is asked of these."""
        refuse_other_kinds(self._kinds, name_kinds(self.trainer))
        self._kinds, self._asked = {}, self._asked + ask_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Refuse a run that cuts optimiser steps or watches a validation that it lacks, take the seed of dropout, and
        tell the schedule the run's length.
        """
        check_whole_steps(self.trainer)
        refuse_blind_monitors(self.trainer)
        if self._random is None:
            self._random = torch.initial_seed()
        self.piece_tokens = self.choose_piece_tokens() if can_cut(self) else None
        if self.global_step > 0:
            say_kept_settings(self._asked)
        self._asked = []
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, RunSchedule):
                before, total = config.scheduler.total_steps, count_updates(self.trainer)
                if self.global_step > 0 and before != total:
                    rank_zero_info(f"schedule: now over {total:.0f} updates instead of {before:.0f}")
                config.scheduler.plan(total)

    def parameter_groups(self) -> list[Any]:
        """Return what the optimizer trains: parameters, or groups of parameters with settings of their own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def activation_bytes(self, recomputes: bool) -> float:
        """Return how many bytes a token keeps from the forward to the backward pass, in all models that learn."""
        autocast, models = (
            self.trainer.precision.endswith("mixed"),
            [m for m in self.modules() if isinstance(m, Policy)],
        )
        return sum(count_activation_bytes(m.model.config, autocast, m.has_adapters, recomputes) for m in models)

    def choose_piece_tokens(self) -> int:
        """Choose how many padded tokens a piece of a micro-batch may have, by the memory of their activations.

        The number does not depend on ``gradient_checkpointing``, so switching that on saves memory.
        """
        trained = self.trainer.optimizers[0]
        needed = MB * sum(estimate_memory([*self.parameters(), *self.buffers()], trained, 0).values())
        return max(1, int(choose_piece_bytes(self.device, needed) / self.activation_bytes(recomputes=False)))

    def cut(self, batch: Batch) -> list[Batch]:
        """Return the pieces of a micro-batch that ``train_by_pieces`` computes one after the other; see
        ``cut_to_pieces``.
        """
        return cut_to_pieces(batch, self.piece_tokens, self.policy.shares_prompts)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of the last step, unless ``train_by_pieces`` did so before the step's first piece."""
        if not self.gradients_dropped:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        self.gradients_dropped = False

    def step_loss(self, loss: Tensor) -> Tensor:
        """Undo Lightning's division by accumulation and ranks, since ``denominator`` counts the whole step."""
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def log_step(
        self, metrics: Mapping[str, Tensor | float], weight: Tensor | float | None = None, join: Join = sum
    ) -> None:
        """Log numbers of a micro-batch as ``train/<name>``.

        They are joined once per optimiser step, over its micro-batches and all ranks. With ``weight`` they are
        averaged; without, ``join`` sums them or takes their ``min`` or ``max``.
        """
        self._step.add(metrics, weight, join)

    def log_evaluation(
        self, metrics: Mapping[str, Tensor | float], weight: Tensor | float | None = None, join: Join = sum
    ) -> None:
        """Log numbers of a held-out batch as ``val/<name>`` or ``test/<name>``.

        They are joined once per evaluation, over its batches and all ranks; see ``log_step``.
        """
        self._evaluation.add(metrics, weight, join)

    def respond(self, conversations: Sequence[list[dict[str, str]]], max_completion_length: int = 256) -> list[str]:
        """Answer conversations greedily with the current weights, on this rank alone.

        The policy's modes and the random state stay as they are. An answer begins with the ``<think>`` that the chat
        template opens, if it does.

        Args:
            conversations: messages, each with ``role`` and ``content``. Without a chat template a conversation is one
                user message, which is put into Alpaca's prompt.
            max_completion_length: tokens of an answer; fewer if the longest prompt leaves the model fewer positions.

        Raises:
            ValueError: several messages without a chat template, or a prompt that leaves no position for an answer.
        """
        prompts = [self.policy.prompt_ids(messages) for messages in conversations]
        positions = self.policy.max_positions
        longest = max(map(len, prompts), default=0)
        if positions is not None:
            max_completion_length = min(max_completion_length, positions - longest)
        if max_completion_length < 1:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for an answer, since the model has {positions} "
                "positions; leave the prompt out"
            )
        engine = InProcessEngine()
        engine.sync_weights(self.policy, self.global_step)
        sampling = Sampling(temperature=0.0, max_completion_length=max_completion_length)
        groups = engine.generate(prompts, 1, sampling, [0] * len(prompts))
        opened = [find_opened_thought(str(self.tokenizer.decode(ids))) for ids in prompts]
        return [thought + group[0].text for thought, group in zip(opened, groups, strict=True)]

    def on_validation_start(self) -> None:
        """Forget what an earlier or interrupted evaluation left."""
        self._evaluation = Tally(self.device)
        self.record.sampled, self.record.greedy, self.record.budgets = [], [], {}

    def on_test_start(self) -> None:
        """Do the same for ``test``."""
        self.on_validation_start()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation, over all batches and ranks."""
        log_equal(self, {f"val/{name}": value for name, value in self.evaluation_metrics().items()})

    def on_test_epoch_end(self) -> None:
        """Log the same under ``test/``."""
        log_equal(self, {f"test/{name}": value for name, value in self.evaluation_metrics().items()})

    def evaluation_metrics(self) -> dict[str, float]:
        """Join what ``log_evaluation`` collected, over all batches and ranks (collective)."""
        return self._evaluation.join()

    def say_memory(self, batch: Any) -> None:
        """Print how much memory a fit needs with micro-batches like this one, and warn if the device has less."""
        frozen = (
            weight for part in vars(self).values() if isinstance(part, Frozen) for weight in part.weights.values()
        )
        tokens = count_padded(batch, self.policy.shares_prompts)
        if self.piece_tokens is not None:
            tokens = min(tokens, max(self.piece_tokens, count_longest(batch)))
        logits = min(MAX_LOGITS, tokens * self.policy.model.config.vocab_size) if self.forms_logits else 0
        weights, optimizer = [*self.parameters(), *self.buffers(), *frozen], self.trainer.optimizers[0]
        used, most = measure_used(self.device)
        peaks = {}
        for recomputes in (True, self.gradient_checkpointing):
            memory = estimate_memory(weights, optimizer, logits, tokens * self.activation_bytes(recomputes))
            samples = "time/sampling" in self.record.metrics
            peaks[recomputes] = estimate_peak(memory, used, most, bool(optimizer.state), samples)
        self.peak = peaks[self.gradient_checkpointing]
        rank_zero_info(write_memory_line(memory, self.peak))
        if self.peak > find_capacity(self.device):
            saved = f"; --gradient_checkpointing true needs about {peaks[True]:,.0f} MB"
            rank_zero_warn(
                f"a fit like this needs about {self.peak:,.0f} MB, and there are {find_capacity(self.device):,.0f} MB"
                f"{'' if self.gradient_checkpointing else saved}; configs/overlays/lora.yaml trains with less"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock and the metrics of a step at its first micro-batch, and print the memory at the first step.

        Dropout's seed depends on run, rank, step and micro-batch alone, so that a resumed run draws the same.
        """
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        place = f"{self.global_rank}/{self.global_step}/{micro_batch}"
        seed_device(derive_seed(self._random or 0, place, "training_step"), self.device)
        if self.peak is None:
            self.say_memory(batch)
        if micro_batch == 0:
            self._step, self._step_start = Tally(self.device), time.perf_counter()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step: the collected numbers, the gradient norm before clipping, the learning rate, the tokens.

        A metric that earlier steps had, and for which this step has no values, is NaN.
        """
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        metrics = self.step_metrics()
        tokens = metrics.pop("tokens")
        self._step_names |= metrics.keys()
        # Lightning would log the value of an earlier step again.
        metrics |= dict.fromkeys(self._step_names - metrics.keys(), math.nan)
        self.num_tokens += round(tokens)
        metrics |= {
            "num_tokens": float(self.num_tokens),
            "tokens_per_second": tokens / (time.perf_counter() - self._step_start),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "grad_norm": float(torch.nn.utils.get_total_norm(gradients)),
        }
        log_equal(self, {f"train/{name}": value for name, value in metrics.items()})
        if "loss" in metrics:
            log_equal(self, {"loss": metrics["loss"]}, prog_bar=True, logger=False)

    def step_metrics(self) -> dict[str, float]:
        """Join what ``log_step`` collected, over the micro-batches of the step and all ranks (collective)."""
        return self._step.join()

    def prepare_export(self) -> None:
        """Do what all ranks must do together before one of them calls ``save_pretrained`` (collective).

        The base does nothing.
        """

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained model and its tokenizer as a Hugging Face folder."""
        self.policy.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the method and the model in the checkpoint, so that another model refuses it; refuse broken weights.

        With adapters it names the model under them and leaves out its weights.
        """
        saved = checkpoint["state_dict"]
        learned = [name for name, parameter in self.named_parameters() if parameter.requires_grad and name in saved]
        require_finite([saved[name] for name in learned], type(self).__name__)
        checkpoint["alignment"] = {**self.identity(), "num_tokens": self.num_tokens, "random": self._random}
        checkpoint["alignment"] |= {"reference": self.reference_id, "lora_scale": self.lora_scale}
        checkpoint["alignment"] |= {"validates": validation_is_due(self.trainer), "logged": sorted(self._step_names)}
        checkpoint["alignment"] |= {"kinds": name_kinds(self.trainer)}
        checkpoint["alignment"] |= {"bases": leave_out_bases(self, checkpoint)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another method or model, then correct the position; see ``rewind_to_whole_step``.

        Raises:
            ValueError: the checkpoint's method, kind of model, number of parameters, or model under adapters is another.
        """
        saved = dict(checkpoint.get("alignment", {}))
        self.num_tokens = saved.pop("num_tokens", 0)
        self._random = saved.pop("random", self._random)
        reference, scale = saved.pop("reference", None), saved.pop("lora_scale", None)
        due, self._step_names = saved.pop("validates", None), set(saved.pop("logged", []))
        bases, kinds = saved.pop("bases", {}), saved.pop("kinds", {})
        mine = self.identity()
        if saved != mine:
            differ = [
                f"{key} {saved.get(key, 'unknown')!r} there, {mine[key]!r} here"
                for key in mine
                if saved.get(key) != mine[key]
            ]
            raise ValueError(f"the checkpoint is of another model: {'; '.join(differ)}")
        if None not in (scale, self.lora_scale) and scale != self.lora_scale:
            raise ValueError(
                f"lora.alpha / lora.r is {self.lora_scale:g} and was {scale:g} in the checkpoint, so its adapters "
                "would change the model by another factor: set lora.alpha as it was"
            )
        put_back_bases(self, checkpoint, bases)
        if None not in (reference, self.reference_id) and reference != self.reference_id:
            raise ValueError(
                "the checkpoint's run began with other weights than model.policy (or model.reference, model.teacher) "
                "holds now, so the KL would be to another model: name the weights that it began with"
            )
        if "loops" in checkpoint:
            if self.trainer.state.fn == "fit":
                self._kinds, self._asked = kinds, ask_callbacks(self.trainer, checkpoint.get("callbacks", {}))
            loop, every = checkpoint["loops"]["fit_loop"], self.trainer.check_val_every_n_epoch
            epoch = loop["epoch_progress"]["current"]["processed"]
            validates = self.trainer.enable_validation and every is not None and (epoch + 1) % every == 0
            if due is None:  # a checkpoint of an earlier version
                due = validates and loop["epoch_loop.batch_progress"]["is_last_batch"]
            by_steps = self.trainer.max_epochs == -1
            rewind_to_whole_step(loop, self.trainer.accumulate_grad_batches, validates, due, by_steps)

    def identity(self) -> dict[str, str | int]:
        """Return what must agree between a checkpoint and the run that loads it."""
        config = self.policy.model.config
        kept = self.policy.state_dict().keys()  # without adapters that are not the run's own
        return {
            "method": type(self).__name__,
            "model_type": config.model_type,
            "parameters": sum(parameter.numel() for name, parameter in self.policy.named_parameters() if name in kept),
            "vocab_size": config.vocab_size,
        }


def fuse_adam(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam and AdamW update a parameter in one pass over memory, unless the user has chosen how."""
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        for group in optimizer.param_groups:
            if group["fused"] is None and group["foreach"] is None:
                group["fused"] = True


def count_tokens(batch: PolicyBatch | PreferenceBatch, rows: Tensor) -> Tensor:
    """Count the tokens [] of the completions in ``rows``, bool [N], and those of each of their prompts once."""
    prompts = torch.zeros(len(batch["prompt_ids"]), dtype=torch.long, device=rows.device)
    read = batch["prompt_mask"] & (prompts.index_add(0, batch["prompt_index"], rows.long()) > 0)[:, None]
    if "prompt_counts" in batch:
        read = read & batch["prompt_counts"][:, None]  # type: ignore[typeddict-item]
    return (batch["completion_mask"] & rows[:, None]).sum() + read.sum()
