"""The line at the start of a fit: memory and time against what is measured, and arithmetic by hand."""

import logging
import re
import time

import pytest
from lightning.pytorch import Callback, Trainer

from datamodules import Addition, InstructionDataModule, VerifiableDataModule
from modules import GRPOModule, SFTModule
from modules.rewards import RegexFormat
from modules.rollout.sampling import Sampling
from modules.trainer.forecast import Forecast, count_validations, write_estimate


class Slow(Callback):
    """Makes each micro-batch take a tenth of a second more for each row of its batch."""

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        time.sleep(0.1 * self.rows)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.rows = len(batch["input_ids" if "input_ids" in batch else "completion_ids"])

    def on_train_start(self, trainer, pl_module) -> None:
        self.begun = time.perf_counter()

    def on_train_end(self, trainer, pl_module) -> None:
        self.seconds = time.perf_counter() - self.begun


def fit(module, data, slow, caplog, **settings) -> str:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[slow],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, data)
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("estimate"))
    return line


def read(line: str, unit: str) -> tuple[float, float, float]:
    found = re.fullmatch(rf"estimate: about ([\d.]+) GB, ([\d.]+) s a {unit}, ([\d.]+) s in all", line)
    assert found is not None, line
    return tuple(map(float, found.groups()))


def test_sft_says_what_a_step_and_the_fit_take(caplog):
    """24 rows in steps of 4 rows and two micro-batches: 0.4 s a step and what the model takes."""
    module, slow = SFTModule("tiny"), Slow()
    data = InstructionDataModule(module.tokenizer, Addition(24), batch_size=2)
    line = fit(module, data, slow, caplog, max_epochs=2, accumulate_grad_batches=2)
    memory, step, whole = read(line, "step")
    assert step >= 0.4 and whole == pytest.approx(12 * step, rel=0.06)  # two epochs of 6 steps; two digits each
    assert whole == pytest.approx(slow.seconds, rel=0.3)
    assert memory == pytest.approx(module.peak / 1000, abs=0.06) and 0.2 < memory < 3


def test_grpo_says_what_a_phase_takes(caplog):
    reward = RegexFormat(r"[\x00-\x7f].*")  # an untrained model starts in plain ASCII half of the time
    module = GRPOModule("tiny", reward, num_generations=8, sampling=Sampling(max_completion_length=4))
    slow = Slow()
    data = VerifiableDataModule(module.tokenizer, Addition(8), prompts_per_phase=4)
    line = fit(module, data, slow, caplog, max_epochs=3)
    _, phase, whole = read(line, "phase")
    assert phase >= 1.6 and whole == pytest.approx(3 * phase, rel=0.06)  # 16 completions
    assert whole == pytest.approx(slow.seconds, rel=0.3)


def test_lines_by_hand():
    assert write_estimate(3100, 41.2, "phase", 7830, False) == "estimate: about 3.1 GB, 41 s a phase, 2 h 10 min in all"
    assert write_estimate(None, 0.5, "step", float("inf"), True) == "estimate: 0.5 s a step"
    assert (
        write_estimate(None, 0.5, "step", 5, True, "to go") == "estimate: 0.5 s a step, 5 s to go without validations"
    )


class Planned:
    """The part of a Trainer that says when it validates."""

    num_val_batches, num_training_batches = [3], 10
    enable_validation, check_val_every_n_epoch, val_check_batch = True, 2, 5


def test_validations_are_counted():
    trainer = Planned()
    assert count_validations(trainer, 7) == 3 * 2  # after epochs 2, 4 and 6, twice in each
    trainer.val_check_batch = float("inf")
    assert count_validations(trainer, 7) == 3
    trainer.enable_validation = False
    assert count_validations(trainer, 7) == 0
    assert Forecast().said is False
