"""Real Trainer runs on InstructionDataModule: micro-batches, ranks and resuming change no bit, or nearly none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from datamodules import Addition, InstructionDataModule
from datamodules.loaders.step_sampler import StepSampler
from modules.networks.tiny import tiny_tokenizer
from modules.types import InstructionBatch


class Unigram(LightningModule):
    """A model that learns next-token scores from the current token. With Adam, every bit of a gradient matters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.scores = torch.nn.Embedding(261, 261)
        self.seen: list[list[list[int]]] = []

    def loss(self, batch: InstructionBatch) -> Tensor:
        logprobs = self.scores(batch["input_ids"][:, :-1]).log_softmax(-1)
        kept = logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["loss_mask"][:, 1:]
        return -kept.sum() / batch["denominator"]

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.loss(batch) * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Validated(Unigram):
    def validation_step(self, batch: InstructionBatch, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=1)


def data(batch_size: int = 2, rows: int = 21, val: bool = False) -> InstructionDataModule:
    held_out = Addition(5, held_out=True) if val else None
    return InstructionDataModule(tiny_tokenizer(), Addition(rows), held_out, batch_size=batch_size, seed=1)


def fit(
    model: Unigram,
    module: InstructionDataModule,
    checkpoint: Path | None = None,
    callbacks: tuple[Any, ...] = (),
    **limits: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**settings, **limits}, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
    trainer.fit(model, datamodule=module, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


def savers(folder: Path, every: int = 1) -> tuple[ModelCheckpoint, ...]:
    steps = ModelCheckpoint(dirpath=folder, filename="step{step}", every_n_train_steps=every, save_top_k=-1)
    epochs = ModelCheckpoint(
        dirpath=folder, filename="epoch{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1
    )
    return steps, epochs


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


LIMITS: list[dict[str, Any]] = [{"max_epochs": 3}, {"max_steps": 13, "max_epochs": -1}]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("model_class", [Unigram, Validated])
def test_resuming_from_every_checkpoint_is_bitwise(
    tmp_path: Path, limits: dict[str, Any], accumulate: int, model_class: type[Unigram]
) -> None:
    validated = model_class is Validated
    straight = model_class()
    fit(straight, data(val=validated), callbacks=savers(tmp_path), accumulate_grad_batches=accumulate, **limits)
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) >= 10
    for checkpoint in checkpoints:
        resumed = model_class()
        trainer = fit(resumed, data(val=validated), checkpoint, accumulate_grad_batches=accumulate, **limits)
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], checkpoint.name
        assert len(resumed.seen) < len(straight.seen)
        assert same(straight, resumed), f"{checkpoint.name} at step {trainer.global_step}"


def test_the_checkpoint_holds_three_ints(tmp_path: Path) -> None:
    fit(Unigram(), data(), callbacks=savers(tmp_path), max_epochs=1)
    states = {path.stem: torch.load(path, weights_only=True)["InstructionDataModule"] for path in tmp_path.iterdir()}
    first, last = states["stepstep=4"], states["epochepoch=0"]
    assert first.pop("content") == last.pop("content") != 0
    assert first == {"epoch": 0, "position": 4, "length": 11}  # 21 rows in twos
    assert last == {"epoch": 0, "position": 11, "length": 11}


def test_a_second_resume_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    straight = Unigram()
    fit(straight, data(), callbacks=savers(tmp_path / "first"), max_epochs=3)
    for step in (4, 11):  # 11 is the last of its epoch: from there on the Trainer's counters lag by one epoch
        fit(Unigram(), data(), tmp_path / "first" / f"stepstep={step}.ckpt", savers(tmp_path / str(step)), max_epochs=3)
        for checkpoint in sorted((tmp_path / str(step)).glob("step*")):
            resumed = Unigram()
            fit(resumed, data(), checkpoint, max_epochs=3)
            assert same(straight, resumed), checkpoint.name
    fit(Unigram(), data(), tmp_path / "11" / "stepstep=13.ckpt", savers(tmp_path / "third"), max_epochs=3)
    third = Unigram()
    fit(third, data(), tmp_path / "third" / "stepstep=15.ckpt", max_epochs=3)
    assert same(straight, third)


def test_a_finished_run_goes_on_with_whole_epochs(tmp_path: Path) -> None:
    straight = Unigram()
    fit(straight, data(), max_epochs=3)
    shorter = Unigram()
    fit(shorter, data(), max_epochs=2).save_checkpoint(tmp_path / "end.ckpt")
    longer = Unigram()
    fit(longer, data(), tmp_path / "end.ckpt", max_epochs=3)
    assert same(straight, longer) and len(longer.seen) == 11


def test_one_data_module_serves_a_second_run_from_the_start(tmp_path: Path) -> None:
    straight = Unigram()
    fit(straight, data(), callbacks=savers(tmp_path), max_epochs=1)
    module = data()
    fit(Unigram(), module, tmp_path / "stepstep=4.ckpt", max_epochs=1)
    again = Unigram()
    fit(again, module, max_epochs=1)
    assert same(straight, again)
    resumed = Unigram()
    fit(resumed, module, tmp_path / "stepstep=6.ckpt", max_epochs=1)
    assert same(straight, resumed) and len(resumed.seen) == 5


def test_an_error_inside_a_step_loses_no_batch(tmp_path: Path) -> None:
    class Failing(Unigram):
        def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 5:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Failing(), data(), max_epochs=2)
    straight, resumed = Unigram(), Unigram()
    fit(straight, data(), max_epochs=2)
    fit(resumed, data(), tmp_path / "inside.ckpt", max_epochs=2)
    assert same(straight, resumed)


def test_other_batches_than_the_checkpoint_has_are_refused_inside_an_epoch(tmp_path: Path) -> None:
    fit(Unigram(), data(), callbacks=savers(tmp_path), max_epochs=2)
    with pytest.raises(
        ValueError, match="inside an epoch of 11 micro-batches and this run has 6: resume with the same rows"
    ):
        fit(Unigram(), data(batch_size=4), tmp_path / "stepstep=4.ckpt", max_epochs=2)
    fit(Unigram(), data(batch_size=4), tmp_path / "epochepoch=0.ckpt", max_epochs=2)


def test_overfit_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="overfit_batches replaces the sampler"):
        fit(Unigram(), data(), overfit_batches=1, max_epochs=1)


def weights_after(batch_size: int, accumulate: int, devices: int = 1) -> Tensor:
    model = Unigram().double()
    limits: dict[str, Any] = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    trainer = fit(model, data(batch_size), accumulate_grad_batches=accumulate, max_epochs=2, **limits)
    assert devices > 1 or isinstance(trainer.train_dataloader.sampler, StepSampler)  # type: ignore[union-attr]
    return model.scores.weight.detach()


def test_accumulation_and_ranks_change_nothing() -> None:
    reference = weights_after(8, 1)
    assert torch.allclose(weights_after(2, 4), reference, rtol=0, atol=1e-9)
    assert torch.allclose(weights_after(2, 2, devices=2), reference, rtol=0, atol=1e-9)
    assert not torch.allclose(weights_after(2, 1), reference, rtol=0, atol=1e-3)
